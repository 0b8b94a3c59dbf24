"""Logits to token ids. Greedy is exact; a drawn token depends on its own logits, parameters, seed and place only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.device import to_device
from llm_service.engine.request import Request, SamplingParams, TokenLogprobs
from llm_service.engine.structured_output import GrammarState, TokenMasks, forbidden

# B: rows of all requests, R: those that are drawn, P: those with penalties, L: those with logprobs; V: vocabulary;
# K: the most top tokens that a request asks for.

MIN_TEMPERATURE = 1e-5  # below it a distribution is its argmax, and float32 soon cannot divide by it
MAX_TEMPERATURE = 1e30  # above it a distribution is uniform, and float32 soon has no number for it
WEIGHT_BITS = 44  # of the likeliest token's weight; the sum of 2**18 tokens' fits into 63 bits


class Sampler:
    """Every row is computed alone, so company cannot change it; all rows are computed at once.

    A token is drawn by inverting the cumulative distribution at one number, uniform in [0, 1), that is a function of
    the request's seed and of how many tokens it has. The distribution is in integers, whose sums do not depend on the
    order in which a device adds them: a likelihood of less than 2**-44 of the greatest counts as none.
    """

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self.eos_token_ids = eos_token_ids
        self._plan = _Plan([], torch.device("cpu"))
        self._counts = _TokenCounts()
        self._masks = TokenMasks()

    @torch.inference_mode()
    def sample(self, logits_BV: Tensor, requests: Sequence[Request]) -> "SampledTokens":
        """The next token, counted as pending, of each request; still on the device. The logits are not changed."""
        if self._plan.requests != requests or self._plan.device != logits_BV.device:
            self._plan = _Plan(list(requests), logits_BV.device)
        plan = self._plan
        if not requests:
            return SampledTokens(torch.empty(0, dtype=torch.long, device=logits_BV.device))
        if not plan.is_greedy:
            logits_BV = logits_BV.float()
        maxima_B, greedy_B = logits_BV.max(dim=-1)
        edited_BV = self._edit(logits_BV)
        token_ids_B = greedy_B if edited_BV is logits_BV else edited_BV.argmax(-1)
        if plan.drawn is not None:
            drawn_RV = edited_BV if len(plan.drawn.rows) == len(requests) else edited_BV[plan.drawn.index]
            token_ids_R = draw(warp(drawn_RV, plan.drawn), to_device(logits_BV.device, plan.drawn.uniforms(requests)))
            token_ids_B = token_ids_B.index_copy(0, plan.drawn.index, token_ids_R)
        if forced := plan.forced_tokens():
            rows, token_ids = to_device(logits_BV.device, forced).T
            token_ids_B = token_ids_B.index_copy(0, rows, token_ids)
        # a NaN anywhere is the maximum
        token_ids_B = token_ids_B.where(maxima_B.isfinite(), -1)
        return SampledTokens(
            token_ids_B, _Logprobs.of(logits_BV, token_ids_B, plan.logprobs) if plan.logprobs else None
        )

    def _edit(self, logits_BV: Tensor) -> Tensor:
        """Logits with penalties, bias and what must not be chosen; the same tensor if there is nothing of it."""
        plan = self._plan
        early_ends = plan.early_ends(self.eos_token_ids)
        if plan.penalized is None and plan.bias is None and not plan.constrained and not early_ends:
            return logits_BV
        logits_BV = logits_BV.clone()
        if plan.penalized is not None:
            seen_PV, counts_PV = self._counts.update(plan.penalized.requests, logits_BV)
            index = plan.penalized.index
            logits_BV[index] = penalize(logits_BV[index], plan.penalized, seen_PV, counts_PV)
        if plan.bias is not None:
            rows, token_ids, biases = plan.bias
            logits_BV.index_put_((rows, token_ids), biases, accumulate=True)
        if early_ends:
            rows, token_ids = to_device(logits_BV.device, early_ends).T
            logits_BV.index_put_((rows, token_ids), torch.full((), -math.inf, device=logits_BV.device))
        if plan.constrained:
            index = to_device(logits_BV.device, list(plan.constrained))
            masks = self._masks.compute(list(plan.constrained.values()), logits_BV.shape[1])
            outside = forbidden(to_device(logits_BV.device, masks), logits_BV.shape[1])
            logits_BV[index] = logits_BV[index].masked_fill(outside, -math.inf)
        return logits_BV


class SampledTokens:
    """The tokens of one step, on their way from the device; reading waits for them, and for nothing launched later."""

    def __init__(self, token_ids_B: Tensor, logprobs: "_Logprobs | None" = None) -> None:
        self.token_ids_B = token_ids_B  # -1 where the logits are not finite and say nothing
        self._logprobs = logprobs
        self._token_ids = token_ids_B.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.current_stream().record_event() if token_ids_B.is_cuda else None

    def token_ids(self) -> list[int | None]:
        """None where nothing could be chosen."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [None if token_id < 0 else token_id for token_id in self._token_ids.tolist()]

    def logprobs(self) -> list[TokenLogprobs | None] | None:
        """After `token_ids()`; None if no request asked for it."""
        return None if self._logprobs is None else self._logprobs.read(len(self.token_ids_B))


