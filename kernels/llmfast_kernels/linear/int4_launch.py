"""How a layer with four-bit weights is laid on programs. The numbers were found on an H100."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .int4_layout import CHUNK
from .workspace import MAX_TICKETS

MAX_TOKENS = 256  # of tiles; more are Hopper's, or cuBLAS's with weights in a workspace
_LANES_ROWS = 16384  # of a weight, from which lanes read one token's faster than tensor cores
GEMV_COLUMNS = 1024  # that they read at a time
_MIN_CHUNKS = 3  # of columns, for a split
_MANY_TOKENS = 65  # from which on scaled weights are faster, unless columns must be split
_MANY_COLUMNS = 8192  # of a weight, at most, which one program takes alone
_MANY_PROGRAMS = 96  # of 64 rows, at least: fewer leave multiprocessors without work
_MANY_WIDE = 400  # of these, from which on each takes 128 rows
_HOPPER_TOKENS = 129  # from which on it is faster, where there are
_HOPPER_TILES = 96  # of 128 rows, at least
HOPPER_STAGES = {128: 5, 256: 3}  # that shared memory holds, by tokens of a tile
_HOPPER_US = {128: 28.5, 256: 46.0}  # of a tile of 4,096 columns, by its tokens
# by tokens: rows of a unit, stages, programs on a multiprocessor
STREAM = {8: (64, 8, 2), 16: (64, 6, 2), 32: (128, 6, 1), 64: (128, 4, 1)}
_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Int4Launch:
    """``gemv``: one token, summed by lanes. ``tiles``: tensor cores, each group's products scaled.
    ``stream``: the same, by as many programs as are resident. ``many`` and ``hopper``: tensor
    cores, the weights scaled. ``workspace``: cuBLAS.
    """

    tier: str
    block_m: int  # tokens of a program
    block_n: int  # rows of the weight that it takes
    splits: int  # programs that share the columns of these rows
    num_warps: int
    num_stages: int


@cache
def choose_int4_launch(
    n: int,
    k: int,
    tokens: int,
    *,
    shared_memory: int,
    same_dtype: bool = True,
    hopper: bool = False,
    stream: bool = False,
) -> Int4Launch:
    """Pick the launch for ``tokens`` tokens of ``k`` features to ``n``. Pure: it asks no device.

    Args:
        shared_memory: what one program may use, in bytes.
        same_dtype: scales and minima are of the tokens' dtype.
        hopper: the GPU is one, and TMA takes the tensors.
        stream: so it is, and the kernel for few tokens takes such groups.
    """
    if stream and tokens <= max(STREAM):
        block_m = next(block_m for block_m in STREAM if tokens <= block_m)
        block_n, num_stages, _ = STREAM[block_m]
        if -(-n // block_n) <= MAX_TICKETS:
            return Int4Launch("stream", block_m, block_n, 1, 4, num_stages)
    if (
        hopper
        and same_dtype
        and tokens >= _HOPPER_TOKENS
        and k >= CHUNK * max(HOPPER_STAGES.values())
    ):
        us, launch, tiles = _choose_hopper(n, k, tokens)
        if us < _workspace_us(n, k, tokens) if tokens > MAX_TOKENS else tiles >= _HOPPER_TILES:
            return launch
    if tokens > MAX_TOKENS:
        return Int4Launch("workspace", 0, 0, 1, 0, 0)
    if tokens == 1 and n >= _LANES_ROWS and k % GEMV_COLUMNS == 0:
        return Int4Launch("gemv", 1, 8, 1, 2, 1)
    if same_dtype and tokens >= _MANY_TOKENS and k <= _MANY_COLUMNS:
        programs = -(-n // 64) * -(-tokens // 128)
        if programs >= _MANY_PROGRAMS:
            block_n, num_warps = (128, 8) if programs > _MANY_WIDE else (64, 4)
            launch = Int4Launch("many", 128, block_n, 1, num_warps, 3)
            if launch.num_stages * stage_bytes(128, block_n) <= shared_memory:
                return launch
    block_m = min(max(8, 1 << (tokens - 1).bit_length()), 128)
    block_n, num_warps = (64, 4) if block_m <= 32 else (128, 8)
    num_stages = 3
    while num_stages > 1 and num_stages * stage_bytes(block_m, block_n) > shared_memory:
        num_stages -= 1
    tiles = -(-n // block_n) * -(-tokens // block_m)
    wanted = 512 if block_m <= 32 else 192 if block_m == 64 else 140  # programs
    splits = 1
    while 2 * splits * tiles <= wanted and 2 * splits * _MIN_CHUNKS * CHUNK <= k:
        splits *= 2
    return Int4Launch("tiles", block_m, block_n, splits, num_warps, num_stages)


def _choose_hopper(n: int, k: int, tokens: int) -> tuple[float, Int4Launch, int]:
    """The faster of its tiles: what they take, the launch, and how many they are."""
    found = []
    for block_m, tile_us in _HOPPER_US.items():
        tiles = -(-n // 128) * -(-tokens // block_m)
        us = -(-tiles // _MULTIPROCESSORS) * tile_us * k / 4096
        launch = Int4Launch("hopper", block_m, 128, 1, 4, HOPPER_STAGES[block_m])
        found.append((us, launch, tiles))
    return min(found, key=lambda each: each[0])


def _workspace_us(n: int, k: int, tokens: int) -> float:
    """Half a byte a weight read and two written at 3 TB/s, then products at 700 TFLOP/s."""
    return n * k * 2.5 / 3e6 + 2 * n * k * tokens / 700e6 + 5


def stage_bytes(block_m: int, block_n: int) -> int:
    """Shared memory of one stage: the words of a chunk of columns, and their inputs."""
    return block_n * CHUNK // 2 + block_m * CHUNK * 2
