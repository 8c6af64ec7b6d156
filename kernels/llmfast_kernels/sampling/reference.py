"""Sampling in plain PyTorch, on any device: the results that the kernels must give."""

from __future__ import annotations

from typing import NamedTuple

import torch

FIXED_POINT = 2.0**40  # steps in which a probability is counted, relative to the largest
OK, NOT_FINITE, ALL_MASKED = 0, 1, 2  # values of Sampled.status


class Sampled(NamedTuple):
    """The chosen tokens, row by row; a field that was not asked for is None."""

    tokens: torch.Tensor  # int64 [B]; 0 where status is not OK
    status: torch.Tensor  # int32 [B]: OK, NOT_FINITE or ALL_MASKED
    logprobs: torch.Tensor | None = None  # [B], of tokens under the raw logits; NaN if not OK
    top_tokens: torch.Tensor | None = None  # int64 [B, n], most likely first
    top_logprobs: torch.Tensor | None = None  # [B, n]


def sample_tokens_reference(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    repetition_penalty: torch.Tensor | None = None,
    presence_penalty: torch.Tensor | None = None,
    frequency_penalty: torch.Tensor | None = None,
    prompt_seen: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    logprobs: int | None = None,
) -> Sampled:
    raw = logits if logits.dtype == torch.float64 else logits.float()
    scores = penalise(
        raw,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        prompt_seen,
        output_counts,
        bias,
    )
    if temperature is not None:
        divisor = _column(temperature, scores)
        scores = torch.where(divisor > 0, scores / torch.where(divisor > 0, divisor, 1.0), scores)
        # a NaN temperature makes every score NaN
        scores = torch.where(divisor.isnan(), divisor, scores)
    status = torch.full((len(raw),), OK, dtype=torch.int32, device=raw.device)
    status[(scores == -torch.inf).all(dim=-1)] = ALL_MASKED
    status[(scores.isnan() | (scores == torch.inf)).any(dim=-1)] = NOT_FINITE
    usable = torch.where((status == OK)[:, None], scores, 0.0)

    tokens = _first_largest(usable)
    if temperature is not None:
        assert seeds is not None and positions is not None  # op.py asks for them
        weights = kept_weights(usable, top_k, top_p, min_p)
        tokens = torch.where(temperature > 0, _sample(weights, seeds, positions), tokens)
    tokens = torch.where(status == OK, tokens, 0)
    if logprobs is None:
        return Sampled(tokens, status)

    failed = (status != OK)[:, None]
    all_logprobs = raw.log_softmax(dim=-1).masked_fill(failed, torch.nan)
    chosen = all_logprobs.gather(1, tokens[:, None])[:, 0]
    if logprobs == 0:
        return Sampled(tokens, status, chosen)
    order = raw.sort(dim=-1, descending=True, stable=True).indices[:, :logprobs]
    return Sampled(
        tokens,
        status,
        chosen,
        order.masked_fill(failed, 0),
        all_logprobs.gather(1, order),
    )


def penalise(
    scores: torch.Tensor,
    repetition_penalty: torch.Tensor | None,
    presence_penalty: torch.Tensor | None,
    frequency_penalty: torch.Tensor | None,
    prompt_seen: torch.Tensor | None,
    output_counts: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Apply the penalties and the bias, in this order."""
    in_output = None if output_counts is None else output_counts > 0
    if repetition_penalty is not None:
        seen = prompt_seen if in_output is None else in_output
        if prompt_seen is not None and in_output is not None:
            seen = prompt_seen | in_output
        if seen is not None:
            by = _column(repetition_penalty, scores)
            scores = torch.where(seen, torch.where(scores < 0, scores * by, scores / by), scores)
    if output_counts is not None and in_output is not None:
        if presence_penalty is not None:
            scores = scores - _column(presence_penalty, scores) * in_output.to(scores.dtype)
        if frequency_penalty is not None:
            scores = scores - _column(frequency_penalty, scores) * output_counts.to(scores.dtype)
    return scores if bias is None else scores + bias.to(scores.dtype)


def kept_weights(
    scores: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """Return each token's weight in the draw: int64 [B, V], proportional to its probability.

    Weights are integers, so sums are exact in any order. The largest score has weight 2**40, the
    others exp of their distance to it times that, cut to an integer. A token that a filter removes
    has weight 0.
    """
    n_vocab = scores.shape[-1]
    ratios = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    weights = (ratios * FIXED_POINT).long()
    # ascending and stable: of equal scores the later index ranks higher, as in transformers
    ascending, order = scores.sort(dim=-1, stable=True)
    if top_k is not None:
        k = torch.where((top_k > 0) & (top_k < n_vocab), top_k, n_vocab).long()
        kth = ascending.gather(1, (n_vocab - k)[:, None])
        weights = torch.where(scores < kth, 0, weights)
    if top_p is not None:
        by_rank = weights.gather(1, order)
        up_to = by_rank.cumsum(dim=-1)
        above = up_to[:, -1:] - up_to  # the weight of all tokens that rank higher
        top_p = torch.where(top_p > 0, top_p, 0)  # NaN is 0
        target = (top_p.double() * up_to[:, -1].double()).long().clamp(min=1)
        keep = (above < target[:, None]) | (top_p >= 1)[:, None]
        weights = torch.where(torch.zeros_like(keep).scatter(1, order, keep), weights, 0)
    if min_p is not None:
        min_p = torch.where(min_p <= 1, min_p, 1)  # NaN is 1
        weights = torch.where(ratios < _column(min_p, ratios), 0, weights)
    return weights


def _sample(weights: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the token in whose share of the sum, in index order, the row's random number falls."""
    up_to = weights.cumsum(dim=-1)
    total = up_to[:, -1]
    # floor(total * u / 2**62) for a random u of 62 bits, in two halves that stay within 63 bits
    a, b = (word >> 1 for word in philox(seeds, positions))
    high, low = total >> 31, total & 0x7FFFFFFF
    drawn = high * a + ((high * b + low * a + ((low * b) >> 31)) >> 31)
    return (up_to <= drawn[:, None]).sum(dim=-1)


def philox(seeds: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first two words of ``tl.randint4x(seed, position)``, int64 in [0, 2**32).

    Paper: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), Philox-4x32-10.
    """
    word = 0xFFFFFFFF
    seeds, positions = seeds.long(), positions.long()
    k0, k1 = seeds & word, (seeds >> 32) & word
    c0, c1 = positions & word, (positions >> 32) & word
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high2, low2 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return c0, c1


def _multiply(x: torch.Tensor, by: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the high and the low 32 bits of the product of two 32-bit numbers, within int64."""
    low = x * (by & 0xFFFF)
    middle = x * (by >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def _first_largest(scores: torch.Tensor) -> torch.Tensor:
    """Return the argmax; of equal scores the lowest index, which torch.argmax does not promise."""
    return (scores == scores.amax(dim=-1, keepdim=True)).to(torch.uint8).argmax(dim=-1)


def _column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.to(like.dtype)[:, None]
