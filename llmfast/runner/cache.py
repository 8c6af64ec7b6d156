"""The paged cache: the layout of each layer, groups of layers, and the blocks of each group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..errors import UserError
from ..model.costs import kv_bytes

BLOCK_SIZE = 64  # tokens of a block; docs/ops/kv_cache.md has the measurement


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer, per token: a key and a value for each KV head."""

    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    window: int | None  # tokens that a query sees; None: all

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token takes in the cache of this layer."""
        return kv_bytes(self.kv_heads, self.k_dim, self.v_dim, self.dtype)


def group_windows(layers: Sequence[LayerCache]) -> list[int | None]:
    """Return the window of each cache group: layers of one window form a group.

    The group of full attention is the first; if there is none, that of the longest window.
    """
    windows = {layer.window for layer in layers}
    return sorted(windows, key=lambda window: -math.inf if window is None else -window)


class PagedCache:
    """Keys and values of every layer, ``[num_blocks, kv_heads, block_size, k_dim or v_dim]``.

    Attributes:
        num_blocks: blocks of the first group.
        num_groups: cache groups; the layers of one share a block table.
        smallest_group: blocks of the group that has the fewest.
        group_of: the group of each layer.
    """

    def __init__(
        self,
        layers: Sequence[LayerCache],
        num_blocks: int | Sequence[int],
        device: torch.device,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        """
        Args:
            layers: what each layer caches.
            num_blocks: one number: all layers are one group. A sequence: blocks of each group of
                :func:`group_windows`.
            block_size: tokens per block.
        """
        self.block_size = block_size
        self.group_of = [0] * len(layers)
        counts = [num_blocks] if isinstance(num_blocks, int) else list(num_blocks)
        if not isinstance(num_blocks, int):
            windows = group_windows(layers)
            self.group_of = [windows.index(layer.window) for layer in layers]
        self.num_blocks, self.num_groups = counts[0], len(counts)
        self.smallest_group = min(counts)

        def allocate(layer: LayerCache, group: int, dim: int) -> torch.Tensor:
            shape = (counts[group], layer.kv_heads, block_size, dim)
            return torch.empty(shape, dtype=layer.dtype, device=device)

        placed = list(zip(layers, self.group_of, strict=True))
        self.keys = [allocate(layer, group, layer.k_dim) for layer, group in placed]
        self.values = [allocate(layer, group, layer.v_dim) for layer, group in placed]
        self._free = list(range(self.num_blocks))[::-1]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def copy(self, group: int, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy blocks, in every layer of a group; int64 ``[n]`` each."""
        for layer, own in enumerate(self.group_of):
            if own == group:
                for tensor in (self.keys[layer], self.values[layer]):
                    tensor[targets] = tensor[sources]

    def close(self) -> None:
        """Free the storage even if someone still holds the cache object."""
        self.keys.clear()
        self.values.clear()

    def allocate(self, tokens: int) -> list[int]:
        """Take blocks for ``tokens`` tokens from the free list; the cache has one group.

        Raises:
            UserError: there are not enough free blocks.
        """
        count = -(-tokens // self.block_size)
        if count > len(self._free):
            raise UserError(
                f"cache: {tokens} tokens need {count} blocks of {self.block_size}, "
                f"{len(self._free)} of {self.num_blocks} are free"
            )
        return [self._free.pop() for _ in range(count)]

    def free(self, blocks: Iterable[int]) -> None:
        """Put blocks back on the free list."""
        self._free.extend(blocks)
