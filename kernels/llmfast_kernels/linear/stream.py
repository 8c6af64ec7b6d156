"""Layers with quantized weights for few tokens on Hopper: the weights are a stream.

All programs are resident, one or two on a multiprocessor, and share the weight evenly: its units,
64 rows and 256 columns each, lie in a line that is cut into as many equal lengths. One warp of a
program fetches units into a ring of stages, by TMA, the first of them before the kernel before has
ended: weights are nobody's result. Two warpgroups multiply, each a half of a unit's columns.

A program that has all columns of its rows stores them. Otherwise it leaves its sums in memory, and
the last of those who share these rows to come adds them up in the order of columns, so the result
does not depend on who that is.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common.launch import CachedLauncher
from .hopper_launch import ROWS, STREAM
from .hopper_parts import (
    BOX_WORDS,
    CHUNK_COLUMNS,
    HALF_CHUNK,
    LANES,
    TILE_ROWS,
    WORDS_LAYOUT,
    X_LAYOUT,
    activate,
    barrier,
    fetch,
    less_zeros,
    operand,
    zeros_of,
)
from .int4_layout import CHUNK
from .kernel import multiprocessors_of
from .workspace import tickets

# of a lane, by programs on a multiprocessor: at first, while multiplying and while fetching
REGISTERS = {1: (168, 232, 40), 2: (80, 104, 24)}


@gluon.jit
def _start(program, units):
    """A program's first unit."""
    return program * units // gl.num_programs(0)


@gluon.jit
def _owner(unit, units):
    """The program that has a unit."""
    return ((unit + 1) * gl.num_programs(0) - 1) // units


