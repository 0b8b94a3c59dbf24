"""The configuration that both services share. Each default is written here once; nothing changes after it is built."""

import math
from fractions import Fraction
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

MIB = 1024**2

ImageBackend = Literal["pil", "torchvision"]


class Config(BaseModel):
    """A frozen model that refuses unknown fields: an option that has no effect is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class VideoLimits(Config):
    """What a clip may cost. All but the time to decode are known before a frame is decoded, of an animated GIF or WebP
    only the numbers of frames and pixels in the file."""

    max_clips: int = Field(4, ge=0, description="clips in one request")
    max_frames: int = Field(128, ge=1, description="frames that a clip is sampled to, or is sent as")
    max_seconds: float = Field(600.0, gt=0, description="duration of a clip")
    max_bytes: int = Field(20 * MIB, ge=1, description="bytes of a clip in one file")
    max_decoded_frames: int = Field(20_000, ge=1, description="frames in the file, most of which are not sampled")
    max_decoded_pixels: int = Field(2 * 10**9, ge=1, description="pixels of these frames together")
    max_sampled_pixels: int = Field(128 * 10**6, ge=1, description="pixels of the sampled ones, held at 3 bytes each")
    decode_timeout_s: float = Field(30.0, gt=0, description="for the file, waiting not counted")
    decode_processes: int = Field(2, ge=1, description="files that an LLM replica decodes at once")


class ImageLimits(Config):
    """What an image may cost before anything is decoded."""

    max_images: int = Field(16, ge=0, description="images in one request")
    max_image_bytes: int = Field(20 * MIB, ge=1, description="encoded bytes of one image")
    max_image_pixels: int = Field(64 * 1000 * 1000, ge=1, description="decoded pixels of one image")
    max_image_frames: int = Field(1024, ge=1, description="frames in an animation")
    max_image_scans: int = Field(100, ge=1, description="scans in a progressive JPEG, which usually has about ten")
    video: VideoLimits = VideoLimits()


class TokenReduction(Config):
    """Images in fewer tokens: a part of an embedding's rows is kept, which needs no training and changes answers."""

    method: Literal["divprune", "random"] = Field(
        description="`divprune`: rows as different from each other as can be; `random`: any, as a baseline"
    )
    ratio: float = Field(gt=0, le=1, description="share of the rows that is kept; 1 changes nothing")

    def num_kept(self, num_rows: int) -> int:
        """At least one."""
        return math.ceil(Fraction(str(self.ratio)) * num_rows)

    def __str__(self) -> str:
        return f"{self.method}:{self.ratio}"


class ModelConfig(Config):
    """Which model, and how it computes."""

    path: str = Field(description="a Hugging Face checkpoint directory, or an id of the hub")
    served_name: str | None = Field(None, description="what the API calls the model; default: `path`")
    revision: str | None = Field(None, description="the hub revision, if `path` is an id")
    load_format: Literal["safetensors", "dummy"] = Field("safetensors", description="`dummy`: seeded random weights")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="`auto`: the checkpoint's on GPU, float32 on CPU"
    )
    numerics: Literal["exact", "fast"] = Field(
        "exact", description="`exact`: an answer does not depend on its company; `fast`: free batching"
    )
    mrope_rule: Literal["auto", "qwen", "hf5"] = Field(
        "auto", description="position rule after clips; `auto`: the checkpoint's `mrope_rule`, else `qwen`"
    )
    image_backend: ImageBackend = Field(
        "pil", description="pixels as transformers' processors have them with Pillow, or (Qwen's families) torchvision"
    )
    num_threads: int = Field(1, ge=1, description="torch threads of a replica on CPU; features depend on it")
    min_pixels: int | None = Field(None, ge=1, description="pixel budget of an image; default: the checkpoint's")
    max_pixels: int | None = Field(None, ge=1, description="pixel budget of an image; default: the checkpoint's")
    max_frame_pixels: int | None = Field(
        None, ge=1, description="pixel budget of a frame of a clip; default: an image's, and no more than 768 tokens"
    )
    token_reduction: TokenReduction | None = Field(
        None, description="{method: divprune, ratio: 0.5} keeps half of the rows of every image; default: all of them"
    )
    limits: ImageLimits = ImageLimits()


class CacheConfig(Config):
    """Where embeddings are kept, and in a second store what they are made from.

    Losing embeddings costs time, never an answer. The `media_` store holds what must not be lost: the sources and
    records of managed media, and aliases.
    """

    redis_url: str | None = Field(
        None, description="redis://, rediss://, unix:// or, of a cluster, redis+cluster://; default: a private server"
    )
    local_bytes: int = Field(
        256 * MIB, ge=0, description="in-process tier of each replica; that of an LLM replica on a GPU is page-locked"
    )
    redis_bytes: int = Field(512 * MIB, ge=8 * MIB, description="memory limit of the private server")
    ttl_s: int = Field(24 * 3600, ge=1, description="lifetime of an entry in Redis")
    connect_timeout_s: float = Field(0.05, gt=0)
    timeout_s: float = Field(0.1, gt=0, description="base time limit of a Redis call, beside its transfer time")
    min_bytes_per_s: float = Field(50 * MIB, gt=0, description="slowest transfer that is waited for")
    audit_fraction: float = Field(
        0.0, ge=0, le=1, description="`exact` numerics: share of hits that are encoded again in idle time and compared"
    )
    answer_cache_bytes: int = Field(
        0, ge=0, description="`exact` numerics: answers of greedy requests kept in Redis; 0: none"
    )
    pixel_alias: bool = Field(
        False,
        description="files with the same pixels share an embedding: an image in no tier is decoded once more to "
        "compare, and deleting one file deletes the embeddings of all of them",
    )
    secret: SecretStr | None = Field(
        None, min_length=16, description="entries are sealed with BLAKE3 under it, and others refused; default: xxh3"
    )
    write_queue_bytes: int = Field(64 * MIB, ge=0, description="entries waiting to be written; more are dropped")
    media_redis_url: str | None = Field(None, description="a second Redis, with noeviction; default: a private server")
    media_redis_bytes: int = Field(256 * MIB, ge=8 * MIB, description="memory limit of the private second server")
    media_ttl_s: int = Field(24 * 3600, ge=1, description="lifetime of managed media that name none")
    media_timeout_s: float = Field(1.0, gt=0, description="base time limit of a call of the second store")
    max_pinned_bytes: int = Field(128 * MIB, ge=0, description="sources and embeddings of pinned media, together")
    admin_api: bool = Field(
        False, description="serve /v1/cache: statistics, warming, purge, export, import; every caller may use it then"
    )
