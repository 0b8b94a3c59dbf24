"""One request from messages to a stream of text: prompt, features, engine, detokenizer. No Ray, no FastAPI."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast, get_args

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig

from common import metrics
from common.cache import EmbeddingCache
from common.checkpoint import LoadedHalf, checkpoint_directory, device_capability, load_geometry, load_half
from common.config import CacheConfig, ModelConfig, TokenReduction
from common.embedding import Grid, VisionEmbedding
from common.errors import InvalidRequestError, ModelNotFoundError, UnavailableError
from common.families import MropeRule, clip_rule_of
from common.geometry import PatchGeometry
from common.identity import framed_digest, images_in, system_fingerprint
from common.media import MediaItem, MediaParams
from common.media_store import MediaStore, open_media_store
from llm_service.admission import ANYONE, Admission, RequestContext
from llm_service.answer_cache import Answer, AnswerCache, answer_key
from llm_service.chat import ChatMessage, visuals_of
from llm_service.clips import ClipLibrary, ClipRequest, Visual, items_of
from llm_service.config import ApiConfig, EngineConfig
from llm_service.cost import CostModel
from llm_service.detokenizer import IncrementalDetokenizer, TokenTexts
from llm_service.engine.async_engine import AsyncLLMEngine
from llm_service.engine.engine import ARITHMETIC_VERSION, LLMEngine, check_sampling_params, prefix_multiple
from llm_service.engine.request import FinishReason, MultiModalFeature, Request, RequestOutput, SamplingParams
from llm_service.engine.structured_output import Grammar, GrammarCompiler, GrammarState, StructuredOutput
from llm_service.features import EncoderClient, FeatureSource, ImageFeatures, ImageRequest, embedding_key
from llm_service.fetch import ImageFetcher
from llm_service.media import MediaContext, MediaLibrary
from llm_service.observation import count_known_answer, observed
from llm_service.prompt import PLAIN, EngineInput, PromptProcessor, TemplateOptions

_MAX_CHARACTERS_ON_THE_LOOP = 20_000  # tokenizing more is left to a thread
_SOURCES = ("answer", "local", "redis", "encoder")


class Engine(Protocol):
    """The decoder engine, as the server sees it."""

    def generate(self, request: Request, forks: Sequence[Request] = ()) -> AsyncGenerator[RequestOutput, None]: ...

    def abort(self, request_id: str) -> None: ...

    def check_health(self) -> None: ...

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    def start(self) -> None: ...

    def shutdown(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Decoder:
    """What generates. `half` is the language half, or a whole model with the digest of its language half."""

    engine: Engine
    half: LoadedHalf
    max_model_len: int
    vocab_size: int
    takes_clips: bool = True


def split_decoder(model: ModelConfig, config: EngineConfig) -> Decoder:
    """The language half under continuous batching."""
    half = load_half(model, "language")
    engine = LLMEngine(
        half,
        config,
        numerics=model.numerics,
        eos_token_ids=end_tokens(checkpoint_directory(model), half.config),
        mrope_rule=position_rule(model, half.config),
    )
    return Decoder(AsyncLLMEngine(engine), half, engine.max_model_len, engine.vocab_size)


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """What a caller may set; None means the checkpoint's generation config, then OpenAI's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    n: int = 1
    structured_output: StructuredOutput | None = None
    skip_special_tokens: bool = True
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class ImageReceipt:
    """What one image or clip of a request cost: its digest, tokens, where its embedding came from, and the wait.

    `source` is `local`, `redis`, `encoder`, or `answer` when the whole answer was known and no embedding was needed; of
    a clip the slowest. `encode_ms` is what encoding it took, be it now or long ago. A clip has `grids`, of which
    `cached_grids` were found. With a `reduction` the tokens were `whole_tokens`.
    """

    id: str
    tokens: int
    source: str
    num_bytes: int = 0
    encode_ms: float = 0.0
    wait_ms: float = 0.0
    frames: int = 0
    grids: int = 0
    cached_grids: int = 0
    whole_tokens: int = 0
    reduction: str = ""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that has passed every check and has its embeddings; only generation is left.

    With `known_answer` it has no embeddings and needs none. `answer_key` is None if the answer is not one to keep.
    `forks` are the further answers to the same prompt.
    """

    request: Request
    options: GenerationOptions
    receipts: list[ImageReceipt]
    fingerprint: str
    answer_key: str | None = None
    known_answer: Answer | None = None
    forks: Sequence[Request] = ()
    context: RequestContext = ANYONE

    @property
    def num_choices(self) -> int:
        return 1 + len(self.forks)

    @property
    def num_prompt_tokens(self) -> int:
        return self.request.num_prompt_tokens

    @property
    def num_image_tokens(self) -> int:
        return sum(receipt.tokens for receipt in self.receipts if not receipt.grids)

    @property
    def num_video_tokens(self) -> int:
        return sum(receipt.tokens for receipt in self.receipts if receipt.grids)


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """One image or clip of a request that is not done: `source` is where its embedding would come from."""

    id: str
    tokens: int
    grid_thw: Grid
    tiers: list[str]
    source: str
    predicted_ms: float | None
    frames: int = 0
    cached_grids: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request would be. Times come from what the last ones took; None until there were any."""

    num_prompt_tokens: int
    max_tokens: int
    images: list[PlannedImage]
    predicted_ms: float | None


