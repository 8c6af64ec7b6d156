"""How a linear layer is laid out on programs: as measured on this kind of GPU, or by a heuristic.

The measured launches are in :mod:`.launch_tables`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from ..common.device import Device
from ..common.tables import GpuTable

MAX_TOKENS = 128  # layers of more tokens are not bound by reading the weights

# (operation, out_features of the result, in_features, bucket of tokens)
Key = tuple[str, int, int, int]


@dataclass(frozen=True)
class Launch:
    """A tier and its parameters.

    Tiers: ``gemv`` for one token, summed by lanes; ``tiles`` for tensor cores; ``cublas``;
    ``unfused`` for a gated layer that runs as a dense layer and an activation kernel.
    """

    tier: str
    block_n: int = 0  # weight rows of a program
    block_k: int = 0  # columns at a time
    num_warps: int = 4
    num_stages: int = 3  # of the loop over columns, in tiles

    def fits(self, tokens: int, gated: bool, shared_memory: int) -> bool:
        """Return True if the stages of a program fit in ``shared_memory`` bytes."""
        if self.tier != "tiles":
            return True  # nothing is staged
        rows = self.block_n * (2 if gated else 1) + block_m(tokens)
        return rows * self.block_k * 2 * self.num_stages <= shared_memory


# by operation, what runs where no kernel of ours is faster
VENDOR = {"dense_linear": Launch("cublas"), "gated_linear": Launch("unfused")}


@dataclass(frozen=True)
class Constants:
    """The heuristic's thresholds, as found on one kind of GPU."""

    tiles_tokens: int  # most tokens of tiles; for more cuBLAS is as fast
    long_k: int  # columns from which a gemv program has more warps than its tile needs
    # tokens up to which a program of tiles is alone on its SM, with nothing in flight until its
    # input is ready, so that it prefetches the first columns of each row into the L2
    prefetch_tokens: int
    prefetch_cols: int


_H100 = Constants(
    # qkv, out and down of the 8B shape at 64 tokens: 1 to 40% behind cuBLAS
    tiles_tokens=32,
    # all layers of the H100's table for one token
    long_k=4096,
    # a step of the 8B shape: 6.00 to 5.91 ms at batch 8, 6.57 to 6.52 at 32, no gain at 64
    prefetch_tokens=32,
    prefetch_cols=512,
)
CONSTANTS = GpuTable({("sm_90", 132): _H100}, default=_H100)


def bucket(tokens: int) -> int:
    """Return the number of tokens that stands for ``tokens`` in tables: 1, 16, 32, 64 or 128."""
    return 1 if tokens == 1 else block_m(tokens)


def block_m(tokens: int) -> int:
    """Return the tokens of a tile that holds ``tokens``; a dot takes at least 16."""
    return max(16, 1 << (tokens - 1).bit_length())


@cache
def prefetch_cols(tokens: int, device: Device) -> int:
    """Return how many columns of each row a program of tiles prefetches."""
    constants = CONSTANTS.of(device)
    return constants.prefetch_cols if tokens <= constants.prefetch_tokens else 0


def choose_launch(
    operation: str,
    n: int,
    k: int,
    tokens: int,
    device: Device,
    table: Mapping[Key, Launch] | None = None,
) -> Launch:
    """Choose the launch for ``tokens`` tokens of ``k`` features to ``n``. Pure: asks no device.

    Args:
        operation: ``dense_linear`` or ``gated_linear``.
        n: features of the result, so half the rows of a gated layer's weight.
        tokens: at least 1.
        table: measured launches of this kind of GPU.
    """
    if tokens > MAX_TOKENS:
        return VENDOR[operation]
    measured = (table or {}).get((operation, n, k, bucket(tokens)))
    if measured is not None:
        return measured
    gated = operation == "gated_linear"
    constants = CONSTANTS.of(device)
    widest = 1 << (k - 1).bit_length()
    if tokens == 1:
        block_k = min(4096 if gated else 2048, widest)
        num_warps = max(block_k // 512, 1)
        if k >= constants.long_k:
            num_warps = 4 if gated else 8
        return Launch("gemv", 1 if gated else 2, block_k, num_warps)
    if tokens > constants.tiles_tokens:
        return VENDOR[operation]
    # 32 rows make enough programs for every SM; then as many bytes in flight as shared memory holds
    block_k = max(min(128 if gated else 256, widest), 16)
    for num_stages in range(8, 1, -1):
        launch = Launch("tiles", 32, block_k, 4, num_stages)
        if launch.fits(tokens, gated, device.shared_memory):
            break
    return launch
