"""Which main loop multiplies a quantized layer, and how it is laid out on programs.

:func:`plan` is a pure function of a :class:`Problem` and a :class:`~..common.device.Device`; what
was measured is in :mod:`.tables`. The tiers, by tokens:

``stream``        few tokens on Hopper: all SMs share the weight evenly
``gemm``          more tokens on Hopper: warp-specialized tiles
``gemv``          one token on any GPU, multiplied by lanes
``tiles``         several tokens on any GPU, each group's products scaled
``scaled_tiles``  many tokens on any GPU, int4, weights scaled before
``workspace``     cuBLAS with dequantized weights
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from ..common.device import Device
from ..linear.launch import block_m
from .formats import CHUNK
from .tables import CONSTANTS, Constants, StreamConfig
from .workspace import MAX_TICKETS

GEMV_COLUMNS = 1024  # columns that int4's gemv reads at a time
INT8_GROUP = 128  # columns of int8 that are summed at a time where all share a scale
_INT8_STAGED = 72 * 1024  # bytes of int8's codes and inputs in flight per program of tiles
_MIN_CHUNKS = 3  # chunks of columns for a split: with fewer its start and end dominate

# ----------------------------------------------------------------------------------------- Hopper

HOPPER_ROWS = 64  # weight rows that a warpgroup multiplies at once; rows of a stream's unit
# gemm, by bits and tokens of a tile: stages that shared memory holds
GEMM_STAGES = {4: {128: 5, 256: 3}, 8: {128: 4, 256: 2}}


class Problem(NamedTuple):
    """One call, as far as the choice of its launch depends on it."""

    bits: int
    n: int  # rows of the weight; with gating those of gate and up
    k: int
    tokens: int
    group: int  # columns that share a scale; 0: all
    minima: bool = False
    same_dtype: bool = True  # scales and minima have x's dtype
    gated: bool = False  # with an activation
    pairs: bool = True  # x is at a multiple of 4 bytes, so that lanes read two inputs at once
    tma_loads: bool = True  # x and packed are at multiples of 16 bytes, k is a multiple of 8
    tma_stores: bool = True  # residual is at a multiple of 16 bytes, n is a multiple of 16


@dataclass(frozen=True)
class Launch:
    """A tier and its parameters, as far as the tier has them."""

    tier: str
    block_m: int = 0  # tokens of a program or tile
    block_n: int = 0  # weight rows of a program
    block_k: int = 0  # columns at a time
    splits: int = 1  # programs that share a tile's columns (split-K)
    num_warps: int = 4
    num_stages: int = 1
    stream: StreamConfig | None = None  # of the tier stream
    reason: str = field(default="", compare=False)  # why it was chosen, for people


@cache
def plan(problem: Problem, device: Device) -> Launch:
    """Choose the launch of a call with at least one token. Pure: it asks no device."""
    constants = CONSTANTS.of(device)
    launch = None
    if device.is_hopper and problem.tma_loads:
        launch = _stream(problem, constants) or _gemm(problem, device, constants)
    most = max_tokens(problem.bits, problem.minima, device)
    if launch is None and problem.tokens > most:
        launch = Launch("workspace", reason=f"more than {most} tokens")
    if launch is None:
        launch = (_int4 if problem.bits == 4 else _int8)(problem, device, constants)
    return launch


def max_tokens(bits: int, minima: bool, device: Device) -> int:
    """Return the most tokens that a main loop for any GPU takes; more use the workspace."""
    if bits == 8 and minima:
        return 1  # tiles that summed minima beside the products gave wrong sums in bfloat16
    return CONSTANTS.of(device).max_tokens[bits]


def _stream(p: Problem, constants: Constants) -> Launch | None:
    if p.minima or p.group == 32:
        return None  # it has one scale, and no minimum, for 64 columns
    widths = [tokens for tokens in constants.stream[p.bits] if p.tokens <= tokens]
    if p.tokens < constants.stream_tokens[p.bits] or not widths:
        return None
    if -(-p.n // HOPPER_ROWS) > MAX_TICKETS:
        return None
    return stream_launch(p.bits, min(widths), constants)


def stream_launch(bits: int, tokens: int, constants: Constants) -> Launch:
    """Return stream's launch for programs of ``tokens`` tokens, a key of ``constants.stream``."""
    config = constants.stream[bits][tokens]
    return Launch(
        "stream", tokens, HOPPER_ROWS, num_stages=config.stages, stream=config,
        reason="few tokens on Hopper",
    )  # fmt: skip


