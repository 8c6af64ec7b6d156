"""Which steps are CUDA graphs, which graph a step takes, and what a failed capture does."""

import pytest
import torch

from engines import engine
from fake_graphs import use_fake_graphs
from llmfast.errors import UserError
from llmfast.runner import graphs
from llmfast.runner.graphs import StepGraphs, mixed_buckets, row_bucket, row_buckets, step_shapes
from llmfast.runner.inputs import GraphKey, SamplingOps
from tiny_models import make

OPS = SamplingOps(draws=True, filters=True)


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """The limits that the cases below are made for."""
    monkeypatch.setattr(graphs, "MIXED_TOKENS", 512)
    monkeypatch.setattr(graphs, "LARGEST_TOKENS", 16384)
    monkeypatch.setattr(graphs, "MAX_PROMPTS", 16)


def captured(shapes, sampling=OPS):
    made = StepGraphs(torch.device("cpu"), enabled=True, owner="LLM", advice="lower something")
    made.capture([GraphKey(s, sampling) for s in shapes], lambda _: None, lambda _: None)
    return made


def test_buckets_of_rows():
    assert row_buckets(1) == [1] and row_buckets(6) == [1, 2, 4, 6]
    assert row_buckets(256) == [1, 2, 4, 8, 16, *range(32, 257, 32)]
    assert row_buckets(100) == [1, 2, 4, 8, 16, 32, 64, 96, 100]
    assert all(
        row_bucket(n) >= n and row_bucket(row_bucket(n)) == row_bucket(n) for n in range(1, 300)
    )


def test_buckets_of_mixed_steps():
    assert mixed_buckets(1, 1) == [] and mixed_buckets(4, 2) == [(2, 2)]
    assert mixed_buckets(16, 100) == [(32, 16), (64, 16), (100, 16)]
    assert mixed_buckets(256, 128) == [(32, 32), (64, 32), (64, 64), (128, 32), (128, 128)]
    tokens = [32, 64, *range(128, 513, 64)]
    assert sorted({n for n, _ in mixed_buckets(256, 8192)}) == tokens
    shapes = step_shapes(256, 8192, 9)
    assert len(shapes) == 13 + 2 * len(tokens)
    full = max(shapes, key=lambda shape: shape.tokens)
    assert (full.tokens, full.rows, full.width, full.max_prompts) == (8192, 256, 9, 16)
    assert len(step_shapes(256, 512, 9)) == len(step_shapes(256, 30000, 9))
    assert len(step_shapes(256, 513, 9)) == len(shapes)
    assert all(s.width == 9 and s.logit_rows == s.rows <= s.tokens for s in shapes)
    assert max(s.max_prompts or 0 for s in shapes) == 16
    assert sum(s.max_query_len == 1 for s in shapes) == len(row_buckets(256))


def test_the_smallest_graph_is_taken(monkeypatch):
    use_fake_graphs(monkeypatch)

    def found(tokens, rows, prompts, sampling=OPS):
        key = made.find(
            tokens=tokens,
            rows=rows,
            max_query_len=tokens - rows + 1,
            prompts=prompts,
            sampling=sampling,
        )
        return key and (key.shape.tokens, key.shape.rows, key.shape.max_prompts)

    made = captured(step_shapes(64, 300, 1))
    assert found(3, 3, 0) == (4, 4, None) and found(33, 33, 0) == (64, 64, None)
    assert found(3, 2, 1) == found(32, 32 - 1, 1) == (32, 32, 16)
    assert found(40, 32, 2) == (64, 32, 16) and found(40, 33, 2) == (64, 64, 16)
    assert found(257, 1, 1) == (300, 32, 16) and found(300, 64, 16) == (300, 64, 16)
    assert found(301, 5, 1) is None and found(300, 65, 1) is None
    assert found(300, 17, 17) is None and found(65, 65, 0) is None
    assert found(3, 3, 0, sampling=None) is None  # a graph that samples does not end at the logits
    made = captured(step_shapes(64, 2000, 1))
    assert found(512, 64, 16) == (512, 64, 16) and found(513, 3, 2) is None
    assert found(1874, 3, 2) is None  # padding would cost more than it spares
    assert found(1875, 3, 2) == found(2000, 64, 16) == (2000, 64, 16)
    assert found(2000, 64, 17) is None and found(2001, 3, 2) is None


def test_any_number_of_rows_may_verify_several_tokens(monkeypatch):
    """A graph for rows of up to four tokens takes more such rows than a step has prompts."""
    use_fake_graphs(monkeypatch)
    shape = graphs.StepShape(4 * 64, 64, 1, 4 * 64, max_query_len=4)
    made = captured([*step_shapes(64, 300, 1), shape])
    key = made.find(tokens=200, rows=50, max_query_len=4, prompts=50, sampling=OPS)
    assert key is not None and key.shape == shape


def test_a_capture_without_memory_drops_all_graphs(monkeypatch):
    runs = []

    def capture(step):
        runs.append(step)
        if len(runs) == 3:
            raise torch.OutOfMemoryError("out of memory")

    use_fake_graphs(monkeypatch, capture)
    made = StepGraphs(torch.device("cpu"), enabled=True, owner="LLM", advice="lower something")
    keys = [GraphKey(shape, OPS) for shape in step_shapes(8, 8, 1)]
    with pytest.raises(UserError, match=r"LLM: no memory .* of \d+ sequences; lower something"):
        made.capture(keys, lambda _: None, lambda _: None)
    assert not len(made) and made.enabled
    made.capture(keys[:1], lambda _: None, lambda _: None)
    assert len(made) == 1


def test_a_capture_that_raises_leaves_no_graph(monkeypatch, caplog):
    runs = []

    def capture(step):
        runs.append(step)
        if len(runs) == 3:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    use_fake_graphs(monkeypatch, capture)
    made = StepGraphs(torch.device("cpu"), enabled=True, owner="LLM", advice="")
    keys = [GraphKey(shape, OPS) for shape in step_shapes(8, 8, 1)]
    for _ in range(2):
        made.capture(keys, lambda _: None, lambda _: None)
        assert not len(made) and not made.enabled
    assert len(runs) == 3 and len(caplog.records) == 1
    assert "since one raised: operation not permitted when stream is cap" in caplog.text


def test_no_memory_for_the_graphs_of_an_engine(monkeypatch):
    def capture(step):
        raise torch.OutOfMemoryError("out of memory")

    use_fake_graphs(monkeypatch, capture)
    model = make("Llama").double()
    with pytest.raises(
        UserError, match=r"no memory is left for a CUDA graph of \d+ tokens of 16 s"
    ):
        engine(model=model, max_num_seqs=16)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())  # not merged
    engine(model=model, enforce_eager=True).close()
