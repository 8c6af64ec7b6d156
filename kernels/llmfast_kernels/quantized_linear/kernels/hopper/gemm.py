"""The GEMM main loop, for more than a few tokens on Hopper: warp-specialized, persistent.

A producer warp loads inputs and words into a ring of stages by TMA. It loads the first words before
the previous kernel has ended, since no kernel writes weights. Two consumer warpgroups of 64 weight
rows each wait for a stage, dequantize its weights in registers and multiply (WGMMA). Each runs at
its own pace: while one dequantizes, the tensor cores work for the other. The weights are rounded
to the numbers that dequantizing rounds them to.

A program computes several tiles, and the ring continues from one tile to the next. After a tile's
columns comes one more stage, into which the residual is loaded and from which the tile is stored.

Where there are fewer tiles than SMs, programs split the columns (split-K): each leaves its partial
sums in memory, and the tile's last arriver adds them up in the order of columns. The result does
not depend on which program that is.
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

from ....common.device import device_of
from ....common.launch import CachedLauncher
from ...call import Call
from ...formats import CHUNK
from ...launch import HOPPER_ROWS, Launch
from ...workspace import tickets
from .operands import (
    BOX_WORDS,
    CHUNK_COLUMNS,
    HALF_CHUNK,
    TILE_ROWS,
    WORDS_IN_LANES,
    WORDS_LAYOUT,
    X_LAYOUT,
    activate,
    load_offsets,
    mma_operand,
    scale_weights,
    splat16,
    subtract_zero_points,
    tma_load,
    tma_store,
)
from .ring import new_barriers, stage_of
from .split_k import leave_partial, sum_partials

_BAND = gl.constexpr(8)  # tiles of tokens of neighbouring programs, which share weights in the L2


@gluon.jit
def _tile_position(index, token_tiles, row_tiles, TOKENS: gl.constexpr):
    """Return a tile's first token, and the index of its rows."""
    band = index // (_BAND * row_tiles)
    within = index % (_BAND * row_tiles)
    width = gl.minimum(token_tiles - band * _BAND, _BAND)
    return (band * _BAND + within % width) * TOKENS, within // width


