"""Tuning without a GPU: the candidates, the choice among them, and the table that it makes."""

import pytest
import torch
from typer.testing import CliRunner

from llmfast.cli.main import app
from llmfast.measure import tune as tuning
from llmfast.measure.shapes import config_of
from llmfast.measure.stats import Estimate
from llmfast.measure.timing import Failure, Timing
from llmfast.measure.tune import candidates, layers_of, tune
from llmfast_kernels.linear import kernel
from llmfast_kernels.linear.launch import OPERATIONS, Launch, read_table

SHARED = [99 * 1024, 163 * 1024, 227 * 1024]
CUBLAS = Launch("cublas")


def test_the_layers_of_the_8b_shape():
    assert layers_of(config_of("llama-3.1-8b")) == [
        ("dense_linear", 6144, 4096),
        ("dense_linear", 4096, 4096),
        ("dense_linear", 28672, 4096),
        ("dense_linear", 4096, 14336),
        ("dense_linear", 128256, 4096),
        ("gated_linear", 14336, 4096),
    ]


@pytest.mark.parametrize("shared_memory", SHARED)
@pytest.mark.parametrize("tokens", tuning.TOKENS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_candidates_fit_and_are_different(operation, tokens, shared_memory):
    for k in (576, 4096, 14336):
        found = list(candidates(operation, k, tokens, shared_memory))
        assert found[0] == CUBLAS and len(found) == len(set(found)) > 4
        assert all(c.fits(tokens, operation == "gated_linear", shared_memory) for c in found)
        assert any(c.tier == "gemv" for c in found) == (tokens == 1)


@pytest.fixture
def timed(monkeypatch):
    """A clock that is told how long a launch takes: a function of (launch, tokens)."""

    def tell(us):
        def time(impls, make_inputs, seconds):
            times = {}
            for name, impl in impls.items():
                took = us(impl.keywords["_launch"], time.tokens)
                ok = Timing(Estimate(took, took, took), 11, 20, 1) if took else None
                times[name] = ok or Failure("out of registers")
            return times

        def fastest(operation, n, k, tokens, launches, dtype):
            time.tokens = tokens
            return choose(operation, n, k, tokens, launches, dtype)

        choose = tuning._fastest
        monkeypatch.setattr(tuning, "time_in_graph", time)
        monkeypatch.setattr(tuning, "_fastest", fastest)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kernel, "shared_memory_of", lambda index: SHARED[-1])
    return tell


def test_the_fastest_is_chosen_and_cublas_where_nothing_is_faster(timed):
    best = Launch("gemv", 4, 2048, 8)

    def us(launch, tokens):
        if tokens == 1:
            return {best: 5.0, CUBLAS: 10.0}.get(launch, 7.0)
        return {CUBLAS: 10.0}.get(launch, 9.95 if tokens == 2 else None)

    timed(us)
    steps = []
    layer = ("dense_linear", 6144, 4096)
    found = tune([layer], (1, 2, 4), progress=lambda *said: steps.append(said))
    # 9.95 is less than cuBLAS's 10, but not by more than the clock's own noise
    assert found == {(*layer, 1): best, (*layer, 2): CUBLAS, (*layer, 4): CUBLAS}
    assert [said[1:] for said in steps] == [(0, 3), (1, 3), (2, 3)]


def test_the_command_adds_to_its_table(timed, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "NVIDIA Toy")
    out = tmp_path / "table.json"

    def call(shape):
        done = CliRunner().invoke(app, ["tune", "--shape", shape, "--out", str(out)])
        assert done.exit_code == 0, done.output
        return done.stdout, read_table(out, "NVIDIA Toy")

    timed(lambda launch, tokens: 10.0)
    said, first = call("smollm2-135m")
    assert "48 launches measured, 0 of them faster" in said.replace("\n", " ")
    assert set(first.values()) == {CUBLAS}
    timed(lambda launch, tokens: 10.0 if launch == CUBLAS else 5.0)
    _, both = call("qwen3-0.6b")
    assert first.items() <= both.items()
    assert {c.tier for key, c in both.items() if key not in first} == {"gemv", "tiles"}


def test_a_damaged_table_is_not_written_over(timed, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "NVIDIA Toy")
    timed(lambda launch, tokens: 10.0)
    out = tmp_path / "table.json"
    out.write_text("{")
    done = CliRunner().invoke(app, ["tune", "--shape", "smollm2-135m", "--out", str(out)])
    assert done.exit_code == 2 and "cannot be read" in done.stderr
    assert out.read_text() == "{"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--shape", "gpt-5"], "--shape must be one of llama-3.1-8b"),
        (["--shape", "qwen3-8b", "--model", "x"], "give --shape or --model, not both"),
        ([], "needs a CUDA device"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(args, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["tune", *args])
    assert done.exit_code == 2
    assert says in done.stderr and done.stderr.count("\n") == 1
