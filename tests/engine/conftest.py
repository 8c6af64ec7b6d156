"""The engine as it runs on a CPU and, as far as a CPU can show it, on a GPU."""

from types import SimpleNamespace

import pytest

from llmfast.engine import executor
from llmfast.engine.executor import Executor
from llmfast.engine.graphs import DecodeGraphs, Graph
from llmfast.engine.inputs import Size


class Replayed(DecodeGraphs):
    """Graphs whose replay runs the step, over the same buffers and padded to the same buckets."""

    def _capture(self, key):
        size = Size(key[0], key[0], self._width)
        return Graph(size, SimpleNamespace(replay=lambda: self._decode(size, *key[1:])))


@pytest.fixture(params=["in turn", "ahead"])
def how(request, monkeypatch):
    """On a GPU steps are started before the host has seen the tokens before, and are graphs."""
    if request.param == "ahead":
        monkeypatch.setattr(Executor, "asynchronous", True)
        monkeypatch.setitem(executor.GRAPHS, "cpu", Replayed)
