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

FREED = 0  # stands in a block table for a block behind the window, which is not read


class BlockManager:
    """Hands out the block numbers ``0 .. num_blocks - 1`` of a cache group."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        window: int | None = None,
        caching: bool = True,
    ) -> None:
        """
        Args:
            num_blocks: blocks of the group.
            block_size: tokens per block.
            window: tokens that a query sees, its own included; None: all.
            caching: keep full blocks as prefixes.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.window = window
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

    def first_needed(self, tokens: int) -> int:
        """Return the first block that queries after the full blocks of ``tokens`` tokens read."""
        if self.window is None:
            return 0
        size = self.block_size
        return max(tokens // size * size - self.window + 1, 0) // size

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
        Blocks that are not needed after ``tokens`` tokens are left out, as :data:`FREED`.

        Returns:
            The blocks of the second sequence, and ``(source, target)`` if a block must be copied.
        """
        full, rest = divmod(tokens, self.block_size)
        first = self.first_needed(tokens)
        copied = self.allocate(1) if rest else []  # raises before anything is shared
        self.share(blocks[first:full])
        shared = [*[FREED] * first, *blocks[first:full], *copied]
        return shared, (blocks[full], copied[0]) if rest else None

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
            block = self.find(digest, tokens, len(found))
            if block is None:
                break
            found.append(block)
        return found

    def find(self, digest: bytes, tokens: Sequence[int], index: int) -> int | None:
        """Return the cached block of the tokens of block ``index`` of ``tokens``."""
        block = self._cached.get(digest)
        content = None if block is None else self._content[block]
        if content is None:
            return None
        start = index * self.block_size
        return block if content[1] == tuple(tokens[start : start + self.block_size]) else None

    def register(self, block: int, digest: bytes, tokens: Sequence[int]) -> None:
        """Cache a full block, unless another block with the same tokens is cached."""
        assert self._users[block] and len(tokens) == self.block_size
        if self.caching and digest not in self._cached and self._content[block] is None:
            self._content[block] = (digest, tuple(tokens))
            self._cached[digest] = block

    def forget(self, digests: Iterable[bytes]) -> None:
        """Let no cached block of these digests be found again, whether it is used or idle."""
        for digest in digests:
            block = self._cached.get(digest)
            if block is None:
                continue
            self._forget(block)
            if block in self._idle:
                del self._idle[block]
                self._empty.append(block)

    def _forget(self, block: int) -> None:
        content = self._content[block]
        if content is not None:
            del self._cached[content[0]]
            self._content[block] = None


def match_prefix(
    groups: Sequence[BlockManager], digests: Sequence[bytes], tokens: Sequence[int]
) -> list[list[int]]:
    """Return for each cache group the blocks of the longest prefix that all of them hold.

    A group of full attention holds a prefix with all its blocks, a sliding-window group with those
    that the next query reads; the others are :data:`FREED`.
    """
    first = groups[0]
    if len(groups) == 1 and first.window is None:
        return [first.match(digests, tokens)]
    found: list[Sequence[int | None]] = []
    length = len(digests)
    for group in groups:
        if group.window is None:
            held = group.match(digests, tokens)
            length = min(length, len(held))
            found.append(held)
        else:
            found.append([group.find(digests[i], tokens, i) for i in range(length)])
    before = None
    while length != before:
        before = length
        for group, blocks in zip(groups, found, strict=True):
            length = _longest_hit(group, blocks, length)
    result: list[list[int]] = []
    for group, blocks in zip(groups, found, strict=True):
        needed = group.first_needed(length * group.block_size)
        own = [block for block in blocks[needed:length] if block is not None]
        result.append([FREED] * needed + own)
    return result


def _longest_hit(group: BlockManager, blocks: Sequence[int | None], length: int) -> int:
    """Return the most blocks, at most ``length``, of which those that a query reads are found."""
    end = length
    while end:
        first = group.first_needed(end * group.block_size)
        missing = next((i for i in range(end - 1, first - 1, -1) if blocks[i] is None), None)
        if missing is None:
            return end
        end = missing  # every longer prefix needs that block, too
    return 0
