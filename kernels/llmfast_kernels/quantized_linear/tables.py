"""Measured constants that decide which main loop multiplies a layer, and how, by kind of GPU.

Only an H100 was measured so far. Numbers of programs are scaled to the SMs of other GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..common.device import Device
from ..common.tables import GpuTable


@dataclass(frozen=True)
class Constants:
    """Thresholds and costs, as found on one GPU."""

    sm_count: int  # of that GPU; numbers of programs below are for as many

    # gemv: rows of a weight from which lanes read one token's weights faster than tensor cores do
    gemv_rows: int
    # tiles: programs that are enough, by tokens of a tile; columns are split while there are fewer
    tiles_programs: Mapping[int, int]
    # scaled_tiles: the fewest tokens for which it is faster than tiles
    scaled_tokens: int
    # ... the most columns of a weight that one program should take alone
    scaled_columns: int
    # ... the fewest programs of 64 rows: with fewer, SMs are without work
    scaled_programs: int
    # ... the programs of 64 rows above which each takes 128 rows
    scaled_wide_programs: int

    # stream: the fewest tokens by bits; for fewer gemv is faster
    stream_tokens: Mapping[int, int]
    # gemm: the fewest tokens for which it is faster than stream
    gemm_tokens: int
    # ... microseconds of a tile of 4,096 columns on one SM, by its tokens
    gemm_tile_us: Mapping[int, float]
    # ... microseconds per split of a tile: each stores partial sums, the last arriver adds them up
    gemm_split_us: float
    # ... tokens of a tile that may be split; the sums of more take longer than splitting gains
    gemm_split_tokens: int

    # workspace and cuBLAS: the fewest tokens for which they may be faster than gemm
    workspace_tokens: int
    # ... bytes and floating point operations per microsecond, and microseconds of two launches
    bytes_per_us: float
    flops_per_us: float
    launches_us: float

    def programs(self, count: int, device: Device) -> int:
        """Scale a number of programs to a GPU's SMs."""
        return count * device.sm_count // self.sm_count


# fields from Constants, each with the run that it is from
_H100 = Constants(
    sm_count=132,
    # gate and up of the 8B shape, 28,672 rows: 1 token by lanes, against tiles of 8 tokens
    gemv_rows=16384,
    # down of the 8B shape took 51 us without splits, by 64 programs
    tiles_programs={8: 512, 16: 512, 32: 512, 64: 192, 128: 140},
    # the four layers of the 8B shape at 64, 65, 128 and 256 tokens
    scaled_tokens=65,
    scaled_columns=8192,
    scaled_programs=96,
    scaled_wide_programs=400,
    # the 8B shape at one token: int8 82.7 us by gemv, 90.7 by stream; int4 62.7 and 56.8
    stream_tokens={4: 1, 8: 2},
    # int4 at 64 tokens: 93.4 us by stream; at 72 and more gemm
    gemm_tokens=65,
    # linear fits of out, qkv, gate and up, and down at 65 to 4,096 tokens
    gemm_tile_us={128: 28.5, 256: 46.0},
    gemm_split_us=3.0,
    # splits of tiles of 256 tokens: 80.1 us for down at 192 tokens, with tiles of 128 50.7
    gemm_split_tokens=128,
    # at 256 tokens gemm takes 192 us where cuBLAS takes 212 without dequantizing
    workspace_tokens=257,
    # copies reach 3.0 TB/s, cuBLAS 700 TFLOP/s
    bytes_per_us=3e6,
    flops_per_us=700e6,
    launches_us=5.0,
)

CONSTANTS = GpuTable({("sm_90", 132): _H100}, default=_H100)
