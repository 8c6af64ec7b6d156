"""Every operation's test runs on poisoned memory."""

import pytest


@pytest.fixture(autouse=True)
def _poison(poison_empty: None) -> None:
    """Ask for ``poison_empty`` in every test of this folder."""
