"""A check of a block manager's books against the blocks of running sequences."""

from collections.abc import Iterable, Sequence

from llmfast.engine.block_manager import BlockManager


def check_books(manager: BlockManager, tables: Iterable[Sequence[int]]) -> None:
    """Assert that each block has its users or is free once: empty, or idle and found by content."""
    users = [0] * manager.num_blocks
    for blocks in tables:
        assert len(set(blocks)) == len(blocks)
        for block in blocks:
            users[block] += 1
    assert users == manager._users
    free = [*manager._empty, *manager._idle]
    assert len(set(free)) == len(free) == manager.num_free
    assert set(free) == {block for block, count in enumerate(users) if not count}
    assert all(manager._content[block] is None for block in manager._empty)
    assert all(manager._content[block] is not None for block in manager._idle)
    held = {c[0]: block for block, c in enumerate(manager._content) if c is not None}
    assert held == manager._cached