@gluon.jit
def _first_row(row_tile, n, which: gl.constexpr, GATED: gl.constexpr):
    """Return the first weight row of a warpgroup.

    GATED: warpgroup 0 takes gate rows, and warpgroup 1 the matching up rows.
    """
    if GATED:
        return row_tile * TILE_ROWS + which * (n // 2)
    else:
        return (2 * row_tile + which) * TILE_ROWS


@gluon.jit
def _split_of_program(layer):
    """Return a program's first tile, its split of the columns, and the number of splits."""
    token_tiles, row_tiles, _, _, _ = layer
    splits = gl.maximum(gl.num_programs(0) // (token_tiles * row_tiles), 1)
    return gl.program_id(0) // splits, gl.program_id(0) % splits, splits


@gluon.jit
def _load_chunk_words(
    words_desc, ring, stage, row_tile, chunk, n, BITS: gl.constexpr, GATED: gl.constexpr
):
    """Load the words of a chunk into a stage, whose barrier expects the inputs too."""
    xs, words, full, _ = ring
    BOXES: gl.constexpr = BITS // 4  # of words, per chunk
    ready = full.index(stage)
    mbarrier.expect(ready, 2 * (xs.shape[1] * HALF_CHUNK * 2 + BOXES * TILE_ROWS * BOX_WORDS * 4))
    for which in gl.static_range(2):
        row = _first_row(row_tile, n, which, GATED)
        for box in gl.static_range(BOXES):
            place = [row, (chunk * BOXES + box) * BOX_WORDS]
            tma_load(words_desc, place, ready, words.index((2 * stage + which) * BOXES + box))


@gluon.jit
def _producer(
    x_desc, words_desc, residual_desc, ring, layer,
    BITS: gl.constexpr, ACT: gl.constexpr, RESIDUAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load a program's tiles into the ring; inputs only after the previous kernel has ended."""
    xs, _, full, empty = ring
    token_tiles, row_tiles, chunks, n, _ = layer
    TOKENS: gl.constexpr = xs.shape[1]
    GATED: gl.constexpr = ACT is not None
    tile, split, splits = _split_of_program(layer)
    first = split * chunks // splits
    last = (split + 1) * chunks // splits
    ahead = gl.minimum(last - first, STAGES)
    token, row_tile = _tile_position(tile, token_tiles, row_tiles, TOKENS)
    for step in range(ahead):
        _load_chunk_words(words_desc, ring, step, row_tile, first + step, n, BITS, GATED)
    gdc_wait()
    step = 0
    for index in range(tile, token_tiles * row_tiles, gl.num_programs(0)):
        token, row_tile = _tile_position(index, token_tiles, row_tiles, TOKENS)
        for chunk in range(first, last):
            stage, phase = stage_of(step, STAGES)
            if step >= ahead:
                mbarrier.wait(empty.index(stage), phase ^ 1)
                _load_chunk_words(words_desc, ring, stage, row_tile, chunk, n, BITS, GATED)
            step += 1
            for which in gl.static_range(2):
                column = chunk * CHUNK_COLUMNS + which * HALF_CHUNK
                tma_load(x_desc, [token, column], full.index(stage), xs.index(2 * stage + which))
        stage, phase = stage_of(step, STAGES)
        step += 1
        mbarrier.wait(empty.index(stage), phase ^ 1)
        ready = full.index(stage)
        if RESIDUAL:
            mbarrier.expect(ready, 2 * (TOKENS * TILE_ROWS * 2))
            for which in gl.static_range(2):
                row = _first_row(row_tile, n, which, GATED)
                tma_load(residual_desc, [token, row], ready, xs.index(2 * stage + which))
        else:
            mbarrier.arrive(ready, count=1)


@gluon.jit
def _load_group(
    scales_ptr, zeros_ptr, minima_ptr, at, last, BITS: gl.constexpr, dtype: gl.constexpr
):
    """Load a group's offsets (see load_offsets), scale and minimum, for each row."""
    at = gl.minimum(at, last)  # past a row's last group there are no columns
    scale = splat16(gl.load(scales_ptr + at).to(gl.int16, bitcast=True))
    if minima_ptr is not None:
        minimum = splat16(gl.load(minima_ptr + at).to(gl.int16, bitcast=True))
        return load_offsets(None, at, 0, BITS, dtype), scale, minimum
    else:
        MIDDLE: gl.constexpr = 1 << (BITS - 1)
        return load_offsets(zeros_ptr, at, MIDDLE, BITS, dtype), scale, scale


@gluon.jit
def _scaled_half(
    words, half: gl.constexpr, group, after, MINIMA: gl.constexpr, BITS: gl.constexpr,
    dtype: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Return the weights of half a chunk. In int4 its second quarter may be of another group."""
    zero, scale, minimum = group
    zero_after, scale_after, minimum_after = after
    first: gl.constexpr = 2 * half if BITS == 4 else 0
    left = subtract_zero_points(words, first, zero, BITS, dtype)
    right = subtract_zero_points(words, first + 1, zero_after, BITS, dtype)
    left = scale_weights(left, scale, minimum, MINIMA, dtype)
    right = scale_weights(right, scale_after, minimum_after, MINIMA, dtype)
    return mma_operand(left, right, BITS, dtype, layout)


@gluon.jit
def _load_chunk_groups(
    scales_ptr, zeros_ptr, minima_ptr, first, groups, chunk,
    BITS: gl.constexpr, GROUP: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Load the groups of a chunk's four quarters, for rows whose first groups are at ``first``."""
    PER_CHUNK: gl.constexpr = CHUNK_COLUMNS // GROUP if GROUP > 0 else 0
    at = first + chunk * PER_CHUNK
    last = first + groups - 1
    group0 = _load_group(scales_ptr, zeros_ptr, minima_ptr, at, last, BITS, dtype)
    group1 = group0
    group2 = group0
    if GROUP == 32:
        group1 = _load_group(scales_ptr, zeros_ptr, minima_ptr, at + 1, last, BITS, dtype)
        group2 = _load_group(scales_ptr, zeros_ptr, minima_ptr, at + 2, last, BITS, dtype)
    elif GROUP == 64:
        group2 = _load_group(scales_ptr, zeros_ptr, minima_ptr, at + 1, last, BITS, dtype)
    group3 = group2
    if GROUP == 32:
        group3 = _load_group(scales_ptr, zeros_ptr, minima_ptr, at + 3, last, BITS, dtype)
    return group0, group1, group2, group3


@gluon.jit
def _multiply_stage(
    sums, ring, stage, groups, WHICH: gl.constexpr, MINIMA: gl.constexpr, BITS: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Return the sums plus a stage's products."""
    xs, words, _, _ = ring
    group0, group1, group2, group3 = groups
    dtype: gl.constexpr = xs.dtype
    BOXES: gl.constexpr = BITS // 4
    at = (2 * stage + WHICH) * BOXES
    codes = words.index(at).load(WORDS_IN_LANES)
    left = _scaled_half(codes, 0, group0, group1, MINIMA, BITS, dtype, layout)
    sums = warpgroup_mma(left, xs.index(2 * stage).permute((1, 0)), sums, is_async=True)
    if BOXES == 2:
        codes = words.index(at + 1).load(WORDS_IN_LANES)
    right = _scaled_half(codes, 1, group2, group3, MINIMA, BITS, dtype, layout)
    sums = warpgroup_mma(right, xs.index(2 * stage + 1).permute((1, 0)), sums, is_async=True)
    # waiting across the loop's end would make ptxas wait after each MMA instruction
    return warpgroup_mma_init(warpgroup_mma_wait(0, deps=(sums,)))


@gluon.jit
def _consumer(
    y_desc, scales_ptr, zeros_ptr, minima_ptr, bias_ptr, partial_ptr, tickets_ptr, ring, gated,
    layer, WHICH: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr, ACT: gl.constexpr,
    RESIDUAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply 64 rows of each tile, and store them by TMA from the ring's next stage."""
    xs, _, full, empty = ring
    token_tiles, row_tiles, chunks, n, groups = layer
    TOKENS: gl.constexpr = xs.shape[1]
    dtype: gl.constexpr = xs.dtype
    MINIMA: gl.constexpr = minima_ptr is not None
    SIZE: gl.constexpr = 2 * TILE_ROWS * TOKENS  # of a tile
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
    own = gl.expand_dims(gl.arange(0, TILE_ROWS, gl.SliceLayout(1, WORDS_IN_LANES)), 1)
    of_sums = gl.expand_dims(gl.arange(0, TILE_ROWS, gl.SliceLayout(1, sums_layout)), 1)
    place = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, sums_layout)), 0)
    places = (WHICH * TILE_ROWS + of_sums) * TOKENS + place  # in a program's partial sums
    tile, split, splits = _split_of_program(layer)
    step = 0
    turn = 0  # tiles done
    for index in range(tile, token_tiles * row_tiles, gl.num_programs(0)):
        token, row_tile = _tile_position(index, token_tiles, row_tiles, TOKENS)
        row = _first_row(row_tile, n, WHICH, ACT is not None)
        first = gl.minimum(row + own, n - 1) * groups
        sums = warpgroup_mma_init(gl.zeros([TILE_ROWS, TOKENS], gl.float32, sums_layout))
        for chunk in range(split * chunks // splits, (split + 1) * chunks // splits):
            stage, phase = stage_of(step, STAGES)
            step += 1
            of_chunk = _load_chunk_groups(
                scales_ptr, zeros_ptr, minima_ptr, first, groups, chunk, BITS, GROUP, dtype
            )
            mbarrier.wait(full.index(stage), phase)
            sums = _multiply_stage(sums, ring, stage, of_chunk, WHICH, MINIMA, BITS, weights_layout)
            mbarrier.arrive(empty.index(stage), count=1)
        total = warpgroup_mma_wait(0, deps=(sums,))
        complete = True
        if partial_ptr is not None:
            ptrs = partial_ptr + gl.program_id(0) * SIZE + places
            ticket_ptr = tickets_ptr + 2 * index + WHICH
            complete = leave_partial(ptrs, total, ticket_ptr) == splits - 1
        stage, phase = stage_of(step, STAGES)
        step += 1
        mbarrier.wait(full.index(stage), phase)
        if complete:
            if partial_ptr is not None:
                first_ptr = partial_ptr + index * splits * SIZE
                total = sum_partials(first_ptr, first_ptr + SIZE, splits - 1, places, SIZE, 2)
                gl.store(ticket_ptr, 0)
            if bias_ptr is not None:
                total += gl.load(bias_ptr + gl.minimum(row + of_sums, n - 1)).to(gl.float32)
            _store_tile(
                total.to(dtype), y_desc, xs, stage, gated, turn & 1, token, row, n,
                WHICH, ACT, RESIDUAL,
            )  # fmt: skip
        turn += 1
        mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def _store_tile(
    y, y_desc, xs, stage, gated, phase, token, row, n,
    WHICH: gl.constexpr, ACT: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Add the residual, or gate; then store rounded sums by TMA, all through a stage of the ring.

    Warpgroup 0 leaves the activated gate in its half of the stage, and warpgroup 1 stores.
    """
    dtype: gl.constexpr = y.dtype
    box = xs.index(2 * stage + WHICH)
    if RESIDUAL:
        residual = box.permute((1, 0)).load(y.type.layout)
        y = (y.to(gl.float32) + residual.to(gl.float32)).to(dtype)
    if ACT is not None:
        if WHICH == 0:
            y = activate(y.to(gl.float32), ACT).to(dtype)
        else:
            mbarrier.wait(gated, phase)
            gate = xs.index(2 * stage).permute((1, 0)).load(y.type.layout)
            y = (gate.to(gl.float32) * y.to(gl.float32)).to(dtype)
    box.permute((1, 0)).store(y)
    if ACT is not None and WHICH == 0:
        mbarrier.arrive(gated, count=1)
    else:
        fence_async_shared()
        if ACT is not None:
            row -= n // 2  # from up's row to the output's column
        tma_store(y_desc, [token, row], box)
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_tokens", "n"])
def gemm_kernel(
    x_desc,  # [n_tokens, k] in boxes of [TOKENS, 64]
    words_desc,  # [n, words] in boxes of [64, 16]
    residual_desc,  # [n_tokens, n] in boxes as x's, read only if RESIDUAL
    y_desc,  # [n_tokens, n] in boxes as x's, written; with ACT half as wide
    scales_ptr,  # [n, groups], of x's dtype, like the minima
    zeros_ptr,  # [n, groups], or None: the middle code is 0
    minima_ptr,  # [n, groups], or None; with minima there are no zeros
    bias_ptr,  # [n] or None
    partial_ptr,  # float32 [programs, 128, TOKENS], written; None if columns are not split
    tickets_ptr,  # int32, 0 for each half of a tile before and after; None likewise
    n_tokens,
    n,
    k,
    groups,
    BITS: gl.constexpr,  # 4 or 8
    GROUP: gl.constexpr,  # columns of a group: 64, 128, 0 for all; in int4 also 32
    ACT: gl.constexpr,  # None, or the gate's activation: its rows are the first half
    RESIDUAL: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
):
    gdc_launch_dependents()  # at once: the next kernel's programs start as these end
    token_tiles = (n_tokens + TOKENS - 1) // TOKENS
    row_tiles = (n + 2 * TILE_ROWS - 1) // (2 * TILE_ROWS)
    chunks = (k + CHUNK_COLUMNS - 1) // CHUNK_COLUMNS
    xs = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, TOKENS, HALF_CHUNK], x_desc.layout)
    words = gl.allocate_shared_memory(
        gl.int32, [2 * (BITS // 4) * STAGES, TILE_ROWS, BOX_WORDS], words_desc.layout
    )
    full, empty = new_barriers(STAGES)
    gated = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    # one phase is enough: a tile's columns fill the ring, so no warpgroup is two tiles ahead
    mbarrier.init(gated, count=1)
    ring = (xs, words, full, empty)
    layer = (token_tiles, row_tiles, chunks, n, groups)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    y_desc, scales_ptr, zeros_ptr, minima_ptr, bias_ptr, partial_ptr, tickets_ptr,
                    ring, gated, layer, gl.constexpr(0), BITS, GROUP, ACT, RESIDUAL, STAGES,
                ),
            ),
            (
                _consumer,
                (
                    y_desc, scales_ptr, zeros_ptr, minima_ptr, bias_ptr, partial_ptr, tickets_ptr,
                    ring, gated, layer, gl.constexpr(1), BITS, GROUP, ACT, RESIDUAL, STAGES,
                ),
            ),
            (
                _producer,
                (x_desc, words_desc, residual_desc, ring, layer, BITS, ACT, RESIDUAL, STAGES),
            ),
        ],
        [4, 1],  # warps of the second and third partition; below, registers of their lanes
        [232, 40],
    )  # fmt: skip


_gemm = CachedLauncher(gemm_kernel, pdl=True)


def launch_gemm(call: Call, y: torch.Tensor, launch: Launch) -> None:
    """Compute ``y`` in tiles of ``launch.block_m`` tokens, whose columns fill the stages.

    TMA wants x, packed, residual and y at multiples of 16 bytes, and a multiple of 8 columns of x
    and of y. With eight bits groups are not 32 columns. Columns are split into at most one split
    per chunk, and not with an activation.
    """
    x, n, k, tokens, splits = call.x, call.n, call.k, launch.block_m, launch.splits
    residual, width = call.residual, y.shape[-1]
    box = [tokens, CHUNK // 2]
    packed = call.packed.view(torch.int32)
    words = packed.shape[1]
    x_desc = TensorDescriptor(x, [call.tokens, k], [k, 1], box, X_LAYOUT)
    words_desc = TensorDescriptor(packed, [n, words], [words, 1], [HOPPER_ROWS, 16], WORDS_LAYOUT)
    y_desc, residual_desc = (
        TensorDescriptor(out, [call.tokens, width], [width, 1], box, X_LAYOUT)
        for out in (y, y if residual is None else residual)
    )
    tiles = -(-call.tokens // tokens) * -(-n // (2 * HOPPER_ROWS))
    programs = min(tiles, device_of(x).sm_count) if splits == 1 else splits * tiles
    partial = ticket = None
    if splits > 1:
        size = programs * 2 * HOPPER_ROWS * tokens
        partial = torch.empty((size,), dtype=torch.float32, device=x.device)
        ticket = tickets(x.device, 2 * tiles)
    _gemm(
        (programs,),
        (
            x_desc, words_desc, residual_desc, y_desc, call.scales, call.zeros, call.minima,
            call.bias, partial, ticket, call.tokens, n, k, call.groups, call.fmt.bits, call.group,
            call.activation, residual is not None, tokens, launch.num_stages,
        ),
        num_warps=4,
    )  # fmt: skip
