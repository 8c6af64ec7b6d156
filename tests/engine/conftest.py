"""Fixtures that run the engine as on a CPU and, as far as a CPU can show it, as on a GPU."""

import pytest

from fake_graphs import use_fake_graphs
from llmfast.runner import graphs
from llmfast.runner.executor import Executor


@pytest.fixture(params=["in turn", "ahead"])
def how(request, monkeypatch):
    """Run steps one after another, or as on a GPU: one step ahead of the host, and as graphs.

    The fixture's value: the graphs that were captured and replayed, or None.
    """
    if request.param == "ahead":
        monkeypatch.setattr(Executor, "asynchronous", True)
        monkeypatch.setattr(graphs, "MIXED_TOKENS", 64)  # fewer captures, and large steps too
        monkeypatch.setattr(graphs, "LARGEST_TOKENS", 128)
        monkeypatch.setattr(graphs, "MAX_PROMPTS", 3)
        return use_fake_graphs(monkeypatch)
    return None