class LLMServer:
    """Owns the language half, its engine, and the front end that feeds it."""

    def __init__(
        self,
        model: ModelConfig,
        engine_config: EngineConfig,
        cache: EmbeddingCache,
        encoder: EncoderClient,
        media_store: MediaStore | None = None,
        audit_fraction: float = 0.0,
        answers: AnswerCache | None = None,
        decoder: Decoder | None = None,
        api: ApiConfig | None = None,
    ) -> None:
        """Without a `media_store`, managed media stay in this process. The default `decoder` is the language half."""
        api = api or ApiConfig()
        if model.numerics != "exact" and (audit_fraction or answers is not None):
            raise ValueError("cache.audit_fraction and cache.answer_cache_bytes need `exact` numerics")
        torch.set_num_threads(model.num_threads)
        directory = checkpoint_directory(model)
        decoder = decoder or split_decoder(model, engine_config)
        geometry = load_geometry(directory, decoder.half.config)
        mrope_rule = position_rule(model, decoder.half.config)
        self.eos_token_ids = end_tokens(directory, decoder.half.config)
        self.model_name = model.served_name or model.path
        self.created = int(time.time())
        self._vocab_size = decoder.vocab_size
        self.max_model_len = decoder.max_model_len
        self._engine_config = engine_config
        self._is_exact = model.numerics == "exact"
        self.limits = model.limits
        if not geometry.max_pixels and (model.min_pixels or model.max_pixels):
            raise ValueError(
                f"model.min_pixels and model.max_pixels have no effect on {decoder.half.config.model_type!r}, whose "
                "images all get the sizes of its preprocessor_config.json"
            )
        reduction = token_reduction(model)
        params = MediaParams(
            min_pixels=model.min_pixels or geometry.min_pixels,
            max_pixels=model.max_pixels or geometry.max_pixels,
            reduction=reduction,
        )
        self._mrope_rule = mrope_rule
        self._decoder = decoder_description(model, decoder.half.device, engine_config)
        self._language_weights = decoder.half.digest
        self.prompt = PromptProcessor(
            directory, decoder.half.config, geometry, mrope_rule, self.max_model_len, reduction
        )
        self.token_texts = TokenTexts(self.prompt.tokenizer)
        self._grammars = GrammarCompiler(
            self.prompt.tokenizer, vocab_size=decoder.vocab_size, eos_token_ids=self.eos_token_ids
        )
        self._grammar_thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        store = media_store if media_store is not None else open_media_store(CacheConfig())
        self._features = FeatureSource(encoder, cache, geometry, audit_fraction, store.quarantine)
        self._cache = cache
        self._answers = answers
        fetcher = ImageFetcher(api.fetch, model.limits.max_image_bytes)
        clips = None
        takes_clips = decoder.takes_clips and clip_rule_of(decoder.half.config) is not None
        if model.max_frame_pixels and not takes_clips:
            raise ValueError(
                f"model.max_frame_pixels has no effect: {decoder.half.config.model_type!r} takes no clips here"
            )
        if takes_clips:
            assert isinstance(geometry, PatchGeometry)
            clips = ClipLibrary(geometry, params, model.limits, model.max_frame_pixels)
        self.media = MediaLibrary(store, self._features, cache, geometry, params, model.limits, fetcher, answers, clips)
        self.api = api
        self.admission = Admission(api.admission, api.keys)
        self.costs = CostModel()
        self._defaults = generation_defaults(directory)
        self.engine = decoder.engine
        self.engine.start()

    async def prepare(
        self,
        messages: Sequence[ChatMessage],
        options: GenerationOptions,
        request_id: str,
        template: TemplateOptions = PLAIN,
        context: RequestContext = ANYONE,
    ) -> PreparedRequest:
        """Everything before generation. All limits are checked before any image is sent to be encoded."""
        async with context.limit():
            visuals = await self.media.resolve(visuals_of(messages), self._media_context(messages), context)
            prompt = await self._lay_out(messages, visuals, template)
            return await self._prepare(prompt, visuals, options, request_id, context)

    async def prepare_text(
        self, token_ids: Sequence[int], options: GenerationOptions, request_id: str, context: RequestContext = ANYONE
    ) -> PreparedRequest:
        """The same for a prompt without messages or images. Raises InvalidRequestError for ids that are none."""
        async with context.limit():
            return await self._prepare(self.prompt.lay_out_text(token_ids), [], options, request_id, context)

    async def count(
        self,
        messages: Sequence[ChatMessage],
        template: TemplateOptions = PLAIN,
        context: RequestContext = ANYONE,
    ) -> tuple[EngineInput, list[Visual]]:
        """The prompt that the messages would be, and its images and clips; nothing is encoded."""
        async with context.limit():
            visuals = await self.media.resolve(visuals_of(messages), self._media_context(messages), context)
            return await self._lay_out(messages, visuals, template), visuals

    async def plan(
        self,
        messages: Sequence[ChatMessage],
        options: GenerationOptions,
        template: TemplateOptions = PLAIN,
        context: RequestContext = ANYONE,
    ) -> Plan:
        """Tokens, images and time to the first token, which no prefix in the KV cache makes shorter."""
        prompt, visuals = await self.count(messages, template, context)
        sampling_params = self._sampling_params(options, prompt.num_positions)
        assert sampling_params.max_tokens is not None
        tokens = iter(prompt.num_tokens_of_images)
        planned = [await self._plan_visual(visual, tokens) for visual in visuals]
        times = [image.predicted_ms for image in planned] + [self.costs.predict("prefill", len(prompt.token_ids))]
        known = [time for time in times if time is not None]
        predicted_ms = sum(known) if len(known) == len(times) else None
        return Plan(len(prompt.token_ids), sampling_params.max_tokens, planned, predicted_ms)

    async def _plan_visual(self, visual: Visual, tokens: Iterator[int]) -> PlannedImage:
        """`tokens` of the items from this one on."""
        if isinstance(visual, ImageRequest):
            return await self._plan_image(visual, next(tokens))
        grids = [await self._plan_image(grid, next(tokens)) for grid in visual.grids]
        times = [grid.predicted_ms for grid in grids]
        known = [time for time in times if time is not None]
        return PlannedImage(
            id=visual.id,
            tokens=sum(grid.tokens for grid in grids),
            grid_thw=visual.shape.grid_thw,
            tiers=sorted(set.intersection(*(set(grid.tiers) for grid in grids))),
            source=slowest([grid.source for grid in grids]),
            predicted_ms=sum(known) if len(known) == len(times) else None,
            frames=visual.num_frames,
            cached_grids=sum(bool(grid.tiers) for grid in grids),
        )

    async def _plan_image(self, image: ImageRequest, num_tokens: int) -> PlannedImage:
        tiers = await self.media.tiers(image)
        source = tiers[0] if tiers else "encoder"
        predicted_ms = self.costs.predict(source, num_tokens)
        return PlannedImage(image.item.mm_hash, num_tokens, image.grid_thw, tiers, source, predicted_ms)

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Plain text; a long one on a thread."""
        if len(text) <= _MAX_CHARACTERS_ON_THE_LOOP:
            return self.prompt.tokenize(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.prompt.tokenize, text, add_special_tokens=add_special_tokens)

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary writes it."""
        strings: list[str] = self.prompt.tokenizer.convert_ids_to_tokens(list(token_ids))
        return strings

    async def _lay_out(
        self, messages: Sequence[ChatMessage], visuals: Sequence[Visual], template: TemplateOptions
    ) -> EngineInput:
        shapes = [visual.shape if isinstance(visual, ClipRequest) else visual.grid_thw for visual in visuals]
        num_characters = sum(len(part) for message in messages for part in message.content if isinstance(part, str))
        if num_characters <= _MAX_CHARACTERS_ON_THE_LOOP:
            return self.prompt(messages, shapes, template)
        return await asyncio.to_thread(self.prompt, messages, shapes, template)

    async def _prepare(
        self,
        prompt: EngineInput,
        visuals: Sequence[Visual],
        options: GenerationOptions,
        request_id: str,
        context: RequestContext,
    ) -> PreparedRequest:
        images = items_of(visuals)
        sampling_params = self._sampling_params(options, prompt.num_positions)
        grammar = await self._grammar(options.structured_output)
        context.hold("prompt_tokens", len(prompt.token_ids))
        fingerprint = await self.fingerprint()
        salt = _cache_salt(context.tenant, options.cache_salt)
        key = None
        if options.n == 1 and grammar is None and options.logprobs is None:
            key = await self._answer_key(fingerprint, prompt, images, sampling_params, options, salt)
        if (answer := await self._known_answer(key)) is not None:
            count_known_answer(images)
            counts = zip(prompt.num_tokens_of_images, (prompt.whole or prompt).num_tokens_of_images, strict=True)
            known = [
                ImageReceipt(image.item.mm_hash, kept, "answer", whole_tokens=whole, reduction=_reduction_of(image))
                for image, (kept, whole) in zip(images, counts, strict=True)
            ]
            receipts = _receipts(visuals, known)
            request = _engine_request(request_id, prompt, sampling_params, [], salt)  # the engine never sees it
            return PreparedRequest(request, options, receipts, fingerprint, known_answer=answer, context=context)
        context.hold("vision_tokens", sum(prompt.num_tokens_of_images))
        features = await self._features.get_many(images)
        context.release("vision_tokens")
        for found in features:
            self.costs.note(found.source, found.embedding.num_tokens, found.wait_ms)
        self.media.pin_again(images, features)
        used_fingerprint = await self.fingerprint()
        if prompt.whole is not None:
            prompt = self.prompt.with_rows(prompt, [kept_rows(found.embedding) for found in features])
        mm_features = _mm_features(prompt, features)
        request, *forks = (
            _engine_request(
                f"{request_id}-{index}" if index else request_id,
                prompt,
                dataclasses.replace(sampling_params, seed=choice_seed(sampling_params.seed, index)),
                mm_features,
                salt,
                None if grammar is None else grammar.start(),
            )
            for index in range(options.n)
        )
        return PreparedRequest(
            request=request,
            forks=forks,
            options=options,
            receipts=_receipts(
                visuals,
                list(map(_receipt, images, features, (prompt.whole or prompt).num_tokens_of_images)),
            ),
            fingerprint=used_fingerprint,
            # an encoder with other weights may have answered
            answer_key=key if used_fingerprint == fingerprint else None,
            context=context,
        )

    def _media_context(self, messages: Sequence[ChatMessage]) -> MediaContext:
        alone = not self.prompt.family.counts_images or len(visuals_of(messages)) <= 1
        return MediaContext(alone, self.prompt.instruction(messages))

    def generate(self, prepared: PreparedRequest) -> AsyncGenerator[RequestOutput, None]:
        """Outputs with text and the index of their choice; the last of each choice has a finish reason. Leaving the
        iterator aborts what is not finished.
        """
        outputs = self._generate(prepared)
        if prepared.known_answer is not None:
            return outputs
        arrived_at = prepared.context.arrived_at
        return observed(outputs, prepared.request, arrived_at=arrived_at, num_answers=prepared.num_choices)

    async def _generate(self, prepared: PreparedRequest) -> AsyncGenerator[RequestOutput, None]:
        requests = (prepared.request, *prepared.forks)
        choices = {
            request.request_id: _Choice(index, self._detokenizer(prepared.options))
            for index, request in enumerate(requests)
        }
        started = time.perf_counter()
        first = True
        async with contextlib.aclosing(self._outputs(prepared)) as outputs:
            async for output in outputs:
                choice = choices.get(output.request_id)
                if choice is None:  # a stop string has ended it, the engine did not know yet
                    continue
                if output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                    raise UnavailableError(f"the request ended early: {output.finish_reason}", code="request_aborted")
                if first and output.token_ids:
                    if prepared.known_answer is None:
                        num_computed = prepared.num_prompt_tokens - output.num_cached_tokens
                        self.costs.note("prefill", num_computed, (time.perf_counter() - started) * 1000)
                    prepared.context.release("prompt_tokens")
                    first = False
                output = choice.add(output)
                if output.finish_reason is not None:
                    del choices[output.request_id]
                    if choice.detokenizer.stopped and choices:
                        self.engine.abort(output.request_id)
                    if self._answers is not None and prepared.answer_key is not None:
                        self._answers.put(prepared.answer_key, Answer(choice.token_ids, output.finish_reason))
                yield output
                if not choices:
                    return
        raise UnavailableError("the answer has no end", code="request_aborted")  # it must not look complete

    def cache_report(self) -> dict[str, Any]:
        """What this replica's caches hold and have saved, in JSON's types."""
        names = ("fovea_images", "fovea_encoder_seconds_saved", "fovea_embedding", "fovea_audits", "fovea_answer")
        counters = {name: value for name, value in metrics.snapshot().items() if name.startswith(names)}
        return self._cache.report() | {"counters": counters}

    async def check_encoder(self) -> dict[str, Any]:
        """What the encoder service says of itself now. Raises UnavailableError."""
        namespace = await self._features.ask_encoder()
        return {"device": namespace.device, "dtype": namespace.dtype, "numerics": namespace.numerics}

    async def check_cache(self) -> dict[str, Any]:
        """Where embeddings are kept. Raises UnavailableError if the shared tier is not asked at present."""
        await self._cache.tiers("ready")
        report = self._cache.report()
        shared = report["redis"]
        if shared is not None and shared.get("breaker") == "open":
            raise UnavailableError("Redis does not answer: embeddings are kept in each process only")
        return {"local": report["local"], "redis": None if shared is None else shared.get("address")}

    async def fingerprint(self) -> str:
        """Names everything an answer depends on besides the request."""
        return system_fingerprint(
            vision=await self._features.namespace(),
            language_weights=self._language_weights,
            mrope_rule=self._mrope_rule,
            decoder=self._decoder,
            versions=library_versions(),
        )

    def _detokenizer(self, options: GenerationOptions) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(
            self.prompt.tokenizer, options.stop, skip_special_tokens=options.skip_special_tokens
        )

    async def _outputs(self, prepared: PreparedRequest) -> AsyncGenerator[RequestOutput, None]:
        """From the engine, or the answer that is known."""
        if (answer := prepared.known_answer) is not None:
            yield RequestOutput(prepared.request.request_id, answer.token_ids, finish_reason=answer.finish_reason)
            return
        async with contextlib.aclosing(self.engine.generate(prepared.request, prepared.forks)) as outputs:
            while True:
                try:
                    async with prepared.context.limit():
                        output = await anext(outputs)
                except StopAsyncIteration:
                    return
                yield output

    async def _grammar(self, wanted: StructuredOutput | None) -> Grammar | None:
        """Compiled on a thread of its own, which leaves the event loop free and is busy with one grammar at a time."""
        if wanted is None:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._grammar_thread, self._grammars.compile, wanted)

    async def _answer_key(
        self,
        fingerprint: str,
        prompt: EngineInput,
        images: Sequence[ImageRequest],
        sampling_params: SamplingParams,
        options: GenerationOptions,
        salt: str,
    ) -> str | None:
        """None unless answers are kept and this one would be the same again."""
        if self._answers is None or sampling_params.temperature > 0:
            return None
        namespace = await self._features.namespace()
        return answer_key(
            fingerprint=fingerprint,
            prompt_token_ids=prompt.token_ids,
            sampling_params=sampling_params,
            stop=options.stop,
            salt=salt,
            image_keys=[
                f"{embedding_key(namespace, image.item)} {interval!r}"  # which positions follow from
                for image, interval in zip(images, prompt.intervals, strict=True)
            ],
            secrets=await self._answers.secrets([digest for image in images for digest in _deletable(image.item)]),
        )

    async def _known_answer(self, key: str | None) -> Answer | None:
        return None if self._answers is None or key is None else await self._answers.get(key)

    def num_kept_tokens(self, num_prompt_tokens: int) -> int:
        """How much of a prompt other prompts can share afterwards."""
        if not self._engine_config.enable_prefix_caching:
            return 0
        multiple = prefix_multiple(self._engine_config, exact=self._is_exact)
        return num_prompt_tokens // multiple * multiple

    def check_model(self, name: str) -> None:
        if name != self.model_name:
            raise ModelNotFoundError(
                f"Could not find the model {name[:128]!r}; this service serves {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def _sampling_params(self, options: GenerationOptions, num_positions: int) -> SamplingParams:
        room = self.max_model_len - num_positions
        if options.max_tokens is not None and options.max_tokens > room:
            raise InvalidRequestError(
                f"max_tokens is {options.max_tokens}, but after a prompt of {num_positions} tokens {room} fit into "
                f"{self.max_model_len} (engine.max_model_len)",
                param="max_tokens",
                code="context_length_exceeded",
            )
        names = {field.name for field in dataclasses.fields(SamplingParams)}
        asked = {name: value for name in names if (value := getattr(options, name, None)) is not None}
        params = SamplingParams(**{**self._defaults, "max_tokens": room, **asked})
        check_sampling_params(params, self.eos_token_ids, self._vocab_size)
        return params


@dataclass(slots=True)
class _Choice:
    """One of the answers of a request, on its way to text."""

    index: int
    detokenizer: IncrementalDetokenizer
    token_ids: list[int] = field(default_factory=list)

    def add(self, output: RequestOutput) -> RequestOutput:
        """The output with its text and index; a stop string may have finished it."""
        self.token_ids += output.token_ids
        text = self.detokenizer.add(output.token_ids)
        reason = FinishReason.STOP if self.detokenizer.stopped else output.finish_reason
        if reason is not None:
            text += self.detokenizer.flush()
        return RequestOutput(
            request_id=output.request_id,
            token_ids=output.token_ids,
            text=text,
            finish_reason=reason,
            num_cached_tokens=output.num_cached_tokens,
            logprobs=output.logprobs,
            index=self.index,
            stop_string=self.detokenizer.stop_string,
        )


def _deletable(item: MediaItem) -> list[str]:
    """The digests of the files it is made of, which may be deleted; frames of a video are none."""
    digests = images_in(item.mm_hash)
    return digests if len(digests) == item.params.frames else []


def choice_seed(seed: int | None, index: int) -> int | None:
    """The seed of choice `index`, as the signed 64-bit integer that a request for this choice alone would send."""
    return None if seed is None else (seed + index + 2**63) % 2**64 - 2**63


def position_rule(model: ModelConfig, config: Any) -> MropeRule:
    """The configured rule, else the one the checkpoint names, else that of the published weights."""
    rule = getattr(config, "mrope_rule", "qwen") if model.mrope_rule == "auto" else model.mrope_rule
    if rule not in get_args(MropeRule):
        raise ValueError(f"mrope_rule must be one of {list(get_args(MropeRule))}, not {rule!r}")
    return cast(MropeRule, rule)


def decoder_description(model: ModelConfig, device: torch.device, config: EngineConfig) -> str:
    """What the bits of a logit depend on besides weights and versions of libraries."""
    chunks = f", prefill chunks of {config.prefill_chunk_size}" if model.numerics == "exact" else ""
    reduction = token_reduction(model)
    kept = f", token reduction {reduction}" if reduction is not None else ""
    return f"{device_capability(device)}, arithmetic {ARITHMETIC_VERSION}{chunks}{kept}"


def token_reduction(model: ModelConfig) -> TokenReduction | None:
    """None as well where everything is kept, so that keys and bits are those without."""
    reduction = model.token_reduction
    return None if reduction is None or reduction.ratio == 1 else reduction


def library_versions() -> str:
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def generation_defaults(directory: Path) -> dict[str, Any]:
    """Sampling fields from the checkpoint's generation config; without one, OpenAI's default of temperature 1."""
    if not (directory / "generation_config.json").exists():
        return {"temperature": 1.0}
    config = GenerationConfig.from_pretrained(directory)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    defaults = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    if not config.do_sample:
        defaults["temperature"] = 0.0
    return {"temperature": 1.0, **defaults}


def end_tokens(directory: Path, config: Any) -> frozenset[int]:
    """The tokens that end an answer, from the generation config, else from the model's."""
    has_file = (directory / "generation_config.json").exists()
    source = GenerationConfig.from_pretrained(directory) if has_file else config.get_text_config()
    ids = source.eos_token_id
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])


