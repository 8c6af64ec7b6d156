"""The paged cache: blocks of keys and values, and a list of the free ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..errors import UserError

BLOCK_SIZE = 64  # tokens of a block; docs/ops/kv_cache.md has the measurement


class PagedCache:
    """Keys and values of every layer, ``[num_blocks, kv_heads, BLOCK_SIZE, head_dim]`` each."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        """
        Args:
            shapes: heads and head dimension of each layer.
        """
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.keys, self.values = (
            [
                torch.empty(num_blocks, heads, block_size, dim, dtype=dtype, device=device)
                for heads, dim in shapes
            ]
            for _ in range(2)
        )
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
