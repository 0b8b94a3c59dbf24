"""`fovea up --backend transformers`: the one-piece model behind the same API, as a baseline and a fallback.

One process holds transformers' whole model. It encodes each picture of each request and generates one answer at a time
with `generate()`: no embedding cache, no continuous batching, no KV blocks.
"""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from common.cache import LocalTier, TieredCache
from common.checkpoint import LoadedHalf, checkpoint_directory, choose_device, choose_dtype, load_config, weights_digest
from common.config import CacheConfig, ModelConfig
from common.errors import InvalidRequestError
from common.families import family_of
from common.garbage import leave_alone_what_is_there
from common.logs import log_as_serve_does
from common.media_store import open_media_store
from encoder_service.config import EncoderConfig
from encoder_service.server import EncoderServer
from llm_service.api.app import create_app
from llm_service.config import ApiConfig, EngineConfig
from llm_service.deployment import cluster_metrics
from llm_service.engine.engine import check_sampling_params
from llm_service.engine.request import FinishReason, Request, RequestOutput
from llm_service.engine.sampler import Sampler
from llm_service.server import Decoder, LLMServer, end_tokens


def one_piece_server(
    model: ModelConfig, engine: EngineConfig, cache: CacheConfig, api: ApiConfig | None = None
) -> LLMServer:
    """A server whose two halves are one model. Of `cache` it uses the store of managed media only."""
    directory = checkpoint_directory(model)
    whole = load_whole(model)
    encoder = EncoderServer(model, EncoderConfig(), _no_cache(), half=whole)
    generating = TransformersEngine(whole.model, end_tokens(directory, whole.config))
    decoder = Decoder(
        engine=generating,
        half=dataclasses.replace(whole, digest=weights_digest(whole.model, "language")),
        max_model_len=min(engine.max_model_len, whole.config.get_text_config().max_position_embeddings),
        vocab_size=whole.config.get_text_config().vocab_size,
        takes_clips=False,  # `generate()` would find their positions by a rule of its own
    )
    store = open_media_store(cache)
    return LLMServer(model, engine, _no_cache(), encoder, media_store=store, decoder=decoder, api=api)


def load_whole(model: ModelConfig) -> LoadedHalf:
    """Both halves, with the digest of the vision half's weights. Raises ValueError for families it does not know."""
    directory = checkpoint_directory(model)
    config = load_config(directory)
    if not family_of(config).uses_mrope:
        raise ValueError(f"the transformers backend serves Qwen's families, not {config.model_type!r}")
    device = choose_device(model)
    dtype = choose_dtype(model, config, device)
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].from_pretrained(directory, dtype=dtype)
    return LoadedHalf(whole.eval().to(device), config, device, dtype, weights_digest(whole, "vision"))


