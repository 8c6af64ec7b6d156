"""The paged cache: the layout of each layer, the blocks, and which of them are free."""

from __future__ import annotations

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


class PagedCache:
    """Keys and values of every layer, ``[num_blocks, kv_heads, block_size, k_dim or v_dim]``."""

    def __init__(
        self,
        layers: Sequence[LayerCache],
        num_blocks: int,
        device: torch.device,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        """Allocate ``num_blocks`` blocks of ``block_size`` tokens for each of ``layers``."""
        self.block_size = block_size
        self.num_blocks = num_blocks

        def allocate(layer: LayerCache, dim: int) -> torch.Tensor:
            shape = (num_blocks, layer.kv_heads, block_size, dim)
            return torch.empty(shape, dtype=layer.dtype, device=device)

        self.keys = [allocate(layer, layer.k_dim) for layer in layers]
        self.values = [allocate(layer, layer.v_dim) for layer in layers]
        self._free = list(range(num_blocks))[::-1]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy blocks, in every layer; int64 ``[n]`` each."""
        for tensor in (*self.keys, *self.values):
            tensor[targets] = tensor[sources]

    def close(self) -> None:
        """Free the storage even if someone still holds the cache object."""
        self.keys.clear()
        self.values.clear()

    def allocate(self, tokens: int) -> list[int]:
        """Take blocks for ``tokens`` tokens from the free list.

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
