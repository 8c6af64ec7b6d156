"""The stream main loop, for few tokens on Hopper: all SMs share the weight evenly (stream-K).

All programs are resident, one or two per SM. The weight is a line of units of 64 rows and 256
columns, which is cut into one equal length per program. A producer warp loads units into a ring of
stages by TMA. It loads the first words before the previous kernel has ended, since no kernel writes
weights. Two consumer warpgroups multiply half of a unit's columns each (WGMMA).

A program that holds all columns of a tile of rows stores the outputs. Otherwise it leaves its
partial sums in memory, and the last arriver among the programs of the tile adds them up in the
order of columns. The result does not depend on which program that is.
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
    subtract_zero_points,
    tma_load,
)
from .ring import new_barriers, stage_of
from .split_k import leave_partial, sum_partials


@gluon.jit
def _first_unit(program, units):
    """Return the first unit of a program."""
    return program * units // gl.num_programs(0)


@gluon.jit
def _owner(unit, units):
    """Return the program that has a unit."""
    return ((unit + 1) * gl.num_programs(0) - 1) // units


@gluon.jit
def _weight_row(tile, place, n, GATED: gl.constexpr):
    """Return the weight row at a place of a tile. GATED: gate rows first, then matching up rows."""
    if GATED:
        HALF: gl.constexpr = TILE_ROWS // 2
        return tile * HALF + place % HALF + gl.where(place < HALF, 0, n // 2)
    else:
        return tile * TILE_ROWS + place


@gluon.jit
def _load_unit_words(
    words_desc, words, ready, stage, unit, pairs, n, BOXES: gl.constexpr, GATED: gl.constexpr
):
    """Load the words of a unit's two chunks, BOXES boxes, into a stage; ``ready`` counts bytes."""
    HEIGHT: gl.constexpr = words_desc.block_shape[0]
    row = unit // pairs * HEIGHT
    for box in gl.static_range(BOXES):
        column = (unit % pairs * BOXES + box) * BOX_WORDS
        target = words.index(stage * BOXES + box)
        if GATED:
            tma_load(words_desc, [row, column], ready, target.slice(0, HEIGHT))
            tma_load(words_desc, [row + n // 2, column], ready, target.slice(HEIGHT, HEIGHT))
        else:
            tma_load(words_desc, [row, column], ready, target)


@gluon.jit
def _load_unit_x(x_desc, xs, ready, stage, pair):
    """Load the inputs of a unit's columns into a stage."""
    for part in gl.static_range(4):
        column = pair * 2 * CHUNK_COLUMNS + part * HALF_CHUNK
        tma_load(x_desc, [0, column], ready, xs.index(4 * stage + part))


@gluon.jit
def _producer(
    x_desc, words_desc, ring, layer, BITS: gl.constexpr, ACT: gl.constexpr, STAGES: gl.constexpr
):
    """Load a program's units into the ring; inputs only after the previous kernel has ended."""
    xs, words, full, empty = ring
    units, pairs, n, _ = layer
    BOXES: gl.constexpr = BITS // 2
    BYTES: gl.constexpr = BOXES * words.shape[1] * BOX_WORDS * 4 + 4 * xs.shape[1] * HALF_CHUNK * 2
    GATED: gl.constexpr = ACT is not None
    first = _first_unit(gl.program_id(0), units)
    count = _first_unit(gl.program_id(0) + 1, units) - first
    ahead = gl.minimum(count, STAGES)
    for step in range(ahead):
        ready = full.index(step)
        mbarrier.expect(ready, BYTES)
        _load_unit_words(words_desc, words, ready, step, first + step, pairs, n, BOXES, GATED)
    gdc_wait()
    for step in range(ahead):
        _load_unit_x(x_desc, xs, full.index(step), step, (first + step) % pairs)
    for step in range(ahead, count):
        stage, phase = stage_of(step, STAGES)
        mbarrier.wait(empty.index(stage), phase ^ 1)
        ready = full.index(stage)
        mbarrier.expect(ready, BYTES)
        _load_unit_words(words_desc, words, ready, stage, first + step, pairs, n, BOXES, GATED)
        _load_unit_x(x_desc, xs, ready, stage, (first + step) % pairs)


@gluon.jit
def _unscaled_half(
    words, half: gl.constexpr, zeros, BITS: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr
):
    """Return half of a chunk's codes minus their zero points, as WGMMA's operand."""
    first: gl.constexpr = 2 * half if BITS == 4 else 0
    left = subtract_zero_points(words, first, zeros, BITS, dtype)
    right = subtract_zero_points(words, first + 1, zeros, BITS, dtype)
    return mma_operand(left, right, BITS, dtype, layout)


@gluon.jit
def _scaled_products(
    ring, stage, zeros, zeros_after, scale, scale_after, nothing,
    WHICH: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Multiply half WHICH of a stage's columns, and scale the products of each group."""
    xs, words, _, _ = ring
    dtype: gl.constexpr = xs.dtype
    BOXES: gl.constexpr = BITS // 4  # of words, per chunk
    layout: gl.constexpr = gl.DotOperandLayout(0, nothing.type.layout, 2)
    codes = words.index((2 * stage + WHICH) * BOXES).load(WORDS_IN_LANES)
    left = _unscaled_half(codes, 0, zeros, BITS, dtype, layout)
    x = xs.index(4 * stage + 2 * WHICH).permute((1, 0))
    part = warpgroup_mma_init(nothing)
    part = warpgroup_mma(left, x, part, use_acc=False, is_async=True)
    if BOXES == 2:
        codes = words.index((2 * stage + WHICH) * BOXES + 1).load(WORDS_IN_LANES)
    right = _unscaled_half(codes, 1, zeros_after, BITS, dtype, layout)
    x = xs.index(4 * stage + 2 * WHICH + 1).permute((1, 0))
    if GROUP == 64:
        after = warpgroup_mma_init(nothing)
        after = warpgroup_mma(right, x, after, use_acc=False, is_async=True)
        part, after = warpgroup_mma_wait(0, deps=(part, after))
        products = scale * part + scale_after * after
    else:
        part = warpgroup_mma(right, x, part, is_async=True)
        part = warpgroup_mma_wait(0, deps=(part,))
        products = scale * part
    return products


@gluon.jit
def _consumer(
    scales_ptr, zeros_ptr, out, n_tokens, partial_ptr, tickets_ptr, ring, hand, layer,
    WHICH: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr, ACT: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply half WHICH of each unit's columns. Warpgroup 0 adds both halves' sums and stores."""
    xs, _, full, empty = ring
    sent, given, taken = hand
    units, pairs, n, groups = layer
    TOKENS: gl.constexpr = xs.shape[1]
    dtype: gl.constexpr = xs.dtype
    GATED: gl.constexpr = ACT is not None
    MIDDLE: gl.constexpr = 1 << (BITS - 1)
    PER_CHUNK: gl.constexpr = CHUNK_COLUMNS // GROUP if GROUP > 0 else 0
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    own = gl.expand_dims(gl.arange(0, TILE_ROWS, gl.SliceLayout(1, WORDS_IN_LANES)), 1)
    of_sums = gl.expand_dims(gl.arange(0, TILE_ROWS, gl.SliceLayout(1, sums_layout)), 1)
    token = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, sums_layout)), 0)
    nothing = gl.zeros([TILE_ROWS, TOKENS], gl.float32, sums_layout)
    program = gl.program_id(0)
    unit = _first_unit(program, units)
    end = _first_unit(program + 1, units)
    step = 0
    turn = 0  # tiles done
    while unit < end:
        tile = unit // pairs
        first = unit % pairs
        last = gl.minimum(end - tile * pairs, pairs)
        zeros_at = gl.minimum(_weight_row(tile, own, n, GATED), n - 1) * groups
        scales_at = gl.minimum(_weight_row(tile, of_sums, n, GATED), n - 1) * groups
        sums = nothing
        for pair in range(first, last):
            stage, phase = stage_of(step, STAGES)
            step += 1
            group = gl.minimum((2 * pair + WHICH) * PER_CHUNK, groups - 1)
            zeros = load_offsets(zeros_ptr, zeros_at + group, MIDDLE, BITS, dtype)
            scale = gl.load(scales_ptr + scales_at + group).to(gl.float32)
            zeros_after = zeros
            scale_after = scale
            if GROUP == 64:
                group = gl.minimum(group + 1, groups - 1)
                zeros_after = load_offsets(zeros_ptr, zeros_at + group, MIDDLE, BITS, dtype)
                scale_after = gl.load(scales_ptr + scales_at + group).to(gl.float32)
            mbarrier.wait(full.index(stage), phase)
            sums += _scaled_products(
                ring, stage, zeros, zeros_after, scale, scale_after, nothing, WHICH, BITS, GROUP
            )
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
                _store_tile(sums, out, n_tokens, sent, tile, n, dtype, ACT)
            else:
                SIZE: gl.constexpr = TILE_ROWS * TOKENS
                places = of_sums * TOKENS + token
                owner = _owner(tile * pairs, units)
                others = _owner(tile * pairs + pairs - 1, units) - owner
                # slot 1: the program's last tile, whose first owner it is; slot 0: its first tile
                slot = 2 * program + (program == owner).to(gl.int32)
                ptrs = partial_ptr + slot * SIZE + places
                if leave_partial(ptrs, sums, tickets_ptr + tile) == others:
                    first_ptr = partial_ptr + (2 * owner + 1) * SIZE
                    rest_ptr = partial_ptr + 2 * (owner + 1) * SIZE
                    AHEAD: gl.constexpr = 4 if SIZE <= 1024 else 1
                    sums = sum_partials(first_ptr, rest_ptr, others, places, 2 * SIZE, AHEAD)
                    _store_tile(sums, out, n_tokens, sent, tile, n, dtype, ACT)
                    gl.store(tickets_ptr + tile, 0)
            mbarrier.arrive(taken, count=1)
        turn += 1


@gluon.jit
def _store_tile(sums, out, n_tokens, free, tile, n, dtype: gl.constexpr, ACT: gl.constexpr):
    """Round the sums, with the bias; then add the residual, or gate; then store.

    ``free`` is shared memory as large as the sums, which gating uses.
    """
    bias_ptr, residual_ptr, y_ptr = out
    TOKENS: gl.constexpr = sums.shape[1]
    layout: gl.constexpr = sums.type.layout
    place = gl.expand_dims(gl.arange(0, TILE_ROWS, gl.SliceLayout(1, layout)), 1)
    row = _weight_row(tile, place, n, ACT is not None)
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
def stream_kernel(
    x_desc,  # [n_tokens, k] in boxes of [TOKENS, 64]
    words_desc,  # [n, words] in boxes of [64, 16], with ACT half as high
    scales_ptr,  # [n, groups]
    zeros_ptr,  # [n, groups], or None: the middle code is 0
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
    ACT: gl.constexpr,  # None, or the gate's activation: its rows are the first half
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    gdc_launch_dependents()  # at once: the next kernel's programs start as these end
    pairs = (k + 2 * CHUNK_COLUMNS - 1) // (2 * CHUNK_COLUMNS)  # of chunks
    units = (n + TILE_ROWS - 1) // TILE_ROWS * pairs
    xs = gl.allocate_shared_memory(x_desc.dtype, [4 * STAGES, TOKENS, HALF_CHUNK], x_desc.layout)
    words = gl.allocate_shared_memory(
        gl.int32, [BITS // 2 * STAGES, TILE_ROWS, BOX_WORDS], words_desc.layout
    )
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    sent = gl.allocate_shared_memory(gl.float32, [TILE_ROWS, TOKENS], plain)
    full, empty = new_barriers(STAGES)
    given = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(given, count=1)
    mbarrier.init(taken, count=1)
    ring = (xs, words, full, empty)
    hand = (sent, given, taken)
    out = (bias_ptr, residual_ptr, y_ptr)
    layer = (units, pairs, n, groups)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    scales_ptr, zeros_ptr, out, n_tokens, partial_ptr, tickets_ptr, ring, hand,
                    layer, gl.constexpr(0), BITS, GROUP, ACT, STAGES,
                ),
            ),
            (
                _consumer,
                (
                    scales_ptr, zeros_ptr, out, n_tokens, partial_ptr, tickets_ptr, ring, hand,
                    layer, gl.constexpr(1), BITS, GROUP, ACT, STAGES,
                ),
            ),
            (_producer, (x_desc, words_desc, ring, layer, BITS, ACT, STAGES)),
        ],
        [4, 1],  # warps of the second and third partition; below, registers of their lanes
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


_stream = CachedLauncher(stream_kernel, pdl=True)


def launch_stream(call: Call, y: torch.Tensor, launch: Launch) -> None:
    """Compute ``y`` for at most ``launch.block_m`` tokens.

    TMA wants x and packed at multiples of 16 bytes, and a multiple of 8 columns of x. Groups are
    64 or 128 columns, or all.
    """
    x, n, k, tokens = call.x, call.n, call.k, launch.block_m
    if launch.stream is None:
        raise ValueError(f"quantized_linear: {launch} has no configuration of stream")
    at_launch, *registers = launch.stream.registers
    box = HOPPER_ROWS if call.activation is None else HOPPER_ROWS // 2
    packed = call.packed.view(torch.int32)
    words = packed.shape[1]
    x_desc = TensorDescriptor(x, [call.tokens, k], [k, 1], [tokens, CHUNK // 2], X_LAYOUT)
    words_desc = TensorDescriptor(packed, [n, words], [words, 1], [box, 16], WORDS_LAYOUT)
    tiles = -(-n // HOPPER_ROWS)
    programs = min(tiles * -(-k // (2 * CHUNK)), launch.stream.programs * device_of(x).sm_count)
    size = programs * 2 * HOPPER_ROWS * tokens
    partial = torch.empty((size,), dtype=torch.float32, device=x.device)
    _stream(
        (programs,),
        (
            x_desc, words_desc, call.scales, call.zeros, call.bias, call.residual, y,
            partial, tickets(x.device, tiles), call.tokens, n, k, call.groups,
            call.fmt.bits, call.group, call.activation, tokens, launch.num_stages, *registers,
        ),
        num_warps=4,
        maxnreg=at_launch,
    )  # fmt: skip
