"""How a layer with four-bit weights is laid on programs. The numbers were found on an H100."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .int4_layout import CHUNK

MAX_TOKENS = 256  # more are multiplied by cuBLAS, with weights in a workspace
_LANES_ROWS = 16384  # of a weight, from which lanes read one token's faster than tensor cores
GEMV_COLUMNS = 1024  # that they read at a time
_MIN_CHUNKS = 3  # of columns, for a split
_MANY_TOKENS = 65  # from which on scaled weights are faster, unless columns must be split
_MANY_COLUMNS = 8192  # of a weight, at most, which one program takes alone
_MANY_PROGRAMS = 96  # of 64 rows, at least: fewer leave multiprocessors without work
_MANY_WIDE = 400  # of these, from which on each takes 128 rows


@dataclass(frozen=True)
class Int4Launch:
    """``gemv``: one token, summed by lanes. ``tiles``: tensor cores, each group's products scaled.
    ``many``: tensor cores, the weights scaled.
    """

    tier: str
    block_m: int  # tokens of a program
    block_n: int  # rows of the weight that it takes
    splits: int  # programs that share the columns of these rows
    num_warps: int
    num_stages: int


@cache
def choose_int4_launch(
    n: int, k: int, tokens: int, *, shared_memory: int, same_dtype: bool = True
) -> Int4Launch:
    """Pick the launch for ``tokens`` tokens of ``k`` features to ``n``. Pure: it asks no device.

    Args:
        shared_memory: what one program may use, in bytes.
        same_dtype: scales and minima are of the tokens' dtype.
    """
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


def stage_bytes(block_m: int, block_n: int) -> int:
    """Shared memory of one stage: the words of a chunk of columns, and their inputs."""
    return block_n * CHUNK // 2 + block_m * CHUNK * 2
