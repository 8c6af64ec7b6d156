"""Layers with quantized weights for more than a few tokens, on Hopper's tensor cores.

A program has three parts that run beside each other. One warp fetches tokens and words of columns
into a ring of stages, by TMA; the first words before the kernel before has ended, since weights
are nobody's result. Two warpgroups, 64 rows of the weight each, wait for a stage, dequantize its
weights in registers and multiply, each at its own pace: while one dequantizes, the tensor cores
work for the other. The weights are rounded to just what dequantizing rounds them to.

Tiles follow each other in a program, and the ring goes on from one to the next. After a tile's
columns comes one stage more, in which the residual is fetched and from which the tile is stored.

Where tiles are too few for all multiprocessors, programs split the columns: each leaves its sums in
memory, and the last of a tile's programs to come adds them up in the order of columns, so the
result does not depend on who that is.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common.launch import CachedLauncher
from .hopper_launch import ROWS, TILE_STAGES
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
    put,
    scaled,
    twice,
    zeros_of,
)
from .int4_layout import CHUNK
from .kernel import multiprocessors_of
from .workspace import tickets

_BAND = gl.constexpr(8)  # tiles of tokens whose programs are neighbours


@gluon.jit
def _place(index, token_tiles, row_tiles, TOKENS: gl.constexpr):
    """A tile's first token, and which of the tiles of rows it is of."""
    band = index // (_BAND * row_tiles)
    within = index % (_BAND * row_tiles)
    width = gl.minimum(token_tiles - band * _BAND, _BAND)
    return (band * _BAND + within % width) * TOKENS, within // width


