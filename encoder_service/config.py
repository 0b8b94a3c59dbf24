"""The configuration of the encoder service."""

from typing import Literal

from pydantic import Field

from common.config import Config


class EncoderConfig(Config):
    """Where images are encoded, how they are collected, and how many may wait."""

    device: Literal["auto", "cpu", "cuda"] | None = Field(
        None, description="of the vision half; default: `model.device`. `cpu`: CPU encoders beside a decoder on a GPU"
    )
    max_batch_patches: int = Field(16384, ge=1, description="patches encoded together; one larger image runs alone")
    max_queued_images: int = Field(
        256, ge=1, description="images that a replica holds and has not encoded; more are refused with 429"
    )
    preprocess_threads: int = Field(2, ge=1, description="images decoded and resized at once")