@dataclass(frozen=True, slots=True)
class _Logprobs:
    """`table` `[L, 1 + 2K]` float64 on the host, so that one transfer has all: the chosen token's, the top values,
    their ids."""

    counts: dict[int, int]  # row -> how many top tokens it wants
    table: Tensor

    @classmethod
    def of(cls, logits_BV: Tensor, token_ids_B: Tensor, counts: dict[int, int]) -> "_Logprobs":
        index = to_device(logits_BV.device, list(counts))
        logprobs_LV = logits_BV[index].log_softmax(-1)
        chosen_L1 = logprobs_LV.gather(-1, token_ids_B[index].clamp(min=0)[:, None])
        values_LK, ids_LK = logprobs_LV.topk(min(max(counts.values()), logits_BV.shape[-1]))
        table = torch.cat([chosen_L1.double(), values_LK.double(), ids_LK.double()], dim=-1)
        return cls(counts, table.to("cpu", non_blocking=True))

    def read(self, num_rows: int) -> list[TokenLogprobs | None]:
        found: list[TokenLogprobs | None] = [None] * num_rows
        num_top = self.table.shape[1] // 2
        for (row, count), (chosen, *top) in zip(self.counts.items(), self.table.tolist(), strict=True):
            pairs = zip(map(int, top[num_top:]), top[:num_top], strict=True)
            found[row] = TokenLogprobs(chosen, list(pairs)[:count])
        return found


class DrawnRows:
    """The rows that are drawn, and their parameters as columns `[R, 1]` on the device."""

    def __init__(self, rows: list[int], params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device):
        self.rows = rows
        self.index = to_device(device, rows)
        self.has_top_p = any(one.top_p < 1 for one in params)
        self.has_min_p = any(one.min_p > 0 for one in params)
        self.max_top_k = max(one.top_k for one in params)
        self.temperature = _column(device, [min(one.temperature, MAX_TEMPERATURE) for one in params])
        self.top_k = to_device(device, [one.top_k for one in params])[:, None]
        self.top_p = _column(device, [one.top_p for one in params], torch.float64)
        self.min_p = _column(device, [one.min_p for one in params])
        self._keys = _mix(np.array([seed % 2**64 for seed in seeds], np.uint64))

    def uniforms(self, requests: Sequence[Request]) -> "np.ndarray[Any, np.dtype[np.floating[Any]]]":
        """SplitMix64 (Steele, Lea and Flood, 2014): the seed, mixed, begins a sequence; tokens count its members."""
        counters = np.array([requests[row].num_output_tokens for row in self.rows], np.uint64)
        return (_mix(self._keys + counters * _GOLDEN_GAMMA) >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True, slots=True)
