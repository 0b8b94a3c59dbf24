"""The configuration of the encoder service."""

from pydantic import Field

from common.config import Config


class EncoderConfig(Config):
    """How waiting images are collected, and how many may wait."""

    max_batch_patches: int = Field(16384, ge=1, description="patches encoded together; one larger image runs alone")
    max_queued_images: int = Field(256, ge=1, description="images waiting in a replica; more are refused with 429")
    preprocess_threads: int = Field(2, ge=1, description="images decoded and resized at once")