def _gemm(p: Problem, device: Device, constants: Constants) -> Launch | None:
    if not (p.tma_stores and p.same_dtype) or (p.bits == 8 and p.group == 32):
        return None
    if p.tokens < constants.gemm_tokens or p.k < CHUNK * max(GEMM_STAGES[p.bits].values()):
        return None
    found = []
    for tokens, tile_us in constants.gemm_tile_us.items():
        tiles = -(-p.n // (2 * HOPPER_ROWS)) * -(-p.tokens // tokens)
        us = -(-tiles // device.sm_count) * tile_us * p.k / 4096
        found.append((us, tokens, 1))
        most = min(device.sm_count // tiles, p.k // (CHUNK * _MIN_CHUNKS))
        if tokens == constants.gemm_split_tokens and not p.gated:
            split_us = constants.gemm_split_us
            found += [(us / s + split_us * s, tokens, s) for s in range(2, most + 1)]
    us, tokens, splits = min(found)
    if p.tokens >= constants.workspace_tokens and us >= _workspace_us(p, constants):
        return None
    return Launch(
        "gemm", tokens, 2 * HOPPER_ROWS, splits=splits, num_stages=GEMM_STAGES[p.bits][tokens],
        reason=f"an estimate of {us:.0f} us",
    )  # fmt: skip


def _workspace_us(p: Problem, constants: Constants) -> float:
    """Estimate the time of reading packed weights, writing them in 16 bits, and multiplying."""
    dequantize = p.n * p.k * (p.bits / 8 + 2) / constants.bytes_per_us
    return dequantize + 2 * p.n * p.k * p.tokens / constants.flops_per_us + constants.launches_us


def _int4(p: Problem, device: Device, constants: Constants) -> Launch:
    if p.tokens == 1 and p.pairs and p.n >= constants.gemv_rows and p.k % GEMV_COLUMNS == 0:
        return Launch("gemv", 1, 8, GEMV_COLUMNS, num_warps=2, reason="one token, many rows")
    return _scaled_tiles(p, device, constants) or _tiles(p, device, constants)


def _scaled_tiles(p: Problem, device: Device, constants: Constants) -> Launch | None:
    if not p.same_dtype or p.tokens < constants.scaled_tokens or p.k > constants.scaled_columns:
        return None
    programs = -(-p.n // 64) * -(-p.tokens // 128)
    if programs < constants.programs(constants.scaled_programs, device):
        return None
    wide = programs > constants.programs(constants.scaled_wide_programs, device)
    block_n, num_warps = (128, 8) if wide else (64, 4)
    if 3 * stage_bytes(128, block_n) > device.shared_memory:
        return None
    return Launch(
        "scaled_tiles", 128, block_n, CHUNK, num_warps=num_warps, num_stages=3,
        reason=f"{programs} programs of 64 rows and 128 tokens",
    )  # fmt: skip


def _tiles(p: Problem, device: Device, constants: Constants) -> Launch:
    tokens = min(max(8, 1 << (p.tokens - 1).bit_length()), 128)
    block_n, num_warps = (64, 4) if tokens <= 32 else (128, 8)
    num_stages = 3
    while num_stages > 1 and num_stages * stage_bytes(tokens, block_n) > device.shared_memory:
        num_stages -= 1
    tiles = -(-p.n // block_n) * -(-p.tokens // tokens)
    wanted = constants.programs(constants.tiles_programs[tokens], device)
    splits = 1
    while 2 * splits * tiles <= wanted and 2 * splits * _MIN_CHUNKS * CHUNK <= p.k:
        splits *= 2
    return Launch(
        "tiles", tokens, block_n, CHUNK, splits, num_warps, num_stages,
        reason=f"{tiles} tiles in {splits} splits for {wanted} programs",
    )  # fmt: skip


def stage_bytes(tokens: int, block_n: int) -> int:
    """Return the shared memory of a stage of int4's tiles: words of a chunk, and its inputs."""
    return block_n * CHUNK // 2 + tokens * CHUNK * 2


def _int8(p: Problem, device: Device, constants: Constants) -> Launch:
    """Choose a launch that fits in 99 KiB of shared memory, the least that any GPU has."""
    group = p.group or INT8_GROUP
    if p.tokens == 1:
        block_k = max(min(2048, 1 << (p.k - 1).bit_length()), group)
        # 64 bytes of codes in flight per thread
        num_warps = max(block_k // 512, 1)
        return Launch("gemv", 1, 4, block_k, num_warps=num_warps, reason="one token")
    tokens = block_m(p.tokens)
    block_n = 32 if p.tokens <= 32 else 64
    num_warps = min(block_n * group // 512, 4)  # 16 bytes of a tile for each thread
    stage = (block_n + 2 * tokens) * group
    return Launch(
        "tiles", tokens, block_n, group, num_warps=num_warps,
        num_stages=max(2, min(_INT8_STAGED // stage, 16)), reason="several tokens",
    )  # fmt: skip