class PenalizedRows:
    """The rows with penalties, which are columns `[P, 1]` on the device."""

    requests: list[Request]
    index: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor

    @classmethod
    def of(cls, requests: list[Request], device: torch.device) -> "PenalizedRows | None":
        rows = [row for row, request in enumerate(requests) if request.sampling_params.has_penalties]
        if not rows:
            return None
        params = [requests[row].sampling_params for row in rows]
        return cls(
            [requests[row] for row in rows],
            to_device(device, rows),
            _column(device, [one.repetition_penalty for one in params]),
            _column(device, [one.presence_penalty for one in params]),
            _column(device, [one.frequency_penalty for one in params]),
        )


class _Plan:
    """What is known about a batch before its logits; it stays as long as the same requests come."""

    def __init__(self, requests: list[Request], device: torch.device) -> None:
        self.requests = requests
        self.device = device
        params = [request.sampling_params for request in requests]
        self.penalized = PenalizedRows.of(requests, device)
        self.logprobs = {row: one.logprobs for row, one in enumerate(params) if one.logprobs is not None}
        self.constrained: dict[int, GrammarState] = {
            row: request.grammar for row, request in enumerate(requests) if request.grammar is not None
        }
        self._forced = [row for row, one in enumerate(params) if one.forced_token_ids]
        self._with_min_tokens = [row for row, one in enumerate(params) if one.min_tokens]
        drawn = [row for row, one in enumerate(params) if one.temperature >= MIN_TEMPERATURE]
        self.drawn: DrawnRows | None = None
        if drawn:
            seeds = [requests[row].seed for row in drawn]
            self.drawn = DrawnRows(drawn, [params[row] for row in drawn], seeds, device)
        self.bias: tuple[Tensor, Tensor, Tensor] | None = None
        biases = [(row, token, bias) for row, one in enumerate(params) for token, bias in one.logit_bias]
        if biases:
            rows, token_ids, values = zip(*biases, strict=True)
            self.bias = to_device(device, rows), to_device(device, token_ids), to_device(device, values, torch.float32)
        edited = self.penalized or self.bias or self.constrained or self._with_min_tokens
        self.is_greedy = not (edited or drawn or self.logprobs)

    def forced_tokens(self) -> list[tuple[int, int]]:
        """Pairs of row and the token that comes next whatever the logits say."""
        found = []
        for row in self._forced:
            request = self.requests[row]
            place, forced = request.num_output_tokens - 1, request.sampling_params.forced_token_ids
            if place < len(forced):
                found.append((row, forced[place]))
        return found

    def early_ends(self, eos_token_ids: frozenset[int]) -> list[tuple[int, int]]:
        """Pairs of row and token that would end an answer before its `min_tokens`."""
        pairs = []
        for row in self._with_min_tokens:
            request = self.requests[row]
            if request.num_output_tokens <= request.sampling_params.min_tokens:
                pairs += [(row, token) for token in request.sampling_params.end_token_ids(eos_token_ids)]
        return pairs