class TransformersEngine:
    """An engine that is `generate()` in a thread; requests wait for each other."""

    def __init__(self, model: PreTrainedModel, eos_token_ids: frozenset[int]) -> None:
        self._model = model
        self._eos_token_ids = eos_token_ids
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self._unfinished: dict[str, _Generation] = {}
        self._is_generating = threading.Lock()

    async def generate(self, request: Request, forks: Sequence[Request] = ()) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one token each, of one request after the other. Leaving early ends them at their next token."""
        vocab_size = self._model.config.get_text_config().vocab_size
        check_sampling_params(request.sampling_params, self._eos_token_ids, vocab_size)
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[RequestOutput | None] = asyncio.Queue()  # None: nothing more comes
        generations = [
            _Generation(one, self._eos_token_ids, put=lambda new: loop.call_soon_threadsafe(outputs.put_nowait, new))
            for one in (request, *forks)
        ]
        self._unfinished |= {generation.request.request_id: generation for generation in generations}
        generating = loop.run_in_executor(self._thread, self._generate, generations)
        generating.add_done_callback(lambda _: outputs.put_nowait(None))
        try:
            while (output := await outputs.get()) is not None:
                yield output
            await generating  # raises what ended it
        finally:
            for generation in generations:
                generation.is_over = True
                del self._unfinished[generation.request.request_id]

    def abort(self, request_id: str) -> None:
        """Ends one request of a group early."""
        if request_id in self._unfinished:
            self._unfinished[request_id].is_over = True

    def check_health(self) -> None:
        """A thread that waits for requests cannot be ill."""

    @property
    def num_running(self) -> int:
        return int(self._is_generating.locked())

    @property
    def num_waiting(self) -> int:
        return max(0, len(self._unfinished) - self.num_running)

    def start(self) -> None:
        """Its thread starts with the first request."""

    def shutdown(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    @torch.inference_mode()
    def _generate(self, generations: Sequence["_Generation"]) -> None:
        for generation in generations:
            if generation.is_over:
                continue
            request = generation.request
            input_ids = torch.tensor([request.prompt_token_ids], device=self._model.device)
            with self._is_generating:
                self._model.model.rope_deltas = None  # state of the last call
                self._model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    mm_token_type_ids=(input_ids == self._model.config.image_token_id).int(),
                    **self._images(request),
                    do_sample=False,  # the service's own sampler has chosen, with the caller's parameters
                    max_new_tokens=request.sampling_params.max_tokens,
                    logits_processor=[generation.choose],
                    stopping_criteria=[generation.ends],
                    eos_token_id=None,
                )

    def _images(self, request: Request) -> dict[str, Any]:
        """What the vision half said of a request's images, in the place of their pixels."""
        embeddings = [feature.embedding for feature in request.mm_features]
        if not embeddings:
            return {}
        device = self._model.device
        output = BaseModelOutputWithDeepstackFeatures(
            pooler_output=[embedding.features.to(device, copy=True) for embedding in embeddings],
            deepstack_features=list(
                zip(*([row.to(device) for row in one.deepstack] for one in embeddings), strict=True)
            ),
        )
        grids = torch.tensor([embedding.grid_thw for embedding in embeddings], device=device)
        return {"mm_encoder_outputs": {"image": output}, "image_grid_thw": grids}


class _Generation:
    """One call of `generate()`: its hooks choose each token as the engine's sampler does and tell it to the caller."""

    def __init__(self, request: Request, eos_token_ids: frozenset[int], put: Callable[[RequestOutput], object]) -> None:
        self.request = request
        self.is_over = False
        self._end_token_ids = request.sampling_params.end_token_ids(eos_token_ids)
        self._sampler = Sampler(eos_token_ids)
        self._put = put

    def choose(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor that leaves one token."""
        self.request.num_pending_tokens = 1  # the sampler counts the token that it draws
        sampled = self._sampler.sample(scores.float(), [self.request])
        token = sampled.token_ids()[0]
        self.request.num_pending_tokens = 0
        if token is None:
            raise FloatingPointError(f"the logits of request {self.request.request_id} are not finite")
        if self.request.grammar is not None and not self.request.grammar.accept(token):
            raise InvalidRequestError("the grammar takes more work than is allowed", code="grammar_limit")
        self.request.output_token_ids.append(token)
        reason = self._finish_reason(token)
        logprobs = [one for one in sampled.logprobs() or () if one is not None]
        self._put(RequestOutput(self.request.request_id, [token], finish_reason=reason, logprobs=logprobs))
        self.is_over = self.is_over or reason is not None
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token], device=scores.device), 0.0)

    def ends(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """A stopping criterion: at the end token, at the limit, or when nobody waits any more."""
        return torch.tensor([self.is_over], device=input_ids.device)

    def _finish_reason(self, token: int) -> FinishReason | None:
        if token in self._end_token_ids:
            return FinishReason.STOP
        if self.request.grammar is not None and self.request.grammar.is_finished:
            return FinishReason.STOP
        is_full = len(self.request.output_token_ids) == self.request.sampling_params.max_tokens
        return FinishReason.LENGTH if is_full else None


@serve.deployment(name="llm")
@serve.ingress()
class OnePieceDeployment:
    """The application's ingress and its only deployment."""

    def __init__(self, model: ModelConfig, config: EngineConfig, cache: CacheConfig, api: ApiConfig) -> None:
        log_as_serve_does()
        self._admin_api = cache.admin_api
        self._server = one_piece_server(model, config, cache, api)
        leave_alone_what_is_there()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(
            self._server,
            admin_api=self._admin_api,
            metrics_text=cluster_metrics,
            echo_request_id=False,  # Serve's proxy does it
        )


def _no_cache() -> TieredCache:
    return TieredCache(LocalTier(0), None)
