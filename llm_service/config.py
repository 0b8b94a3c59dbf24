"""The configuration of the LLM service's engine."""

from typing import Self

from pydantic import Field, model_validator

from common.config import Config


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
