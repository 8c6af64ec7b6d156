"""The engine as it runs on a CPU and, as far as a CPU can show it, on a GPU."""

from types import SimpleNamespace

import pytest

from llmfast.engine import executor, graphs
from llmfast.engine.executor import Executor
from llmfast.engine.graphs import StepGraphs


def capture(step, device, pool):
    """A graph whose replay runs the step, over the same buffers; it is run before, as for one."""
    step()
    return SimpleNamespace(replay=step)


@pytest.fixture(params=["in turn", "ahead"])
def how(request, monkeypatch):
    """On a GPU steps are started before the host has seen the tokens before, and are graphs."""
    if request.param == "ahead":
        monkeypatch.setattr(Executor, "asynchronous", True)
        monkeypatch.setitem(executor.GRAPHS, "cpu", StepGraphs)
        monkeypatch.setattr(graphs, "MIXED_TOKENS", 64)  # fewer captures, and large steps too
        monkeypatch.setattr(graphs, "LARGEST_TOKENS", 128)
        monkeypatch.setattr(graphs, "MAX_PROMPTS", 3)
        monkeypatch.setattr(graphs, "capture", capture)
        monkeypatch.setattr(graphs, "new_pool", object)
