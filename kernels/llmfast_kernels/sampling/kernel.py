"""Sampling in Triton. Arguments are checked by op.py; here they are taken as good."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from ..relaunch import Relaunch, aligned
from .reference import ALL_MASKED, FIXED_POINT, NOT_FINITE, OK, Sampled

_BLOCK = 8192
_OK = tl.constexpr(OK)
_NOT_FINITE = tl.constexpr(NOT_FINITE)
_ALL_MASKED = tl.constexpr(ALL_MASKED)
_FIXED_POINT = tl.constexpr(FIXED_POINT)
_NO_INDEX = tl.constexpr(2**31 - 1)
_NO_WEIGHT = tl.constexpr(28.0)  # so far below the largest score, exp times 2**40 is below 1
_VALUE_STEPS = tl.constexpr(12)  # halvings of an interval of scores before those of keys


@dataclass(frozen=True)
class Launch:
    """How a row is walked by its one program."""

    block_v: int  # elements taken at a time
    num_warps: int


@cache
def choose_launch(n_vocab: int) -> Launch:
    """Pick the launch for rows of ``n_vocab`` logits. Pure: it asks no device."""
    # a pass waits for its loads: the largest program there is has the most of them under way
    block_v = min(triton.next_power_of_2(n_vocab), _BLOCK)
    return Launch(block_v, num_warps=max(block_v // 256, 1))


@triton.jit
def _key(x):
    """An int32 in x's order. -0.0 must have been made 0.0; NaN has no place."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _ratio_and_weight(z, z_max):
    ratio = tl.exp(z - z_max)
    return ratio, (ratio * _FIXED_POINT).to(tl.int64)


@triton.jit
def _middle(low, high, step):
    """A key between: of the values at first, since scores lie evenly; then of the keys."""
    # further apart than an int32 may say
    middle = (low.to(tl.int64) + ((high.to(tl.int64) - low.to(tl.int64)) >> 1)).to(tl.int32)
    low_bits = low ^ ((low >> 31) & 0x7FFFFFFF)
    high_bits = high ^ ((high >> 31) & 0x7FFFFFFF)
    value = 0.5 * low_bits.to(tl.float32, bitcast=True)
    value += 0.5 * high_bits.to(tl.float32, bitcast=True)
    guess = _key(value)
    inside = (step < _VALUE_STEPS) & (guess > low) & (guess < high)
    return tl.where(inside, guess, middle)


