"""Which steps are CUDA graphs, and which graph a step takes."""

from types import SimpleNamespace

import pytest
import torch

from engines import engine
from llmfast.engine import executor, graphs
from llmfast.engine.graphs import buckets, mixed_buckets
from llmfast.engine.inputs import Size
from llmfast.errors import UserError
from tiny_models import make


def test_buckets_of_rows():
    assert buckets(1) == [1] and buckets(6) == [1, 2, 4, 6]
    assert buckets(256) == [1, 2, 4, 8, 16, *range(32, 257, 32)]
    assert buckets(100) == [1, 2, 4, 8, 16, 32, 64, 96, 100]


def test_buckets_of_mixed_steps(monkeypatch):
    monkeypatch.setattr(graphs, "MIXED_TOKENS", 512)
    monkeypatch.setattr(graphs, "LARGEST_TOKENS", 16384)
    monkeypatch.setattr(graphs, "MAX_PROMPTS", 16)
    assert mixed_buckets(1, 1) == [] and mixed_buckets(4, 2) == [(2, 2)]
    assert mixed_buckets(16, 100) == [(32, 16), (64, 16), (100, 16)]
    assert mixed_buckets(256, 128) == [(32, 32), (64, 32), (64, 64), (128, 32), (128, 128)]
    tokens = [32, 64, *range(128, 513, 64)]
    assert sorted({n for n, _ in mixed_buckets(256, 8192)}) == tokens
    sizes = graphs.graph_sizes(256, 8192, 9)
    assert len(sizes) == 13 + 2 * len(tokens)
    assert sizes[-1] == Size(8192, 256, 9, 16)  # a full step
    assert len(graphs.graph_sizes(256, 512, 9)) == len(graphs.graph_sizes(256, 30000, 9))
    assert len(graphs.graph_sizes(256, 513, 9)) == len(sizes)
    assert all(s.width == 9 and s.rows <= s.tokens for s in sizes)
    assert max(s.prompts for s in sizes) == 16
    assert sum(s.prompts == 0 for s in sizes) == len(buckets(256))


def test_the_smallest_graph_is_taken(monkeypatch):
    monkeypatch.setattr(graphs, "capture", lambda *_: SimpleNamespace(replay=None))
    monkeypatch.setattr(graphs, "new_pool", object)
    monkeypatch.setattr(graphs, "MIXED_TOKENS", 512)
    monkeypatch.setattr(graphs, "LARGEST_TOKENS", 16384)
    monkeypatch.setattr(graphs, "MAX_PROMPTS", 16)
    sizes = graphs.graph_sizes(64, 300, 1)
    made = graphs.StepGraphs(lambda _: None, lambda _: None, torch.device("cpu"), sizes)

    def found(*step):
        graph = made.get(*step)
        return graph and (graph.size.tokens, graph.size.rows, graph.size.prompts)

    assert found(3, 3, 0) == (4, 4, 0) and found(33, 33, 0) == (64, 64, 0)
    assert found(3, 2, 1) == found(32, 32, 1) == (32, 32, 16)
    assert found(40, 32, 2) == (64, 32, 16) and found(40, 33, 2) == (64, 64, 16)
    assert found(257, 1, 1) == (300, 32, 16) and found(300, 64, 16) == (300, 64, 16)
    assert found(301, 5, 1) is None and found(300, 65, 1) is None
    assert found(300, 17, 17) is None and found(65, 65, 0) is None
    sizes = graphs.graph_sizes(64, 2000, 1)
    made = graphs.StepGraphs(lambda _: None, lambda _: None, torch.device("cpu"), sizes)
    assert found(512, 64, 16) == (512, 64, 16) and found(513, 3, 2) is None
    assert found(1874, 3, 2) is None  # padding would cost more than it spares
    assert found(1875, 3, 2) == found(2000, 64, 16) == (2000, 64, 16)
    assert found(2000, 64, 17) is None and found(2001, 3, 2) is None


def test_no_memory_for_the_graphs(monkeypatch):
    def capture(step, device, pool):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setitem(executor.GRAPHS, "cpu", graphs.StepGraphs)
    monkeypatch.setattr(graphs, "new_pool", object)
    model = make("Llama").double()
    with pytest.raises(
        UserError, match=r"no memory is left for a CUDA graph of \d+ tokens of 16 s"
    ):
        engine(model=model, max_num_seqs=16)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())  # not merged
    engine(model=model, enforce_eager=True).close()
