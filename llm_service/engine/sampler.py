"""Logits to token ids. Greedy is exact; a drawn token depends on its own logits, parameters and seed only."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from llm_service.engine.request import Request, SamplingParams

MIN_TEMPERATURE = 1e-5  # below it a distribution is its argmax, and float32 soon cannot divide by it


class Sampler:
    """Every row is treated alone, so company cannot change it."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self.eos_token_ids = eos_token_ids

    @torch.inference_mode()
    def sample(self, logits_BV: Tensor, requests: Sequence[Request]) -> list[int | None]:
        """The next token of each request; None where the logits are not finite and say nothing."""
        if not requests:
            return []
        maxima, argmax = logits_BV.max(dim=-1)
        rows = zip(logits_BV, maxima.tolist(), argmax.tolist(), requests, strict=True)
        return [self._next_token(*row) for row in rows]

    def _next_token(self, logits_V: Tensor, maximum: float, argmax: int, request: Request) -> int | None:
        if not math.isfinite(maximum):  # a NaN anywhere is the maximum
            return None
        params = request.sampling_params
        greedy = params.temperature < MIN_TEMPERATURE
        end_token_ids = params.end_token_ids(self.eos_token_ids)
        if len(request.output_token_ids) < params.min_tokens and end_token_ids:
            logits_V = logits_V.clone()
            logits_V[list(end_token_ids)] = -math.inf
        elif greedy and not _has_penalties(params):
            return argmax
        logits_V = penalize(logits_V, request)
        if greedy:
            return int(logits_V.argmax())
        probs_V = distribution(logits_V, params)
        if request.generator is None:
            request.generator = _generator(params.seed, logits_V.device)
        return int(torch.multinomial(probs_V, 1, generator=request.generator))


def penalize(logits_V: Tensor, request: Request) -> Tensor:
    """Repetition penalty as transformers' RepetitionPenaltyLogitsProcessor, over prompt and answer: positive logits
    are divided, negative ones multiplied. Frequency and presence penalties as OpenAI's API reference, over the answer:
    `logit -= count * frequency_penalty + (count > 0) * presence_penalty`.
    """
    params = request.sampling_params
    if params.repetition_penalty != 1:
        seen = torch.tensor(list(set(request.token_ids(0, request.num_tokens))), device=logits_V.device)
        scores = logits_V[seen]
        scores = torch.where(scores < 0, scores * params.repetition_penalty, scores / params.repetition_penalty)
        logits_V = logits_V.index_copy(0, seen, scores)
    if (params.presence_penalty or params.frequency_penalty) and request.output_token_ids:
        counter = Counter(request.output_token_ids)
        seen = torch.tensor(list(counter), device=logits_V.device)
        counts = torch.tensor(list(counter.values()), device=logits_V.device)
        logits_V = logits_V.index_add(0, seen, -(counts * params.frequency_penalty + params.presence_penalty))
    return logits_V


def distribution(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities after temperature, top_k, top_p and min_p, in the order of transformers' `generate()`."""
    # Relative to the maximum no temperature can overflow.
    logits_V = (logits_V - logits_V.max()) / params.temperature
    if 0 < params.top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(params.top_k).values[-1], -math.inf)
    if params.top_p < 1:
        ascending, indices = logits_V.sort()
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - params.top_p
        outside[-1] = False  # the likeliest token always stays
        logits_V = logits_V.index_fill(0, indices[outside], -math.inf)
    if params.min_p > 0:
        probs_V = logits_V.softmax(-1)
        logits_V = logits_V.masked_fill(probs_V < params.min_p * probs_V.max(), -math.inf)
    return logits_V.softmax(-1)


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _generator(seed: int | None, device: torch.device) -> Generator:
    generator = Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
