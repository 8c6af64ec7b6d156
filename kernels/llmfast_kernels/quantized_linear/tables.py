"""Measured constants that decide which main loop multiplies a layer, and how, by kind of GPU.

Only an H100 was measured so far. Numbers of programs are scaled to the SMs of other GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..common.device import Device
from ..common.tables import GpuTable


class StreamConfig(NamedTuple):
    """How stream uses an SM."""

    stages: int  # of a program's ring
    programs: int  # per SM
    # of a lane: at the launch, of a consumer warpgroup, of the producer warp
    registers: tuple[int, int, int]


@dataclass(frozen=True)
class Constants:
    """Thresholds and costs, as found on one GPU."""

    sm_count: int  # of that GPU; numbers of programs below are for as many

    # gemv, tiles, scaled_tiles: the most tokens by bits; for more, cuBLAS is faster
    max_tokens: Mapping[int, int]
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
    # ... by bits and tokens of a program
    stream: Mapping[int, Mapping[int, StreamConfig]]
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


# 65,536 registers of an SM; two consumer warpgroups and one of which the producer is a warp
_TWO_PROGRAMS, _ONE_PROGRAM = (80, 104, 24), (168, 232, 40)

# Found on an H100 80GB HBM3 with the layers of the Llama-3.1-8B shape, at the commit that a comment
# names. docs/ops/quantized_linear.md has the runs.
_H100 = Constants(
    sm_count=132,
    # int4: c6cf19a; int8's tiles take 426 us at 128 tokens, where cuBLAS takes 181
    max_tokens={4: 256, 8: 128},
    # 4c1aaa7: gate and up, of 28,672 rows, are faster by lanes; qkv, of 6,144, by tiles
    gemv_rows=16384,
    # 4c1aaa7: down took 51 us at one token without splits, by 64 programs
    tiles_programs={8: 512, 16: 512, 32: 512, 64: 192, 128: 140},
    # c6cf19a
    scaled_tokens=65,
    scaled_columns=8192,
    scaled_programs=96,
    scaled_wide_programs=400,
    # 929dbc5: at one token int8 takes 82.7 us by gemv, 90.7 by stream; int4 62.7 and 56.8
    stream_tokens={4: 1, 8: 2},
    # 209fcba: int4 at one token takes 60.8, 58.3, 57.3 and 56.8 us with 8, 5, 4 and 3 stages, since
    # the inputs wait behind the first words; one program of 64 tokens per SM, since two do not fit
    stream={
        bits: {
            **{tokens: StreamConfig(3, 2, _TWO_PROGRAMS) for tokens in (8, 16, 32)},
            64: StreamConfig(stages, 1, _ONE_PROGRAM),
        }
        for bits, stages in ((4, 4), (8, 3))
    },
    # stream takes at most 64 tokens, 93.4 us
    gemm_tokens=65,
    # 84521a3
    gemm_tile_us={128: 28.5, 256: 46.0},
    # 0a76912
    gemm_split_us=3.0,
    # 0a76912: down at 192 tokens takes 80.1 us with splits of 256 tokens, 50.7 with 128
    gemm_split_tokens=128,
    # at 256 tokens gemm takes 192 us, and cuBLAS 212 without dequantizing
    workspace_tokens=257,
    # copies reach 3.0 TB/s, cuBLAS 700 TFLOP/s in 16 bits
    bytes_per_us=3e6,
    flops_per_us=700e6,
    launches_us=5.0,
)

CONSTANTS = GpuTable({("sm_90", 132): _H100}, default=_H100)