@gluon.jit
def _first_row(row_tile, n, which: gl.constexpr, GATED: gl.constexpr):
    """Of a warpgroup. GATED: one has the gate's rows, the other those of up that belong to them."""
    if GATED:
        return row_tile * TILE_ROWS + which * (n // 2)
    else:
        return (2 * row_tile + which) * TILE_ROWS


@gluon.jit
def _share(layer):
    """A program's first tile, which of the splits of its columns it has, and how many there are."""
    token_tiles, row_tiles, _, _, _ = layer
    splits = gl.maximum(gl.num_programs(0) // (token_tiles * row_tiles), 1)
    return gl.program_id(0) // splits, gl.program_id(0) % splits, splits


@gluon.jit
def _stage(step, STAGES: gl.constexpr):
    """The stage of a step, and the phase of its barriers."""
    return step % STAGES, step // STAGES & 1


@gluon.jit
def _fetch_words(
    words_desc, ring, stage, row_tile, chunk, n, BITS: gl.constexpr, GATED: gl.constexpr
):
    """Let a stage expect a chunk, and fetch its words."""
    xs, words, full, _ = ring
    BOXES: gl.constexpr = BITS // 4  # of words, for a chunk
    come = full.index(stage)
    mbarrier.expect(come, 2 * (xs.shape[1] * HALF_CHUNK * 2 + BOXES * TILE_ROWS * BOX_WORDS * 4))
    for which in gl.static_range(2):
        row = _first_row(row_tile, n, which, GATED)
        for box in gl.static_range(BOXES):
            place = [row, (chunk * BOXES + box) * BOX_WORDS]
            fetch(words_desc, place, come, words.index((2 * stage + which) * BOXES + box))


@gluon.jit
def _fetch_all(
    x_desc, words_desc, residual_desc, ring, layer,
    BITS: gl.constexpr, ACT: gl.constexpr, RESIDUAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    xs, _, full, empty = ring
    token_tiles, row_tiles, chunks, n, _ = layer
    TOKENS: gl.constexpr = xs.shape[1]
    GATED: gl.constexpr = ACT is not None
    tile, split, splits = _share(layer)
    first = split * chunks // splits
    last = (split + 1) * chunks // splits
    ahead = gl.minimum(last - first, STAGES)
    token, row_tile = _place(tile, token_tiles, row_tiles, TOKENS)
    for step in range(ahead):
        _fetch_words(words_desc, ring, step, row_tile, first + step, n, BITS, GATED)
    gdc_wait()
    step = 0
    for index in range(tile, token_tiles * row_tiles, gl.num_programs(0)):
        token, row_tile = _place(index, token_tiles, row_tiles, TOKENS)
        for chunk in range(first, last):
            stage, phase = _stage(step, STAGES)
            if step >= ahead:
                mbarrier.wait(empty.index(stage), phase ^ 1)
                _fetch_words(words_desc, ring, stage, row_tile, chunk, n, BITS, GATED)
            step += 1
            for which in gl.static_range(2):
                column = chunk * CHUNK_COLUMNS + which * HALF_CHUNK
                fetch(x_desc, [token, column], full.index(stage), xs.index(2 * stage + which))
        stage, phase = _stage(step, STAGES)
        step += 1
        mbarrier.wait(empty.index(stage), phase ^ 1)
        come = full.index(stage)
        if RESIDUAL:
            mbarrier.expect(come, 2 * (TOKENS * TILE_ROWS * 2))
            for which in gl.static_range(2):
                row = _first_row(row_tile, n, which, GATED)
                fetch(residual_desc, [token, row], come, xs.index(2 * stage + which))
        else:
            mbarrier.arrive(come, count=1)


@gluon.jit
def _group(scales_ptr, zeros_ptr, minima_ptr, at, last, BITS: gl.constexpr, dtype: gl.constexpr):
    """What is subtracted from a group's codes, its scale and its minimum."""
    at = gl.minimum(at, last)  # past a row's last group there are no columns
    scale = twice(gl.load(scales_ptr + at).to(gl.int16, bitcast=True))
    if minima_ptr is not None:
        minimum = twice(gl.load(minima_ptr + at).to(gl.int16, bitcast=True))
        return zeros_of(None, at, 0, BITS, dtype), scale, minimum
    else:
        MIDDLE: gl.constexpr = 1 << (BITS - 1)
        return zeros_of(zeros_ptr, at, MIDDLE, BITS, dtype), scale, scale


@gluon.jit
def _half(
    words, half: gl.constexpr, group, after, MINIMA: gl.constexpr, BITS: gl.constexpr,
    dtype: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """The weights of half a chunk. Of four bits its second quarter may be of a group of its own."""
    zero, scale, minimum = group
    zero_after, scale_after, minimum_after = after
    first: gl.constexpr = 2 * half if BITS == 4 else 0
    left = less_zeros(words, first, zero, BITS, dtype)
    right = less_zeros(words, first + 1, zero_after, BITS, dtype)
    left = scaled(left, scale, minimum, MINIMA, dtype)
    right = scaled(right, scale_after, minimum_after, MINIMA, dtype)
    return operand(left, right, BITS, dtype, layout)


@gluon.jit
def _groups(
    scales_ptr, zeros_ptr, minima_ptr, first, groups, chunk,
    BITS: gl.constexpr, GROUP: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Those of a chunk's four quarters, for rows whose first groups are at ``first``."""
    PER_CHUNK: gl.constexpr = CHUNK_COLUMNS // GROUP if GROUP > 0 else 0
    at = first + chunk * PER_CHUNK
    last = first + groups - 1
    group0 = _group(scales_ptr, zeros_ptr, minima_ptr, at, last, BITS, dtype)
    group1 = group0
    group2 = group0
    if GROUP == 32:
        group1 = _group(scales_ptr, zeros_ptr, minima_ptr, at + 1, last, BITS, dtype)
        group2 = _group(scales_ptr, zeros_ptr, minima_ptr, at + 2, last, BITS, dtype)
    elif GROUP == 64:
        group2 = _group(scales_ptr, zeros_ptr, minima_ptr, at + 1, last, BITS, dtype)
    group3 = group2
    if GROUP == 32:
        group3 = _group(scales_ptr, zeros_ptr, minima_ptr, at + 3, last, BITS, dtype)
    return group0, group1, group2, group3


@gluon.jit
def _multiply(
    sums, ring, stage, groups, WHICH: gl.constexpr, MINIMA: gl.constexpr, BITS: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Add a stage's products."""
    xs, words, _, _ = ring
    group0, group1, group2, group3 = groups
    dtype: gl.constexpr = xs.dtype
    BOXES: gl.constexpr = BITS // 4
    at = (2 * stage + WHICH) * BOXES
    codes = words.index(at).load(LANES)
    left = _half(codes, 0, group0, group1, MINIMA, BITS, dtype, layout)
    sums = warpgroup_mma(left, xs.index(2 * stage).permute((1, 0)), sums, is_async=True)
    if BOXES == 2:
        codes = words.index(at + 1).load(LANES)
    right = _half(codes, 1, group2, group3, MINIMA, BITS, dtype, layout)
    sums = warpgroup_mma(right, xs.index(2 * stage + 1).permute((1, 0)), sums, is_async=True)
    # across the loop's end ptxas would make each instruction wait
    return warpgroup_mma_init(warpgroup_mma_wait(0, deps=(sums,)))


@gluon.jit
def _add_up(partial_ptr, splits, places, SIZE: gl.constexpr):
    """What a tile's programs have left, SIZE sums each, from the first to the last."""
    sums = _load(partial_ptr + places, places >= 0)
    for split in range(1, splits, 2):  # two are on their way at a time
        ptr = partial_ptr + split * SIZE + places
        second = _load(ptr + SIZE, places < (splits - split - 1) * SIZE)
        sums += _load(ptr, places >= 0)
        sums += second
    return sums


@gluon.jit
def _load(ptr, mask):
    return gl.load(ptr, mask=mask, other=0.0, cache_modifier=".cg")


@gluon.jit
def _multiply_all(
    y_desc, scales_ptr, zeros_ptr, minima_ptr, bias_ptr, partial_ptr, tickets_ptr, ring, gated,
    layer, WHICH: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr, ACT: gl.constexpr,
    RESIDUAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    xs, _, full, empty = ring
    token_tiles, row_tiles, chunks, n, groups = layer
    TOKENS: gl.constexpr = xs.shape[1]
    dtype: gl.constexpr = xs.dtype
    MINIMA: gl.constexpr = minima_ptr is not None
    SIZE: gl.constexpr = 2 * TILE_ROWS * TOKENS  # of a tile
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
    own = gl.expand_dims(gl.arange(0, TILE_ROWS, gl.SliceLayout(1, LANES)), 1)
    of_sums = gl.expand_dims(gl.arange(0, TILE_ROWS, gl.SliceLayout(1, sums_layout)), 1)
    place = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, sums_layout)), 0)
    places = (WHICH * TILE_ROWS + of_sums) * TOKENS + place  # in a program's part of the memory
    tile, split, splits = _share(layer)
    step = 0
    turn = 0  # tiles done
    for index in range(tile, token_tiles * row_tiles, gl.num_programs(0)):
        token, row_tile = _place(index, token_tiles, row_tiles, TOKENS)
        row = _first_row(row_tile, n, WHICH, ACT is not None)
        first = gl.minimum(row + own, n - 1) * groups
        sums = warpgroup_mma_init(gl.zeros([TILE_ROWS, TOKENS], gl.float32, sums_layout))
        for chunk in range(split * chunks // splits, (split + 1) * chunks // splits):
            stage, phase = _stage(step, STAGES)
            step += 1
            of_chunk = _groups(
                scales_ptr, zeros_ptr, minima_ptr, first, groups, chunk, BITS, GROUP, dtype
            )
            mbarrier.wait(full.index(stage), phase)
            sums = _multiply(sums, ring, stage, of_chunk, WHICH, MINIMA, BITS, weights_layout)
            mbarrier.arrive(empty.index(stage), count=1)
        total = warpgroup_mma_wait(0, deps=(sums,))
        complete = True
        if partial_ptr is not None:
            gl.store(partial_ptr + gl.program_id(0) * SIZE + places, total)
            barrier()  # all of it is stored before the ticket is drawn
            ticket = tickets_ptr + 2 * index + WHICH
            complete = gl.atomic_add(ticket, 1, sem="acq_rel") == splits - 1
        stage, phase = _stage(step, STAGES)
        step += 1
        mbarrier.wait(full.index(stage), phase)
        if complete:
            if partial_ptr is not None:
                total = _add_up(partial_ptr + index * splits * SIZE, splits, places, SIZE)
                gl.store(ticket, 0)
            if bias_ptr is not None:
                total += gl.load(bias_ptr + gl.minimum(row + of_sums, n - 1)).to(gl.float32)
            y = total.to(dtype)
            box = xs.index(2 * stage + WHICH)
            if RESIDUAL:
                residual = box.permute((1, 0)).load(sums_layout)
                y = (y.to(gl.float32) + residual.to(gl.float32)).to(dtype)
            if ACT is not None:
                if WHICH == 0:
                    y = activate(y.to(gl.float32), ACT).to(dtype)
                else:
                    mbarrier.wait(gated, turn & 1)
                    gate = xs.index(2 * stage).permute((1, 0)).load(sums_layout)
                    y = (gate.to(gl.float32) * y.to(gl.float32)).to(dtype)
            box.permute((1, 0)).store(y)
            if ACT is not None and WHICH == 0:
                mbarrier.arrive(gated, count=1)
            else:
                fence_async_shared()
                if ACT is not None:
                    row -= n // 2  # of up's row its unit
                put(y_desc, [token, row], box)
                tma.store_wait(0)
        turn += 1
        mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit(do_not_specialize=["n_tokens", "n"])
def _hopper_kernel(
    x_desc,  # [n_tokens, k] in boxes of [TOKENS, 64]
    words_desc,  # [n, words] in boxes of [64, 16]
    residual_desc,  # [n_tokens, n] in boxes as x's, read only if RESIDUAL
    y_desc,  # [n_tokens, n] in boxes as x's, written; with ACT half as wide
    scales_ptr,  # [n, groups], of x's dtype, as the minima
    zeros_ptr,  # [n, groups], or None: half of the codes are below 0
    minima_ptr,  # [n, groups], or None; then there are no zeros
    bias_ptr,  # [n] or None
    partial_ptr,  # float32 [programs, 128, TOKENS], written; None: columns are not split
    tickets_ptr,  # int32, 0 for each half of a tile before and after; None likewise
    n_tokens,
    n,
    k,
    groups,
    BITS: gl.constexpr,  # 4 or 8
    GROUP: gl.constexpr,  # columns of a group: of four bits 32, then 64, 128, or 0 for all
    ACT: gl.constexpr,  # None, or what the gate goes through: its rows are the first half
    RESIDUAL: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
):
    gdc_launch_dependents()  # at once: programs of the next kernel come as these go
    token_tiles = (n_tokens + TOKENS - 1) // TOKENS
    row_tiles = (n + 2 * TILE_ROWS - 1) // (2 * TILE_ROWS)
    chunks = (k + CHUNK_COLUMNS - 1) // CHUNK_COLUMNS
    xs = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, TOKENS, HALF_CHUNK], x_desc.layout)
    words = gl.allocate_shared_memory(
        gl.int32, [2 * (BITS // 4) * STAGES, TILE_ROWS, BOX_WORDS], words_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    gated = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    # a warpgroup cannot be two tiles ahead, since a tile's columns fill the ring
    mbarrier.init(gated, count=1)
    ring = (xs, words, full, empty)
    layer = (token_tiles, row_tiles, chunks, n, groups)
    gl.warp_specialize(
        [
            (
                _multiply_all,
                (
                    y_desc, scales_ptr, zeros_ptr, minima_ptr, bias_ptr, partial_ptr, tickets_ptr,
                    ring, gated, layer, gl.constexpr(0), BITS, GROUP, ACT, RESIDUAL, STAGES,
                ),
            ),
            (
                _multiply_all,
                (
                    y_desc, scales_ptr, zeros_ptr, minima_ptr, bias_ptr, partial_ptr, tickets_ptr,
                    ring, gated, layer, gl.constexpr(1), BITS, GROUP, ACT, RESIDUAL, STAGES,
                ),
            ),
            (
                _fetch_all,
                (x_desc, words_desc, residual_desc, ring, layer, BITS, ACT, RESIDUAL, STAGES),
            ),
        ],
        [4, 1],  # warps of the second and the third, and registers of each of their lanes
        [232, 40],
    )  # fmt: skip


_hopper = CachedLauncher(_hopper_kernel, pdl=True)


def launch_hopper(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    minima: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    *,
    bits: int,
    group: int,
    activation: str | None,
    tokens: int,
    splits: int,
) -> None:
    """Write ``y``.

    x, packed, residual and y at multiples of 16 bytes; the columns of x and y multiples of 8.

    Args:
        bits: 4 or 8.
        group: columns that share a scale, 0 for all; of eight bits not 32.
        tokens: of a tile, a key of TILE_STAGES[bits]; the columns fill as many stages.
        splits: programs of a tile, at most one for each chunk of columns; with an activation, or
            with more than MAX_TICKETS / 2 tiles, one.
    """
    n, k, width = len(packed), x.shape[-1], y.shape[-1]
    n_tokens = x.numel() // k
    wide = [tokens, CHUNK // 2]
    x_desc = TensorDescriptor(x, [n_tokens, k], [k, 1], wide, X_LAYOUT)
    packed = packed.view(torch.int32)
    words = packed.shape[1]
    words_desc = TensorDescriptor(packed, [n, words], [words, 1], [ROWS, 16], WORDS_LAYOUT)
    y_desc, residual_desc = (
        TensorDescriptor(out, [n_tokens, width], [width, 1], wide, X_LAYOUT)
        for out in (y, y if residual is None else residual)
    )
    tiles = -(-n_tokens // tokens) * -(-n // (2 * ROWS))
    programs = min(tiles, multiprocessors_of(x.get_device())) if splits == 1 else splits * tiles
    partial = counts = None
    if splits > 1:
        size = programs * 2 * ROWS * tokens
        partial = torch.empty((size,), dtype=torch.float32, device=x.device)
        counts = tickets(x.device)
    given = (scales, zeros, minima, bias, partial, counts)
    groups = scales.shape[1]
    _hopper(
        (programs,),
        (
            *(x_desc, words_desc, residual_desc, y_desc, *given, n_tokens, n, k, groups),
            *(bits, group, activation, residual is not None, tokens, TILE_STAGES[bits][tokens]),
        ),
        num_warps=4,
    )