def _mm_features(prompt: EngineInput, features: Sequence[ImageFeatures]) -> list[MultiModalFeature]:
    """One for each range of placeholders; an image whose tiles are parted by text has several."""
    parts = []
    for found, ranges, interval in zip(features, prompt.placeholders, prompt.intervals, strict=True):
        start = 0
        known_by = found.key
        if found.embedding.kept is not None:  # encoded again in `fast` numerics, others may have been chosen
            known_by += "#" + framed_digest(str(found.embedding.kept.tolist()))
        for position in ranges:
            rows = slice(start, start + position.length)
            key = known_by if len(ranges) == 1 else f"{known_by}#{start}"
            parts.append(MultiModalFeature(key, position, _part_of(found.embedding, rows), interval))
            start = rows.stop
    return parts


def _part_of(embedding: VisionEmbedding, rows: slice) -> VisionEmbedding:
    """Views, not copies."""
    tensors = {name: tensor[rows] for name, tensor in embedding.tensors.items()}
    return dataclasses.replace(embedding, tensors=tensors)


def _engine_request(
    request_id: str,
    prompt: EngineInput,
    sampling_params: SamplingParams,
    mm_features: list[MultiModalFeature],
    cache_salt: str,
    grammar: GrammarState | None = None,
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt.token_ids,
        positions=prompt.positions,
        next_position=prompt.next_position,
        sampling_params=sampling_params,
        mm_features=mm_features,
        cache_salt=cache_salt,
        grammar=grammar,
    )