@gluon.jit
def _row_of(tile, place, n, GATED: gl.constexpr):
    """GATED: half of a tile's rows are of the gate, and the other half those of up."""
    if GATED:
        HALF: gl.constexpr = TILE_ROWS // 2
        return tile * HALF + place % HALF + gl.where(place < HALF, 0, n // 2)
    else:
        return tile * TILE_ROWS + place


@gluon.jit
def _fetch_words(
    words_desc, words, come, stage, unit, pairs, n, BOXES: gl.constexpr, GATED: gl.constexpr
):
    """BOXES: of words, for a unit's two chunks."""
    HEIGHT: gl.constexpr = words_desc.block_shape[0]
    row = unit // pairs * HEIGHT
    for box in gl.static_range(BOXES):
        column = (unit % pairs * BOXES + box) * BOX_WORDS
        there = words.index(stage * BOXES + box)
        if GATED:
            fetch(words_desc, [row, column], come, there.slice(0, HEIGHT))
            fetch(words_desc, [row + n // 2, column], come, there.slice(HEIGHT, HEIGHT))
        else:
            fetch(words_desc, [row, column], come, there)


@gluon.jit
def _fetch_x(x_desc, xs, come, stage, pair):
    for part in gl.static_range(4):
        column = pair * 2 * CHUNK_COLUMNS + part * HALF_CHUNK
        fetch(x_desc, [0, column], come, xs.index(4 * stage + part))


@gluon.jit
def _fetch_all(
    x_desc, words_desc, ring, layer, BITS: gl.constexpr, ACT: gl.constexpr, STAGES: gl.constexpr
):
    xs, words, full, empty = ring
    units, pairs, n, _ = layer
    BOXES: gl.constexpr = BITS // 2
    BYTES: gl.constexpr = BOXES * words.shape[1] * BOX_WORDS * 4 + 4 * xs.shape[1] * HALF_CHUNK * 2
    GATED: gl.constexpr = ACT is not None
    first = _start(gl.program_id(0), units)
    count = _start(gl.program_id(0) + 1, units) - first
    ahead = gl.minimum(count, STAGES)
    for step in range(ahead):
        come = full.index(step)
        mbarrier.expect(come, BYTES)
        _fetch_words(words_desc, words, come, step, first + step, pairs, n, BOXES, GATED)
    gdc_wait()
    for step in range(ahead):
        _fetch_x(x_desc, xs, full.index(step), step, (first + step) % pairs)
    for step in range(ahead, count):
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
        come = full.index(stage)
        mbarrier.expect(come, BYTES)
        _fetch_words(words_desc, words, come, stage, first + step, pairs, n, BOXES, GATED)
        _fetch_x(x_desc, xs, come, stage, (first + step) % pairs)


@gluon.jit
def _half(
    words, half: gl.constexpr, zeros, BITS: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr
):
    """Half of a chunk's codes less their zero points, for the tensor cores."""
    first: gl.constexpr = 2 * half if BITS == 4 else 0
    left = less_zeros(words, first, zeros, BITS, dtype)
    right = less_zeros(words, first + 1, zeros, BITS, dtype)
    return operand(left, right, BITS, dtype, layout)


@gluon.jit
def _multiply_all(
    scales_ptr, zeros_ptr, out, n_tokens, partial_ptr, tickets_ptr, ring, hand, layer,
    WHICH: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr, ACT: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    xs, words, full, empty = ring
    sent, given, taken = hand
    units, pairs, n, groups = layer
    TOKENS: gl.constexpr = xs.shape[1]
    dtype: gl.constexpr = xs.dtype
    GATED: gl.constexpr = ACT is not None
    BOXES: gl.constexpr = BITS // 4  # of words, for a chunk
    MIDDLE: gl.constexpr = 1 << (BITS - 1)
    PER_CHUNK: gl.constexpr = CHUNK_COLUMNS // GROUP if GROUP > 0 else 0
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    codes_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
    own = gl.expand_dims(gl.arange(0, TILE_ROWS, gl.SliceLayout(1, LANES)), 1)
    of_sums = gl.expand_dims(gl.arange(0, TILE_ROWS, gl.SliceLayout(1, sums_layout)), 1)
    token = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, sums_layout)), 0)
    nothing = gl.zeros([TILE_ROWS, TOKENS], gl.float32, sums_layout)
    program = gl.program_id(0)
    unit = _start(program, units)
    end = _start(program + 1, units)
    step = 0
    turn = 0  # tiles done
    while unit < end:
        tile = unit // pairs
        first = unit % pairs
        last = gl.minimum(end - tile * pairs, pairs)
        zeros_at = gl.minimum(_row_of(tile, own, n, GATED), n - 1) * groups
        scales_at = gl.minimum(_row_of(tile, of_sums, n, GATED), n - 1) * groups
        sums = nothing
        for pair in range(first, last):
            stage = step % STAGES
            phase = step // STAGES & 1
            step += 1
            group = gl.minimum((2 * pair + WHICH) * PER_CHUNK, groups - 1)
            zeros = zeros_of(zeros_ptr, zeros_at + group, MIDDLE, BITS, dtype)
            scale = gl.load(scales_ptr + scales_at + group).to(gl.float32)
            zeros_after = zeros
            scale_after = scale
            if GROUP == 64:
                group = gl.minimum(group + 1, groups - 1)
                zeros_after = zeros_of(zeros_ptr, zeros_at + group, MIDDLE, BITS, dtype)
                scale_after = gl.load(scales_ptr + scales_at + group).to(gl.float32)
            mbarrier.wait(full.index(stage), phase)
            codes = words.index((2 * stage + WHICH) * BOXES).load(LANES)
            left = _half(codes, 0, zeros, BITS, dtype, codes_layout)
            x = xs.index(4 * stage + 2 * WHICH).permute((1, 0))
            part = warpgroup_mma_init(nothing)
            part = warpgroup_mma(left, x, part, use_acc=False, is_async=True)
            if BOXES == 2:
                codes = words.index((2 * stage + WHICH) * BOXES + 1).load(LANES)
            right = _half(codes, 1, zeros_after, BITS, dtype, codes_layout)
            x = xs.index(4 * stage + 2 * WHICH + 1).permute((1, 0))
            if GROUP == 64:
                after = warpgroup_mma_init(nothing)
                after = warpgroup_mma(right, x, after, use_acc=False, is_async=True)
                part, after = warpgroup_mma_wait(0, deps=(part, after))
                sums += scale * part + scale_after * after
            else:
                part = warpgroup_mma(right, x, part, is_async=True)
                part = warpgroup_mma_wait(0, deps=(part,))
                sums += scale * part
            mbarrier.arrive(empty.index(stage), count=1)
        unit += last - first
        if WHICH == 1:
            mbarrier.wait(taken, (turn & 1) ^ 1)
            sent.store(sums)
            mbarrier.arrive(given, count=1)
        else:
            mbarrier.wait(given, turn & 1)
            sums += sent.load(sums_layout)
            if last - first == pairs:
                _store(sums, out, n_tokens, sent, tile, n, dtype, ACT)
            else:
                SIZE: gl.constexpr = TILE_ROWS * TOKENS
                at = of_sums * TOKENS + token
                owner = _owner(tile * pairs, units)
                others = _owner(tile * pairs + pairs - 1, units) - owner
                # a program's first tile, or the last, which it is the first owner of
                slot = 2 * program + (program == owner).to(gl.int32)
                gl.store(partial_ptr + slot * SIZE + at, sums)
                barrier()  # all of it is stored before the ticket is drawn
                if gl.atomic_add(tickets_ptr + tile, 1, sem="acq_rel") == others:
                    sums = _load(partial_ptr + (2 * owner + 1) * SIZE + at, at >= 0)
                    AHEAD: gl.constexpr = 4 if SIZE <= 1024 else 1  # on their way at a time
                    for other in range(1, others + 1, AHEAD):
                        ptr = partial_ptr + 2 * (owner + other) * SIZE + at
                        left = (others - other) * SIZE
                        if AHEAD == 1:
                            sums += _load(ptr, at >= 0)
                        else:
                            second = _load(ptr + 2 * SIZE, at < left)
                            third = _load(ptr + 4 * SIZE, at < left - SIZE)
                            fourth = _load(ptr + 6 * SIZE, at < left - 2 * SIZE)
                            sums += _load(ptr, at >= 0)
                            sums += second
                            sums += third
                            sums += fourth
                    _store(sums, out, n_tokens, sent, tile, n, dtype, ACT)
                    gl.store(tickets_ptr + tile, 0)
            mbarrier.arrive(taken, count=1)
        turn += 1


@gluon.jit
def _load(ptr, mask):
    return gl.load(ptr, mask=mask, other=0.0, cache_modifier=".cg")


@gluon.jit
def _store(sums, out, n_tokens, free, tile, n, dtype: gl.constexpr, ACT: gl.constexpr):
    """Round the sums, with the bias; then add the residual, or gate. ``free`` is as large."""
    bias_ptr, residual_ptr, y_ptr = out
    TOKENS: gl.constexpr = sums.shape[1]
    layout: gl.constexpr = sums.type.layout
    place = gl.expand_dims(gl.arange(0, TILE_ROWS, gl.SliceLayout(1, layout)), 1)
    row = _row_of(tile, place, n, ACT is not None)
    if bias_ptr is not None:
        sums += gl.load(bias_ptr + gl.minimum(row, n - 1)).to(gl.float32)
    y = sums.to(dtype).to(gl.float32)
    if ACT is None:
        token = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, layout)), 0)
        at = token * n + row
        mask = (token < n_tokens) & (row < n)
        if residual_ptr is not None:
            y += gl.load(residual_ptr + at, mask=mask, other=0.0).to(gl.float32)
        gl.store(y_ptr + at, y.to(dtype), mask=mask)
    else:
        HALF: gl.constexpr = TILE_ROWS // 2
        by_token: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1])
        free.store(y)
        gate = free.slice(0, HALF).load(by_token)
        up = free.slice(HALF, HALF).load(by_token)
        y = activate(gate, ACT).to(dtype).to(gl.float32) * up
        unit = tile * HALF + gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(1, by_token)), 1)
        token = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, by_token)), 0)
        mask = (token < n_tokens) & (unit < n // 2)
        gl.store(y_ptr + token * (n // 2) + unit, y.to(dtype), mask=mask)


@gluon.jit(do_not_specialize=["n_tokens", "n"])
def _stream_kernel(
    x_desc,  # [n_tokens, k] in boxes of [TOKENS, 64]
    words_desc,  # [n, words] in boxes of [64, 16], with ACT half as high
    scales_ptr,  # [n, groups]
    zeros_ptr,  # [n, groups], or None: half of the codes are below 0
    bias_ptr,  # [n] or None
    residual_ptr,  # [n_tokens, n] or None
    y_ptr,  # [n_tokens, n], written; with ACT half as wide
    partial_ptr,  # float32 [programs, 2, 64, TOKENS], written
    tickets_ptr,  # int32, 0 for each tile before and after
    n_tokens,
    n,
    k,
    groups,
    BITS: gl.constexpr,  # 4 or 8
    GROUP: gl.constexpr,  # 64, or columns of a chunk; 0: all columns
    ACT: gl.constexpr,  # None, or what the gate goes through: its rows are the first half
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    OF_MULTIPLY: gl.constexpr,
    OF_FETCH: gl.constexpr,
):
    gdc_launch_dependents()  # at once: programs of the next kernel come as these go
    pairs = (k + 2 * CHUNK_COLUMNS - 1) // (2 * CHUNK_COLUMNS)  # of chunks
    units = (n + TILE_ROWS - 1) // TILE_ROWS * pairs
    xs = gl.allocate_shared_memory(x_desc.dtype, [4 * STAGES, TOKENS, HALF_CHUNK], x_desc.layout)
    words = gl.allocate_shared_memory(
        gl.int32, [BITS // 2 * STAGES, TILE_ROWS, BOX_WORDS], words_desc.layout
    )
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    sent = gl.allocate_shared_memory(gl.float32, [TILE_ROWS, TOKENS], plain)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    given = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    mbarrier.init(given, count=1)
    mbarrier.init(taken, count=1)
    ring = (xs, words, full, empty)
    hand = (sent, given, taken)
    out = (bias_ptr, residual_ptr, y_ptr)
    layer = (units, pairs, n, groups)
    gl.warp_specialize(
        [
            (
                _multiply_all,
                (
                    scales_ptr, zeros_ptr, out, n_tokens, partial_ptr, tickets_ptr, ring, hand,
                    layer, gl.constexpr(0), BITS, GROUP, ACT, STAGES,
                ),
            ),
            (
                _multiply_all,
                (
                    scales_ptr, zeros_ptr, out, n_tokens, partial_ptr, tickets_ptr, ring, hand,
                    layer, gl.constexpr(1), BITS, GROUP, ACT, STAGES,
                ),
            ),
            (_fetch_all, (x_desc, words_desc, ring, layer, BITS, ACT, STAGES)),
        ],
        [4, 1],  # warps of the second and the third, and registers of each of their lanes
        [OF_MULTIPLY, OF_FETCH],
    )  # fmt: skip


_stream = CachedLauncher(_stream_kernel, pdl=True)


def launch_stream(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    *,
    bits: int,
    group: int,
    activation: str | None,
    tokens: int,
) -> None:
    """Write ``y``.

    x and packed at multiples of 16 bytes; the columns of x multiples of 8.

    Args:
        bits: 4 or 8.
        group: columns that share a scale: 64, 128, or 0 for all.
        tokens: of a program, a key of STREAM[bits]; at least x's.
    """
    n, k = len(packed), x.shape[-1]
    n_tokens = x.numel() // k
    stages, per_sm = STREAM[bits][tokens]
    at_first, *registers = REGISTERS[per_sm]
    x_desc = TensorDescriptor(x, [n_tokens, k], [k, 1], [tokens, CHUNK // 2], X_LAYOUT)
    packed = packed.view(torch.int32)
    words, box = packed.shape[1], ROWS if activation is None else ROWS // 2
    words_desc = TensorDescriptor(packed, [n, words], [words, 1], [box, 16], WORDS_LAYOUT)
    units = -(-n // ROWS) * -(-k // (2 * CHUNK))
    programs = min(units, per_sm * multiprocessors_of(x.get_device()))
    partial = torch.empty((programs * 2 * ROWS * tokens,), dtype=torch.float32, device=x.device)
    given = (scales, zeros, bias, residual, y, partial, tickets(x.device))
    groups = scales.shape[1]
    _stream(
        (programs,),
        (
            *(x_desc, words_desc, *given, n_tokens, n, k, groups),
            *(bits, group, activation, tokens, stages, *registers),
        ),
        num_warps=4,
        maxnreg=at_first,
    )
