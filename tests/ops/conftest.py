"""Every operation's test runs on poisoned memory."""

import pytest


@pytest.fixture(autouse=True)
def _poison(poison_empty: None) -> None:
    """Ask for ``poison_empty`` in every test of this folder."""


@pytest.fixture
def no_workspaces():
    """Free the workspaces of quantized layers before and after a test."""
    from llmfast_kernels.quantized_linear import free_workspaces

    free_workspaces()
    yield
    free_workspaces()