def _cache_salt(tenant: str, salt: str) -> str:
    """What keeps the KV blocks and answers of tenants apart, and of the salts that a tenant's requests name."""
    return framed_digest(tenant, salt) if tenant or salt else ""


def kept_rows(embedding: VisionEmbedding) -> Tensor:
    """Of one that the spec has found to be reduced."""
    assert embedding.kept is not None
    return embedding.kept


def _receipts(visuals: Sequence[Visual], receipts: Sequence[ImageReceipt]) -> list[ImageReceipt]:
    """One for each image and clip, from those of all images and temporal grids."""
    remaining = iter(receipts)
    return [
        _clip_receipt(visual, list(islice(remaining, len(visual.grids))))
        if isinstance(visual, ClipRequest)
        else next(remaining)
        for visual in visuals
    ]


def _clip_receipt(clip: ClipRequest, grids: Sequence[ImageReceipt]) -> ImageReceipt:
    return ImageReceipt(
        id=clip.id,
        tokens=sum(grid.tokens for grid in grids),
        source=slowest([grid.source for grid in grids]),
        num_bytes=sum(grid.num_bytes for grid in grids),
        encode_ms=sum(grid.encode_ms for grid in grids),
        wait_ms=max(grid.wait_ms for grid in grids),
        frames=clip.num_frames,
        grids=len(grids),
        cached_grids=sum(grid.source != "encoder" for grid in grids),
        whole_tokens=sum(grid.whole_tokens for grid in grids),
        reduction=grids[0].reduction,
    )


def slowest(sources: Sequence[str]) -> str:
    return max(sources, key=_SOURCES.index)


def _receipt(image: ImageRequest, found: ImageFeatures, whole_tokens: int) -> ImageReceipt:
    embedding = found.embedding
    return ImageReceipt(
        id=image.item.mm_hash,
        tokens=embedding.num_tokens,
        source=found.source,
        num_bytes=embedding.num_bytes,
        encode_ms=embedding.encode_ms,
        wait_ms=found.wait_ms,
        whole_tokens=whole_tokens,
        reduction=_reduction_of(image),
    )


def _reduction_of(image: ImageRequest) -> str:
    return str(image.item.params.reduction or "")
