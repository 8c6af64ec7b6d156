"""warmup: what calls need is there before the first, and the memory plan adds up."""

import pytest
import torch

import llmfast
from llmfast.errors import UserError
from llmfast.runner.generate.batch import StaticBatch
from llmfast.runner.generate.override import override_of
from tiny_models import make, tokens


def patched(device):
    model = make("Llama", device)
    llmfast.patch(model, ops="all")
    return model


def test_calls_within_its_bounds_find_everything(device, monkeypatch):
    model = patched(device)
    done = llmfast.warmup(model, batches=(1, 3), max_length=100, sampling=True, progress=False)
    batch = override_of(model).batch
    assert batch.max_rows >= 3 and batch.max_length >= 100
    assert done.graphs == batch.executor.num_graphs == (4 if device.type == "cuda" else 0)
    monkeypatch.setattr(StaticBatch, "__init__", None)  # no other is made
    for rows, draws in ((1, False), (3, True)):
        model.generate(tokens(rows, 80, device), max_new_tokens=20, do_sample=draws)
    assert override_of(model).batch is batch
    assert batch.executor.num_graphs == done.graphs


def test_the_tokens_are_the_same(device):
    cold, warm = patched(device), patched(device)
    llmfast.warmup(warm, max_length=64, progress=False)
    ids = tokens(1, 20, device)
    expected = cold.generate(ids, max_new_tokens=20)
    assert torch.equal(warm.generate(ids, max_new_tokens=20), expected)


def test_the_memory_plan_adds_up(device):
    model = patched(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    done = llmfast.warmup(model, batches=(2,), max_length=128, progress=False)
    assert done.memory["weights"] == sum(p.nbytes for p in model.parameters())
    # keys and values of 2 layers with 2 heads of 16, of 2 sequences of 128 tokens, in float32
    assert done.memory["cache"] == 2 * 2 * 2 * 16 * 2 * 128 * 4
    assert min(done.memory.values()) >= 0
    assert (done.memory["graphs"] > 0) == (device.type == "cuda")
    assert str(done).count("GiB") == 1 and "weights" in str(done)
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device) - before
        planned = sum(done.memory.values()) - done.memory["weights"]
        assert held <= planned + 2**20  # rotary tables, and what the allocator rounds up


def test_a_progress_bar_is_shown_on_demand(device, capsys):
    model = patched(device)
    llmfast.warmup(model, max_length=8, progress=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": ()}, "batches"),
        ({"batches": (0,)}, "batches"),
        ({"max_length": 1}, "max_length"),
    ],
)
def test_bad_arguments_are_named(options, message, device):
    with pytest.raises(UserError, match=message):
        llmfast.warmup(patched(device), progress=False, **options)


def test_a_model_whose_generate_is_its_own_is_refused(device):
    with pytest.raises(UserError, match="not taken over"):
        llmfast.warmup(make("Llama", device))
