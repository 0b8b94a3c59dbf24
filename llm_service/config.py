"""The configuration of the LLM service: its engine, and what it lets in."""

from typing import Self

from pydantic import Field, model_validator

from common.config import MIB, Config


class EngineConfig(Config):
    """Limits of continuous batching, in tokens and sequences."""

    block_size: int = Field(16, ge=1, description="tokens in one KV block")
    num_kv_blocks: int | None = Field(
        None, ge=2, description="KV blocks in memory; by default 2048 on a CPU, and what is left of it on a GPU"
    )
    gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="share of a GPU's memory to fill with KV blocks, beside all else; by default 0.9"
    )
    max_num_seqs: int = Field(32, ge=1, description="sequences computed in one step")
    max_num_batched_tokens: int = Field(1024, ge=16, description="tokens computed in one step")
    prefill_chunk_size: int = Field(64, ge=1, description="`exact` numerics: prompts are computed in whole such chunks")
    max_model_len: int = Field(8192, ge=1, description="prompt and answer of one request; at most the model's own")
    enable_prefix_caching: bool = Field(True, description="share KV blocks of equal prompt beginnings")

    @model_validator(mode="after")
    def _chunks_fit(self) -> Self:
        if self.prefill_chunk_size % self.block_size:
            raise ValueError(
                f"prefill_chunk_size {self.prefill_chunk_size} is not a multiple of block_size {self.block_size}"
            )
        if self.num_kv_blocks is not None and self.gpu_memory_utilization is not None:
            raise ValueError("num_kv_blocks and gpu_memory_utilization are two ways to say one thing: set one of them")
        if self.prefill_chunk_size > self.max_num_batched_tokens:
            raise ValueError(
                f"prefill_chunk_size {self.prefill_chunk_size} is above max_num_batched_tokens "
                f"{self.max_num_batched_tokens}"
            )
        return self


class AdmissionConfig(Config):
    """What the requests of one replica may hold together; more are refused with 503 and when there may be room."""

    max_requests: int = Field(1024, ge=1, description="requests being answered")
    max_held_bytes: int = Field(
        1024 * MIB, ge=1, description="bodies of requests being answered, frames of clips until encoded"
    )
    max_queued_prompt_tokens: int = Field(1_000_000, ge=1, description="prompt tokens before their first answer token")
    max_queued_vision_tokens: int = Field(500_000, ge=1, description="image tokens that wait for their embeddings")


class FetchConfig(Config):
    """Images behind http(s) URLs. Off unless hosts are named, because the service then calls addresses it is given."""

    allowed_hosts: tuple[str, ...] = Field(
        (), description="`example.org`, `*.example.org` for all below it, `*` for any with a public address"
    )
    allow_http: bool = Field(False, description="http beside https")
    max_redirects: int = Field(3, ge=0, description="each is checked like the first URL")
    timeout_s: float = Field(5.0, gt=0, description="for one image, redirects included")


class ApiKey(Config):
    """Who may call, and how much. Counted by each replica."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="for messages and logs")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the key; the key itself is nowhere")
    tenant: str = Field(
        "", pattern=r"^[A-Za-z0-9._-]{0,64}$", description="keys of one tenant share embeddings, KV blocks and media"
    )
    admin: bool = Field(False, description="may use /v1/cache, where that is on")
    max_concurrent_requests: int | None = Field(None, ge=1)
    max_requests_per_minute: int | None = Field(None, ge=1)


class ApiConfig(Config):
    """The HTTP surface."""

    keys: tuple[ApiKey, ...] = Field((), description="without any, everybody may call")
    max_body_bytes: int = Field(32 * MIB, ge=1, description="body of one request")
    body_timeout_s: float = Field(30.0, gt=0, description="longest pause inside a body")
    timeout_s: float | None = Field(None, gt=0, description="limit of requests without x-request-timeout-seconds")
    encoder_wait_s: float = Field(
        20.0, ge=0, description="while no encoder replica runs, a new image waits so long for one before it gets 503"
    )
    admission: AdmissionConfig = AdmissionConfig()
    fetch: FetchConfig = FetchConfig()

    @model_validator(mode="after")
    def _keys_differ(self) -> Self:
        for field in ("name", "sha256"):
            if len({getattr(key, field) for key in self.keys}) < len(self.keys):
                raise ValueError(f"two keys have the same {field}")
        return self
