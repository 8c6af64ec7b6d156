"""Measured constants of attention's launches, by GPU."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.tables import GpuTable


@dataclass(frozen=True)
class Constants:
    """The constants of one GPU.

    Costs are in units of one block of keys and values, read at an SM's share of the bandwidth.
    """

    # decode, the cost of a block for an SM that has the memory to itself: one SM reads faster than
    # its share while others are idle
    decode_block: float
    # decode, what starting a program costs
    decode_program: float
    # decode, what merging splits costs: a second kernel
    decode_merge: float
    # prefill, the fewest queries for which neighbouring programs take the heads of one block, which
    # read the same keys; below, the blocks of one head start together
    prefill_heads_first: int


# found on an H100 SXM with 8 KV heads of 128 in bfloat16: batches of 1 to 64 with contexts of 512
# to 131,072 keys, and prefills of up to 16,384 queries
_H100 = Constants(
    decode_block=0.72, decode_program=0.7, decode_merge=1.75, prefill_heads_first=2048
)

# an H200 has the H100's SMs; nobody has measured other GPUs, which take the H100's ratios
CONSTANTS = GpuTable({("sm_90", 132): _H100}, default=_H100)