class _TokenCounts:
    """Which tokens the penalized requests have seen, and how often they said them; brought up to date step by step."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._num_counted: list[int] = []
        self._seen_PV = self._counts_PV = torch.empty(0, 0)

    def update(self, requests: list[Request], logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """bool and float32 `[P, V]`: in prompt or answer; how often in the answer."""
        if requests != self._requests:
            self._take_over(requests, logits_BV)
        seen, said = [], []
        for row, request in enumerate(requests):
            start, self._num_counted[row] = self._num_counted[row], request.num_tokens
            seen += [(row, token) for token in request.token_ids(start, request.num_tokens)]
            said_from = max(start, request.num_prompt_tokens)
            said += [(row, token) for token in request.token_ids(said_from, request.num_tokens)]
        if seen:
            rows, token_ids = to_device(logits_BV.device, seen).T
            self._seen_PV.index_put_((rows, token_ids), torch.ones((), dtype=torch.bool, device=logits_BV.device))
        if said:
            rows, token_ids = to_device(logits_BV.device, said).T
            self._counts_PV.index_put_((rows, token_ids), torch.ones((), device=logits_BV.device), accumulate=True)
        return self._seen_PV, self._counts_PV

    def _take_over(self, requests: list[Request], logits_BV: Tensor) -> None:
        """Keeps what is known about requests that are still there."""
        known = {id(request): row for row, request in enumerate(self._requests)}
        old = [known.get(id(request)) for request in requests]
        shape = len(requests), logits_BV.shape[1]
        seen_PV = torch.zeros(shape, dtype=torch.bool, device=logits_BV.device)
        counts_PV = torch.zeros(shape, device=logits_BV.device)
        kept = [(new, row) for new, row in enumerate(old) if row is not None]
        if kept:
            targets, sources = to_device(logits_BV.device, kept).T
            seen_PV[targets] = self._seen_PV[sources]
            counts_PV[targets] = self._counts_PV[sources]
        self._num_counted = [0 if row is None else self._num_counted[row] for row in old]
        self._requests, self._seen_PV, self._counts_PV = requests, seen_PV, counts_PV


def penalize(logits_PV: Tensor, rows: PenalizedRows, seen_PV: Tensor, counts_PV: Tensor) -> Tensor:
    """Repetition penalty as transformers' RepetitionPenaltyLogitsProcessor, over prompt and answer: positive logits
    are divided, negative ones multiplied. Frequency and presence penalties as OpenAI's API reference, over the answer:
    `logit -= count * frequency_penalty + (count > 0) * presence_penalty`.
    """
    scores_PV = torch.where(logits_PV < 0, logits_PV * rows.repetition, logits_PV / rows.repetition)
    logits_PV = torch.where(seen_PV, scores_PV, logits_PV)
    return logits_PV - (counts_PV * rows.frequency + (counts_PV > 0) * rows.presence)


def warp(logits_RV: Tensor, rows: DrawnRows) -> Tensor:
    """Logits after temperature, top_k, top_p and min_p, in the order of transformers' `generate()`; the greatest is 0
    and those of tokens that must not be drawn are -inf.
    """
    # Relative to the maximum no temperature can overflow.
    logits_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)) / rows.temperature
    vocab_size = logits_RV.shape[-1]
    if rows.max_top_k:
        descending = logits_RV.topk(min(rows.max_top_k, vocab_size)).values
        last = descending.gather(-1, rows.top_k.clamp(1, vocab_size) - 1)
        logits_RV = logits_RV.masked_fill((logits_RV < last) & (rows.top_k > 0), -math.inf)
    if rows.has_top_p:
        ascending, indices = logits_RV.sort(dim=-1, stable=True)
        cumulative = _weights(ascending).cumsum(-1)
        outside = (cumulative <= ((1 - rows.top_p) * cumulative[:, -1:]).long()) & (rows.top_p < 1)
        outside[:, -1] = False  # the likeliest token always stays
        logits_RV = logits_RV.masked_fill(outside.scatter(-1, indices, outside), -math.inf)
    if rows.has_min_p:
        logits_RV = logits_RV.masked_fill(logits_RV.exp() < rows.min_p, -math.inf)
    return logits_RV


def draw(logits_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """The tokens at which the cumulative distribution passes `uniforms_R`; the greatest logit of a row is 0."""
    cumulative_RV = _weights(logits_RV).cumsum(-1)
    totals_R = cumulative_RV[:, -1]
    targets_R = (uniforms_R * totals_R).long().minimum(totals_R - 1)  # rounded up, a product could be the total
    return torch.searchsorted(cumulative_RV, targets_R[:, None], right=True)[:, 0]


def _weights(logits: Tensor) -> Tensor:
    """int64 likelihoods relative to a logit of 0. One by one, so that no sum of floats depends on its company."""
    return (logits.exp() * 2.0**WEIGHT_BITS).long()


_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: "np.ndarray[Any, np.dtype[np.uint64]]") -> "np.ndarray[Any, np.dtype[np.uint64]]":
    """SplitMix64's output function."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _column(device: torch.device, values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return to_device(device, values, dtype)[:, None]
