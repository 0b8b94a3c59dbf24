"""One request from messages to a stream of text: prompt, features, engine, detokenizer. No Ray, no FastAPI."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast, get_args

import torch
import transformers
from transformers import GenerationConfig

from common import metrics
from common.cache import EmbeddingCache
from common.checkpoint import LoadedHalf, checkpoint_directory, device_capability, load_geometry, load_half
from common.config import CacheConfig, ModelConfig
from common.embedding import VisionEmbedding
from common.errors import InvalidRequestError, ModelNotFoundError, UnavailableError
from common.families import MropeRule
from common.identity import system_fingerprint
from common.media import MediaParams
from common.media_store import MediaStore, open_media_store
from llm_service.answer_cache import Answer, AnswerCache, answer_key
from llm_service.chat import ChatMessage, images_of
from llm_service.config import EngineConfig
from llm_service.detokenizer import IncrementalDetokenizer, TokenTexts
from llm_service.engine.async_engine import AsyncLLMEngine
from llm_service.engine.engine import LLMEngine, check_sampling_params
from llm_service.engine.request import FinishReason, MultiModalFeature, Request, RequestOutput, SamplingParams
from llm_service.engine.structured_output import Grammar, GrammarCompiler, GrammarState, StructuredOutput
from llm_service.features import EncoderClient, FeatureSource, ImageFeatures, ImageRequest
from llm_service.media import MediaContext, MediaLibrary
from llm_service.observation import observed
from llm_service.prompt import EngineInput, PromptProcessor


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


@dataclass(frozen=True, slots=True)
class ImageReceipt:
    """What one image of a request cost: its digest, tokens, where its embedding came from, and the wait.

    `source` is `local`, `redis`, `encoder`, or `answer` when the whole answer was known and no embedding was needed.
    `encode_ms` is what encoding it took, be it now or long ago.
    """

    id: str
    tokens: int
    source: str
    num_bytes: int = 0
    encode_ms: float = 0.0
    wait_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that has passed every check and has its embeddings; only generation is left.

    With `known_answer` it has no embeddings and needs none. `answer_key` is None if the answer is not one to keep.
    `forks` are the further answers to the same prompt.
    """

    request: Request
    stop: tuple[str, ...]
    receipts: list[ImageReceipt]
    fingerprint: str
    answer_key: str | None = None
    known_answer: Answer | None = None
    forks: Sequence[Request] = ()

    @property
    def num_prompt_tokens(self) -> int:
        return self.request.num_prompt_tokens

    @property
    def num_image_tokens(self) -> int:
        return sum(receipt.tokens for receipt in self.receipts)


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
    ) -> None:
        """Without a `media_store`, managed media stay in this process. The default `decoder` is the language half."""
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
        self.limits = model.limits
        if not geometry.max_pixels and (model.min_pixels or model.max_pixels):
            raise ValueError(
                f"model.min_pixels and model.max_pixels have no effect on {decoder.half.config.model_type!r}, whose "
                "images all get the sizes of its preprocessor_config.json"
            )
        params = MediaParams(
            min_pixels=model.min_pixels or geometry.min_pixels, max_pixels=model.max_pixels or geometry.max_pixels
        )
        self._mrope_rule = mrope_rule
        self._decoder = decoder_description(model, decoder.half.device, engine_config)
        self._language_weights = decoder.half.digest
        self._prompt = PromptProcessor(directory, decoder.half.config, geometry, mrope_rule, self.max_model_len)
        self.token_texts = TokenTexts(self._prompt.tokenizer)
        self._grammars = GrammarCompiler(
            self._prompt.tokenizer, vocab_size=decoder.vocab_size, eos_token_ids=self.eos_token_ids
        )
        self._grammar_thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        store = media_store if media_store is not None else open_media_store(CacheConfig())
        self._features = FeatureSource(encoder, cache, geometry, audit_fraction, store.quarantine)
        self._cache = cache
        self._answers = answers
        self.media = MediaLibrary(store, self._features, cache, geometry, params, model.limits, answers)
        self._defaults = generation_defaults(directory)
        self.engine = decoder.engine
        self.engine.start()

    async def prepare(
        self, messages: Sequence[ChatMessage], options: GenerationOptions, request_id: str
    ) -> PreparedRequest:
        """Everything before generation. All limits are checked before any image is sent to be encoded."""
        images = await self.media.resolve(images_of(messages), self._media_context(messages))
        prompt = self._prompt(messages, [image.grid_thw for image in images])
        sampling_params = self._sampling_params(options, len(prompt.token_ids))
        grammar = await self._grammar(options.structured_output)
        fingerprint = await self.fingerprint()
        key = None
        if options.n == 1 and grammar is None and options.logprobs is None:
            key = await self._answer_key(fingerprint, prompt, images, sampling_params, options.stop)
        if (answer := await self._known_answer(key)) is not None:
            receipts = [
                ImageReceipt(image.item.mm_hash, num_tokens, "answer")
                for image, num_tokens in zip(images, prompt.num_tokens_of_images, strict=True)
            ]
            request = _engine_request(request_id, prompt, sampling_params, [])  # the engine never sees it
            return PreparedRequest(request, options.stop, receipts, fingerprint, known_answer=answer)
        features = await self._features.get_many(images)
        self.media.pin_again(images, features)
        used_fingerprint = await self.fingerprint()
        mm_features = _mm_features(prompt, features)
        request, *forks = (
            _engine_request(
                f"{request_id}-{index}" if index else request_id,
                prompt,
                dataclasses.replace(sampling_params, seed=choice_seed(sampling_params.seed, index)),
                mm_features,
                None if grammar is None else grammar.start(),
            )
            for index in range(options.n)
        )
        return PreparedRequest(
            request=request,
            forks=forks,
            stop=options.stop,
            receipts=[_receipt(image, found) for image, found in zip(images, features, strict=True)],
            fingerprint=used_fingerprint,
            # an encoder with other weights may have answered
            answer_key=key if used_fingerprint == fingerprint else None,
        )

    def _media_context(self, messages: Sequence[ChatMessage]) -> MediaContext:
        alone = not self._prompt.family.counts_images or len(images_of(messages)) <= 1
        return MediaContext(alone, self._prompt.instruction(messages))

    def generate(self, prepared: PreparedRequest) -> AsyncGenerator[RequestOutput, None]:
        """Outputs with text and the index of their choice; the last of each choice has a finish reason. Leaving the
        iterator aborts what is not finished.
        """
        outputs = self._generate(prepared)
        return outputs if prepared.known_answer is not None else observed(outputs, prepared.request)

    async def _generate(self, prepared: PreparedRequest) -> AsyncGenerator[RequestOutput, None]:
        requests = (prepared.request, *prepared.forks)
        choices = {
            request.request_id: _Choice(index, IncrementalDetokenizer(self._prompt.tokenizer, prepared.stop))
            for index, request in enumerate(requests)
        }
        async with contextlib.aclosing(self._outputs(prepared)) as outputs:
            async for output in outputs:
                choice = choices.get(output.request_id)
                if choice is None:  # a stop string has ended it, the engine did not know yet
                    continue
                if output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                    raise UnavailableError(f"the request ended early: {output.finish_reason}", code="request_aborted")
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

    def cache_report(self) -> dict[str, Any]:
        """What this replica's caches hold and have saved, in JSON's types."""
        names = ("fovea_images", "fovea_encoder_seconds_saved", "fovea_embedding", "fovea_audits", "fovea_answer")
        counters = {name: value for name, value in metrics.snapshot().items() if name.startswith(names)}
        return self._cache.report() | {"counters": counters}

    async def fingerprint(self) -> str:
        """Names everything an answer depends on besides the request."""
        return system_fingerprint(
            vision=await self._features.namespace(),
            language_weights=self._language_weights,
            mrope_rule=self._mrope_rule,
            decoder=self._decoder,
            versions=library_versions(),
        )

    async def _outputs(self, prepared: PreparedRequest) -> AsyncGenerator[RequestOutput, None]:
        """From the engine, or the answer that is known."""
        if (answer := prepared.known_answer) is not None:
            yield RequestOutput(prepared.request.request_id, answer.token_ids, finish_reason=answer.finish_reason)
            return
        async with contextlib.aclosing(self.engine.generate(prepared.request, prepared.forks)) as outputs:
            async for output in outputs:
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
        stop: Sequence[str],
    ) -> str | None:
        """None unless answers are kept and this one would be the same again."""
        if self._answers is None or sampling_params.temperature > 0:
            return None
        namespace = await self._features.namespace()
        return answer_key(
            fingerprint=fingerprint,
            prompt_token_ids=prompt.token_ids,
            sampling_params=sampling_params,
            stop=stop,
            image_keys=[namespace.key(image.item.mm_hash, str(image.item.params)) for image in images],
            image_secrets=await self._answers.image_secrets([image.item.mm_hash for image in images]),
        )

    async def _known_answer(self, key: str | None) -> Answer | None:
        return None if self._answers is None or key is None else await self._answers.get(key)

    def check_model(self, name: str) -> None:
        if name != self.model_name:
            raise ModelNotFoundError(
                f"Could not find the model {name!r}; this service serves {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def _sampling_params(self, options: GenerationOptions, num_prompt_tokens: int) -> SamplingParams:
        room = self.max_model_len - num_prompt_tokens
        if options.max_tokens is not None and options.max_tokens > room:
            raise InvalidRequestError(
                f"max_tokens is {options.max_tokens}, but after a prompt of {num_prompt_tokens} tokens {room} fit into "
                f"{self.max_model_len} (engine.max_model_len)",
                param="max_tokens",
                code="context_length_exceeded",
            )
        names = {field.name for field in dataclasses.fields(SamplingParams)}
        asked = {name: value for name in names if (value := getattr(options, name)) is not None}
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
        if self.detokenizer.stopped:
            output = dataclasses.replace(output, finish_reason=FinishReason.STOP)
        elif output.finish_reason is not None:
            text += self.detokenizer.flush()
        return dataclasses.replace(output, text=text, index=self.index)


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
    """What the bits of a logit depend on besides weights and versions."""
    chunks = f", prefill chunks of {config.prefill_chunk_size}" if model.numerics == "exact" else ""
    return f"{device_capability(device)}{chunks}"


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
    for found, ranges in zip(features, prompt.placeholders, strict=True):
        start = 0
        for position in ranges:
            rows = slice(start, start + position.length)
            key = found.key if len(ranges) == 1 else f"{found.key}#{start}"
            parts.append(MultiModalFeature(key, position, _part_of(found.embedding, rows)))
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
    grammar: GrammarState | None = None,
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt.token_ids,
        positions=prompt.positions,
        next_position=prompt.next_position,
        sampling_params=sampling_params,
        mm_features=mm_features,
        grammar=grammar,
    )


def _receipt(image: ImageRequest, found: ImageFeatures) -> ImageReceipt:
    embedding = found.embedding
    return ImageReceipt(
        image.item.mm_hash, embedding.num_tokens, found.source, embedding.num_bytes, embedding.encode_ms, found.wait_ms
    )
