"""The two services in one process, sharing nothing but packed embeddings, and requests to them."""

import base64
import random
from pathlib import Path
from typing import Any, Literal

from common.cache import LocalTier, TieredCache
from common.config import ModelConfig, TokenReduction
from encoder_service.config import EncoderConfig
from encoder_service.server import EncoderServer
from llm_service.admission import ANYONE, RequestContext
from llm_service.chat import ChatMessage, ImagePart
from llm_service.config import EngineConfig
from llm_service.server import GenerationOptions, LLMServer, PreparedRequest

URL = "/v1/chat/completions"
MAX_TOKENS = 24


class Services:
    """The two halves without Ray: the LLM service has nothing of the encoder but two methods."""

    def __init__(
        self,
        checkpoint: Path,
        numerics: Literal["exact", "fast"] = "exact",
        reduction: TokenReduction | None = None,
        **engine: int,
    ) -> None:
        model = ModelConfig(path=str(checkpoint), served_name="tiny", numerics=numerics, token_reduction=reduction)
        self.encoder = EncoderServer(model, EncoderConfig(), TieredCache(LocalTier(2**26), None))
        self.cache = TieredCache(LocalTier(2**26), None)
        self.llm = LLMServer(model, EngineConfig(**engine), self.cache, self.encoder)

    async def prepare(
        self,
        text: str,
        images: list[bytes],
        max_tokens: int = MAX_TOKENS,
        context: RequestContext = ANYONE,
        **others: Any,
    ) -> PreparedRequest:
        parts: list[str | ImagePart] = [ImagePart(image, "auto", "messages") for image in images]
        options = GenerationOptions(max_tokens=max_tokens, **others)
        message = ChatMessage("user", [*parts, text])
        return await self.llm.prepare([message], options, random.randbytes(8).hex(), context=context)

    async def tokens(self, text: str, images: list[bytes], max_tokens: int = MAX_TOKENS) -> list[int]:
        prepared = await self.prepare(text, images, max_tokens)
        return [token async for output in self.llm.generate(prepared) for token in output.token_ids]


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes, media_type: str = "image/png", **fields: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data, media_type), **fields}}


def body(*content: dict[str, Any] | str, model: str = "tiny", **fields: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 6} | fields
