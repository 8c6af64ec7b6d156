"""Scores from logits: penalties, bias and temperature, bit for bit the reference's."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _penalised(
    logits_ptr,  # [B, n_vocab]
    repetition_ptr,  # [B]; this and the next five: None if absent
    presence_ptr,  # [B]
    frequency_ptr,  # [B]
    seen_ptr,  # [B, n_vocab] of bytes
    counts_ptr,  # [B, n_vocab]
    bias_ptr,  # [B, n_vocab]
    stride_logits,
    stride_seen,
    stride_counts,
    stride_bias,
    row,
    cols,
    n_vocab,
):
    mask = cols < n_vocab
    z = tl.load(logits_ptr + row * stride_logits + cols, mask=mask, other=0.0).to(tl.float32)
    if counts_ptr is not None:
        counts = tl.load(counts_ptr + row * stride_counts + cols, mask=mask, other=0)
    if repetition_ptr is not None and (seen_ptr is not None or counts_ptr is not None):
        by = tl.load(repetition_ptr + row)
        seen = cols < 0
        if seen_ptr is not None:
            seen = tl.load(seen_ptr + row * stride_seen + cols, mask=mask, other=0) != 0
        if counts_ptr is not None:
            seen = seen | (counts > 0)
        z = tl.where(seen, tl.where(z < 0, z * by, tl.div_rn(z, by + tl.zeros_like(z))), z)
    if counts_ptr is not None and presence_ptr is not None:
        z = z - tl.load(presence_ptr + row) * (counts > 0).to(tl.float32)
    if counts_ptr is not None and frequency_ptr is not None:
        z = z - tl.load(frequency_ptr + row) * counts.to(tl.float32)
    if bias_ptr is not None:
        z = z + tl.load(bias_ptr + row * stride_bias + cols, mask=mask, other=0.0)
    return z


@triton.jit
def penalised(
    logits_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    seen_ptr,
    counts_ptr,
    bias_ptr,
    stride_logits,
    stride_seen,
    stride_counts,
    stride_bias,
    row,
    cols,
    n_vocab,
):
    """A row's scores before temperature: +inf for what is no number, -inf past the row's end."""
    z = _penalised(
        logits_ptr, repetition_ptr, presence_ptr, frequency_ptr, seen_ptr, counts_ptr, bias_ptr,
        stride_logits, stride_seen, stride_counts, stride_bias, row, cols, n_vocab,
    )  # fmt: skip
    z = tl.where(z == z, z, float("inf"))
    return tl.where(cols < n_vocab, z, float("-inf"))


@triton.jit
def heated(z, temperature_ptr, row):
    """The scores: divided by the temperature, +inf for what is no number; -inf stays."""
    scores = z
    if temperature_ptr is not None:
        heat = tl.load(temperature_ptr + row)
        greedy = heat <= 0.0  # NaN is not, and makes every score NaN
        scores = tl.where(greedy, z, tl.div_rn(z, tl.where(greedy, 1.0, heat) + tl.zeros_like(z)))
        scores = tl.where(scores == scores, scores, float("inf"))
        scores = tl.where(z == float("-inf"), z, scores)
    return tl.where(scores == 0.0, 0.0, scores)  # -0.0 equals 0.0, and must have its key


@triton.jit
def drawn(
    logits_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    seen_ptr,
    counts_ptr,
    bias_ptr,
    stride_logits,
    stride_seen,
    stride_counts,
    stride_bias,
    temperature_ptr,
    row,
    cols,
    n_vocab,
):
    """What heated gives of penalised, in a row that is drawn: all scores are less than +inf there,
    so that none need be looked at.
    """
    z = _penalised(
        logits_ptr, repetition_ptr, presence_ptr, frequency_ptr, seen_ptr, counts_ptr, bias_ptr,
        stride_logits, stride_seen, stride_counts, stride_bias, row, cols, n_vocab,
    )  # fmt: skip
    scores = tl.div_rn(z, tl.load(temperature_ptr + row) + tl.zeros_like(z))
    return tl.where(cols < n_vocab, scores + 0.0, float("-inf"))  # of -0.0 it makes 0.0