@triton.jit
def _count_from(z_row, n_vocab, key_from, BLOCK_V: tl.constexpr):
    """How many keys are at least key_from."""
    count = tl.zeros([BLOCK_V], tl.int32)
    for start in range(0, n_vocab, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z = tl.load(z_row + cols, mask=cols < n_vocab, other=float("-inf"))
        count += ((_key(z) >= key_from) & (cols < n_vocab)).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _count_and_weigh_above(z_row, n_vocab, z_max, key_above, BLOCK_V: tl.constexpr):
    """How many keys are more than key_above, and their weight."""
    count = tl.zeros([BLOCK_V], tl.int32)
    weight = tl.zeros([BLOCK_V], tl.int64)
    for start in range(0, n_vocab, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z = tl.load(z_row + cols, mask=cols < n_vocab, other=float("-inf"))
        _, w = _ratio_and_weight(z, z_max)
        above = (_key(z) > key_above) & (cols < n_vocab)
        count += above.to(tl.int32)
        weight += tl.where(above, w, 0)
    return tl.sum(count), tl.sum(weight)


@triton.jit
def _top_k_key(z_row, n_vocab, z_max, k, BLOCK_V: tl.constexpr):
    """A key that exactly the k largest, and what equals the last of them, are no less than."""
    low = _key(tl.full([], float("-inf"), tl.float32))  # counts n_vocab >= k
    high = _key(z_max) + 1  # counts 0 < k
    key = _key(z_max - _NO_WEIGHT)  # most often the k-th is above it
    step = 0
    while high.to(tl.int64) - low.to(tl.int64) > 1:
        count = _count_from(z_row, n_vocab, key, BLOCK_V)
        if count >= k:
            low = key
        else:
            high = key
        if count == k:
            high = low + 1
        key = _middle(low, high, step)
        step += 1
    return low


@triton.jit
def _top_p_keys(z_row, n_vocab, z_max, key_from, top_p, BLOCK_V: tl.constexpr):
    """The nucleus of the keys from key_from: the key it starts above, and its incomplete end.

    Returns (above, tie, skip): the nucleus is all keys more than ``above``, but for the first
    ``skip`` (by index) of those that equal ``tie``.
    """
    low = key_from - 1
    high = _key(z_max)
    n_low, weight_low = _count_and_weigh_above(z_row, n_vocab, z_max, low, BLOCK_V)
    target = tl.maximum((top_p.to(tl.float64) * weight_low.to(tl.float64)).to(tl.int64), 1)
    # what lies above low weighs target or more, what lies above high weighs less
    n_high, weight_high = _count_and_weigh_above(z_row, n_vocab, z_max, high, BLOCK_V)
    step = 0
    while (high.to(tl.int64) - low.to(tl.int64) > 1) & (n_low - n_high > 1):
        key = _middle(low, high, step)
        step += 1
        n, weight = _count_and_weigh_above(z_row, n_vocab, z_max, key, BLOCK_V)
        if weight < target:
            high = key
            n_high = n
            weight_high = weight
        else:
            low = key
            n_low = n
            weight_low = weight
    # one key is left, which n_low - n_high tokens share: the later index ranks higher
    n_ties = (n_low - n_high).to(tl.int64)
    each = (weight_low - weight_high) // n_ties  # ties weigh alike
    kept = tl.minimum((target - weight_high + each - 1) // each, n_ties)
    return low, high, n_ties - kept


@triton.jit
def _filter(z_row, n_vocab, z_max, row, top_k_ptr, top_p_ptr, min_p_ptr, BLOCK_V: tl.constexpr):
    """What the row's filters keep, as _kept_weights takes it: (key_from, tie, skip, min_p)."""
    key_from = _key(z_max - _NO_WEIGHT)
    if top_k_ptr is not None:
        k = tl.load(top_k_ptr + row).to(tl.int64)
        if (k > 0) & (k < n_vocab):
            key = _top_k_key(z_row, n_vocab, z_max, k, BLOCK_V)
            key_from = tl.maximum(key_from, key)
    tie = key_from
    skip = tl.zeros([], tl.int64)
    if top_p_ptr is not None:
        top_p = tl.load(top_p_ptr + row)
        if (top_p >= 1.0) == 0:
            above, tie, skip = _top_p_keys(z_row, n_vocab, z_max, key_from, top_p, BLOCK_V)
            key_from = above + 1
    min_p = 0.0
    if min_p_ptr is not None:
        min_p = tl.minimum(tl.load(min_p_ptr + row), 1.0)
    return key_from, tie, skip, min_p


@triton.jit
def _kept_weights(
    z_row, cols, n_vocab, z_max, key_from, tie, skip, ties_before, min_p, BLOCK_V: tl.constexpr
):
    """What a block's tokens weigh in the draw, and how many ties were met by its end."""
    z = tl.load(z_row + cols, mask=cols < n_vocab, other=float("-inf"))
    ratio, weight = _ratio_and_weight(z, z_max)
    key = _key(z)
    keep = (key >= key_from) & (ratio >= min_p)
    if skip > 0:
        is_tie = (key == tie).to(tl.int64)
        rank = ties_before + tl.cumsum(is_tie, 0) - is_tie
        keep = keep & ((is_tie == 0) | (rank >= skip))
        ties_before += tl.sum(is_tie)
    return tl.where(keep, weight, 0), ties_before


@triton.jit
def _random_below(total, seed, position):
    """A whole number in [0, total), total below 2**61, from the row's seed and position."""
    zero = tl.zeros([1], tl.int64)
    word0, word1, _, _ = tl.randint4x(seed, position + zero)
    a = tl.sum((word0.to(tl.uint32, bitcast=True) >> 1).to(tl.int64))
    b = tl.sum((word1.to(tl.uint32, bitcast=True) >> 1).to(tl.int64))
    # floor(total * (a * 2**31 + b) / 2**62) without passing 63 bits
    high = total >> 31
    low = total & 0x7FFFFFFF
    return high * a + ((high * b + low * a + ((low * b) >> 31)) >> 31)


@triton.jit
def _sample_kernel(
    logits_ptr,  # [B, n_vocab]
    temperature_ptr,  # [B]; this and the next ten: None if absent
    top_k_ptr,  # [B]
    top_p_ptr,  # [B]
    min_p_ptr,  # [B]
    repetition_ptr,  # [B]
    presence_ptr,  # [B]
    frequency_ptr,  # [B]
    seen_ptr,  # [B, n_vocab] of bytes
    counts_ptr,  # [B, n_vocab]
    bias_ptr,  # [B, n_vocab]
    seeds_ptr,  # [B]
    positions_ptr,  # [B]
    z_ptr,  # [B, n_vocab] contiguous float32, scratch; None without temperature
    tokens_ptr,  # [B], written
    status_ptr,  # [B], written
    n_vocab,
    stride_logits,
    stride_seen,
    stride_counts,
    stride_bias,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64: rows times columns may pass 2**31
    logits_row = logits_ptr + row * stride_logits
    heat = 0.0
    if temperature_ptr is not None:
        heat = tl.load(temperature_ptr + row)
        z_row = z_ptr + row * n_vocab
    greedy = heat <= 0.0  # NaN is not, and makes every score NaN

    # each lane's largest score and where it stands first; then the largest lane
    best = tl.full([BLOCK_V], float("-inf"), tl.float32)
    best_col = tl.zeros([BLOCK_V], tl.int32)
    broken = tl.zeros([BLOCK_V], tl.int32)
    for start in range(0, n_vocab, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        mask = cols < n_vocab
        z = tl.load(logits_row + cols, mask=mask, other=float("-inf")).to(tl.float32)
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
        if temperature_ptr is not None:
            z = tl.where(greedy, z, tl.div_rn(z, tl.where(greedy, 1.0, heat) + tl.zeros_like(z)))
        broken = tl.where(mask & ((z != z) | (z == float("inf"))), 1, broken)
        z = tl.where(z == 0.0, 0.0, z)  # -0.0 equals 0.0, and must have its key
        if temperature_ptr is not None:
            tl.store(z_row + cols, z, mask=mask)
        better = z > best
        best = tl.where(better & mask, z, best)
        best_col = tl.where(better & mask, cols, best_col)
    z_max = tl.max(best, 0)
    token = tl.min(tl.where(best == z_max, best_col, _NO_INDEX), 0).to(tl.int64)
    status = tl.where(z_max == float("-inf"), _ALL_MASKED, _OK)
    status = tl.where(tl.max(broken, 0) > 0, _NOT_FINITE, status)
    token = tl.where(status == _OK, token, 0)

    if temperature_ptr is not None:
        if (status == _OK) & (greedy == 0):
            tl.debug_barrier()  # other lanes of the program read what these wrote
            key_from, tie, skip, min_p = _filter(
                z_row, n_vocab, z_max, row, top_k_ptr, top_p_ptr, min_p_ptr, BLOCK_V
            )
            weights = tl.zeros([BLOCK_V], tl.int64)
            ties = tl.zeros([], tl.int64)
            for start in range(0, n_vocab, BLOCK_V):
                cols = start + tl.arange(0, BLOCK_V)
                w, ties = _kept_weights(
                    z_row, cols, n_vocab, z_max, key_from, tie, skip, ties, min_p, BLOCK_V
                )
                weights += w
            seed = tl.load(seeds_ptr + row)
            at = _random_below(tl.sum(weights), seed, tl.load(positions_ptr + row).to(tl.int64))

            before = tl.zeros([], tl.int64)  # the weight of all earlier blocks
            ties = tl.zeros([], tl.int64)
            for start in range(0, n_vocab, BLOCK_V):
                cols = start + tl.arange(0, BLOCK_V)
                w, ties = _kept_weights(
                    z_row, cols, n_vocab, z_max, key_from, tie, skip, ties, min_p, BLOCK_V
                )
                weight = tl.sum(w)
                if (before <= at) & (at < before + weight):
                    up_to = before + tl.cumsum(w, 0)
                    token = tl.min(tl.where(up_to > at, cols, _NO_INDEX), 0).to(tl.int64)
                before += weight
    tl.store(tokens_ptr + row, token)
    tl.store(status_ptr + row, status)


@triton.jit(do_not_specialize=["n_top"])
def _logprobs_kernel(
    logits_ptr,  # [B, n_vocab]
    tokens_ptr,  # [B]
    status_ptr,  # [B]
    logprobs_ptr,  # [B], written
    top_tokens_ptr,  # [B, n_top], written
    top_logprobs_ptr,  # [B, n_top], written
    n_vocab,
    n_top,
    stride_logits,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * stride_logits
    broken = tl.load(status_ptr + row) != _OK

    largest = tl.full([BLOCK_V], float("-inf"), tl.float32)
    for start in range(0, n_vocab, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_row + cols, mask=cols < n_vocab, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, x)
    x_max = tl.max(largest, 0)
    sums = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, n_vocab, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_row + cols, mask=cols < n_vocab, other=float("-inf")).to(tl.float32)
        sums += tl.exp(x - x_max)
    log_sum = tl.log(tl.sum(sums, 0))

    token = tl.load(tokens_ptr + row)
    logprob = tl.load(logits_row + token).to(tl.float32) - x_max - log_sum
    tl.store(logprobs_ptr + row, tl.where(broken, float("nan"), logprob))

    # (key, then lowest index first) in one int64: each round takes the largest below the last
    last = tl.full([], 2**63 - 1, tl.int64)
    for i in range(0, n_top):
        best = tl.full([BLOCK_V], -(2**63), tl.int64)
        for start in range(0, n_vocab, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            x = tl.load(logits_row + cols, mask=cols < n_vocab, other=0.0).to(tl.float32)
            key = _key(tl.where(x == 0.0, 0.0, x)).to(tl.int64)
            rank = (key << 32) | (2147483647 - cols).to(tl.int64)
            best = tl.where((cols < n_vocab) & (rank < last), tl.maximum(best, rank), best)
        last = tl.max(best, 0)
        found = 2147483647 - (last & 0xFFFFFFFF)
        found = tl.where(broken, 0, found)
        logprob = tl.load(logits_row + found).to(tl.float32) - x_max - log_sum
        tl.store(top_tokens_ptr + row * n_top + i, found)
        tl.store(top_logprobs_ptr + row * n_top + i, tl.where(broken, float("nan"), logprob))


_sample = Relaunch(_sample_kernel)
_logprobs = Relaunch(_logprobs_kernel)


def launch_sample_tokens(
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
    inputs = (
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        None if prompt_seen is None else prompt_seen.view(torch.uint8),
        output_counts,
        bias,
        seeds,
        positions,
    )
    if logits.is_cuda and logits.get_device() != torch.cuda.current_device():
        with torch.cuda.device(logits.device):  # Triton launches on the current device
            return _launch(inputs, logprobs)
    return _launch(inputs, logprobs)


def _launch(inputs: tuple[torch.Tensor | None, ...], logprobs: int | None) -> Sampled:
    logits, temperature, seen, counts, bias = (inputs[i] for i in (0, 1, 8, 9, 10))
    assert logits is not None
    n_rows, n_vocab = logits.shape
    device = logits.device
    tokens = torch.empty(n_rows, dtype=torch.int64, device=device)
    status = torch.empty(n_rows, dtype=torch.int32, device=device)
    z = None
    if temperature is not None:
        z = torch.empty((n_rows, n_vocab), dtype=torch.float32, device=device)
    launch = choose_launch(n_vocab)
    strides = [1 if t is None else t.stride(0) for t in (logits, seen, counts, bias)]
    # what Triton specialises numbers on; the stride of a bias for all rows is 0
    alike = tuple((n % 16 == 0, n == 1, n >= 2**31) for n in (n_vocab, *strides))
    key: Hashable | None = None
    if aligned(*(t for t in inputs if t is not None)):
        dtypes = tuple(None if t is None else t.dtype for t in inputs)
        key = (logits.get_device(), dtypes, alike, launch)
    _sample(
        (n_rows,),
        key,
        (*inputs, z, tokens, status, n_vocab, *strides, launch.block_v),
        num_warps=launch.num_warps,
        enable_fp_fusion=False,  # scores are bit for bit the reference's
    )
    if logprobs is None:
        return Sampled(tokens, status)

    chosen = torch.empty(n_rows, dtype=torch.float32, device=device)
    top_tokens = torch.empty((n_rows, logprobs), dtype=torch.int64, device=device)
    top_logprobs = torch.empty((n_rows, logprobs), dtype=torch.float32, device=device)
    key = None
    if logprobs > 0 and aligned(logits):  # an empty tensor's pointer is 0
        key = (logits.get_device(), logits.dtype, alike[:2], launch)
    _logprobs(
        (n_rows,),
        key,
        (
            logits,
            tokens,
            status,
            chosen,
            top_tokens,
            top_logprobs,
            n_vocab,
            logprobs,
            strides[0],
            launch.block_v,
        ),
        num_warps=launch.num_warps,
    )
    if logprobs == 0:
        return Sampled(tokens, status, chosen)
    return Sampled(tokens, status, chosen, top_tokens, top_logprobs)
