"""Scores from logits (penalties, bias, temperature), equal to the reference's bit for bit.

Also the weights that scores have in the draw.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import FIXED_POINT

_FIXED_POINT = tl.constexpr(FIXED_POINT)


@triton.jit
def _penalised(inputs, row, cols, n_vocab):
    mask = cols < n_vocab
    logits = inputs.logits_ptr + row * inputs.stride_logits + cols
    z = tl.load(logits, mask=mask, other=0.0).to(tl.float32)
    if inputs.counts_ptr is not None:
        counts = tl.load(inputs.counts_ptr + row * inputs.stride_counts + cols, mask=mask, other=0)
    if inputs.repetition_ptr is not None and (
        inputs.seen_ptr is not None or inputs.counts_ptr is not None
    ):
        by = tl.load(inputs.repetition_ptr + row)
        seen = cols < 0
        if inputs.seen_ptr is not None:
            in_prompt = inputs.seen_ptr + row * inputs.stride_seen + cols
            seen = tl.load(in_prompt, mask=mask, other=0) != 0
        if inputs.counts_ptr is not None:
            seen = seen | (counts > 0)
        z = tl.where(seen, tl.where(z < 0, z * by, tl.div_rn(z, by + tl.zeros_like(z))), z)
    if inputs.counts_ptr is not None and inputs.presence_ptr is not None:
        z = z - tl.load(inputs.presence_ptr + row) * (counts > 0).to(tl.float32)
    if inputs.counts_ptr is not None and inputs.frequency_ptr is not None:
        z = z - tl.load(inputs.frequency_ptr + row) * counts.to(tl.float32)
    if inputs.bias_ptr is not None:
        bias = inputs.bias_ptr + row * inputs.stride_bias + cols
        z = z + tl.load(bias, mask=mask, other=0.0)
    return z


@triton.jit
def penalised_logits(inputs, row, cols, n_vocab):
    """Return a row's scores before temperature: +inf for NaN, -inf past the row's end.

    ``inputs``: ScoreInputs.
    """
    z = _penalised(inputs, row, cols, n_vocab)
    z = tl.where(z == z, z, float("inf"))
    return tl.where(cols < n_vocab, z, float("-inf"))


@triton.jit
def scaled_by_temperature(z, temperature_ptr, row):
    """Divide by the row's temperature: +inf for NaN; -inf stays."""
    scores = z
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
        greedy = temperature <= 0.0  # a NaN temperature is not greedy: it makes every score NaN
        divisor = tl.where(greedy, 1.0, temperature) + tl.zeros_like(z)
        scores = tl.where(greedy, z, tl.div_rn(z, divisor))
        scores = tl.where(scores == scores, scores, float("inf"))
        scores = tl.where(z == float("-inf"), z, scores)
    return tl.where(scores == 0.0, 0.0, scores)  # -0.0 equals 0.0 and must have its sort key


@triton.jit
def scores_to_sample(inputs, row, cols, n_vocab):
    """Return the scores of a row that is sampled, -inf past the row's end.

    They equal scaled_by_temperature of penalised_logits. All are below +inf in such a row, so
    none has to be checked. ``inputs``: ScoreInputs.
    """
    z = _penalised(inputs, row, cols, n_vocab)
    scores = tl.div_rn(z, tl.load(inputs.temperature_ptr + row) + tl.zeros_like(z))
    return tl.where(cols < n_vocab, scores + 0.0, float("-inf"))  # + 0.0 turns -0.0 into 0.0


@triton.jit
def ratio_and_weight(z, z_max):
    """Return the probability relative to the largest score's, and the score's weight."""
    ratio = tl.exp(z - z_max)
    return ratio, weight_of(ratio)


@triton.jit
def weight_of(ratio):
    """Return the weight in the draw, int64: whole steps of 2**-40 of the largest."""
    return (ratio * _FIXED_POINT).to(tl.int64)
