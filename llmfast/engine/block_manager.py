"""Blocks of the paged cache: their users, and the prefixes that they hold.

A block of a running sequence has users. A full block is *cached*: it is found by the digest of its
tokens and of all tokens before. Without a user it is *idle*: still found, and evicted when no empty
block is left, least recently used first. Every operation takes constant time per block. No torch:
this is arithmetic on block numbers.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


class BlockManager:
    """Hands out block numbers ``0 .. num_blocks - 1``."""

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        """
        Args:
            num_blocks: blocks of the cache.
            block_size: tokens per block.
            caching: keep full blocks as prefixes.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = caching
        self._users = [0] * num_blocks
        self._content: list[tuple[bytes, tuple[int, ...]] | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._empty = list(range(num_blocks))[::-1]
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks without a user, which :meth:`allocate` can return."""
        return len(self._empty) + len(self._idle)

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks ``tokens`` tokens take."""
        return -(-tokens // self.block_size)

    def idle_among(self, blocks: Iterable[int]) -> int:
        """Return how many of some blocks have no user: sharing these lowers ``num_free``."""
        return sum(not self._users[block] for block in blocks)

    # ------------------------------------------------------------------------------ users

    def allocate(self, count: int) -> list[int]:
        """Return empty blocks, then idle ones, whose content is forgotten.

        Raises:
            ValueError: fewer than ``count`` are free; none is taken then.
        """
        if count > self.num_free:
            raise ValueError(f"cache: wants {count} blocks, {self.num_free} are free")
        blocks = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                self._forget(block)
            self._users[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a user to each of some blocks that are cached or in use."""
        for block in blocks:
            assert self._users[block] or block in self._idle, f"block {block} holds nothing"
            self._idle.pop(block, None)
            self._users[block] += 1

    def release(self, blocks: Sequence[int], *, forget: bool = False) -> None:
        """Remove a user from each of a sequence's blocks. The last blocks are evicted first.

        Args:
            forget: their content must not be found again.
        """
        for block in reversed(blocks):
            assert self._users[block] > 0, f"block {block} is released twice"
            self._users[block] -= 1
            if forget:
                self._forget(block)
            if not self._users[block]:
                if self._content[block] is None:
                    self._empty.append(block)
                else:
                    self._idle[block] = None

    def fork(self, blocks: Sequence[int], tokens: int) -> tuple[list[int], tuple[int, int] | None]:
        """Make the blocks of a second sequence that begins with ``tokens`` tokens of ``blocks``.

        Full blocks are shared. A partial last block is copied, since both sequences write to it.

        Returns:
            The blocks of the second sequence, and ``(source, target)`` if a block must be copied.
        """
        full, rest = divmod(tokens, self.block_size)
        copied = self.allocate(1) if rest else []  # raises before anything is shared
        self.share(blocks[:full])
        return [*blocks[:full], *copied], (blocks[full], copied[0]) if rest else None

    # ----------------------------------------------------------------------------- prefixes

    def extend_digests(self, digests: list[bytes], tokens: Sequence[int]) -> None:
        """Append the digests of the full blocks of ``tokens`` that ``digests`` lacks.

        A digest covers a block's tokens and the digest before, so all tokens up to its end.
        """
        size = self.block_size
        for start in range(len(digests) * size, len(tokens) // size * size, size):
            parent = digests[-1] if digests else b""
            own = array("q", tokens[start : start + size]).tobytes()
            digests.append(blake2b(parent + own, digest_size=16).digest())

    def match(self, digests: Sequence[bytes], tokens: Sequence[int]) -> list[int]:
        """Return the cached blocks that ``tokens`` begins with, as far as ``digests`` goes.

        Tokens are compared too, so equal digests of other tokens are no hit.
        """
        found: list[int] = []
        for digest in digests:
            block = self._cached.get(digest)
            content = None if block is None else self._content[block]
            start = len(found) * self.block_size
            own = tuple(tokens[start : start + self.block_size])
            if block is None or content is None or content[1] != own:
                break
            found.append(block)
        return found

    def register(self, block: int, digest: bytes, tokens: Sequence[int]) -> None:
        """Cache a full block, unless another block with the same tokens is cached."""
        assert self._users[block] and len(tokens) == self.block_size
        if self.caching and digest not in self._cached and self._content[block] is None:
            self._content[block] = (digest, tuple(tokens))
            self._cached[digest] = block

    def _forget(self, block: int) -> None:
        content = self._content[block]
        if content is not None:
            del self._cached[content[0]]
            self._content[block] = None
