"""Tuning without a GPU: candidates, the choice among them, and the table."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from llmfast.cli.main import app
from llmfast.measure import tune as tuning
from llmfast.measure.shapes import config_of
from llmfast.measure.timing import Failure, Timing
from llmfast.measure.tune import candidates, layers_of, tune
from llmfast_kernels.common import device
from llmfast_kernels.common.device import INTERPRETER
from llmfast_kernels.linear.launch import VENDOR, Launch
from llmfast_kernels.linear.launch_tables import read_table

SHARED = [99 * 1024, 163 * 1024, 227 * 1024]
CUBLAS, UNFUSED = VENDOR.values()
TOY = replace(INTERPRETER, name="NVIDIA Toy", sm_count=3)


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
@pytest.mark.parametrize("operation", VENDOR)
def test_candidates_fit_and_are_different(operation, tokens, shared_memory):
    for k in (576, 4096, 14336):
        found = candidates(operation, k, tokens, shared_memory)
        assert len(found) == len(set(found)) > 2
        assert all(c.fits(tokens, operation == "gated_linear", shared_memory) for c in found)
        assert {c.tier for c in found} == {"gemv" if tokens == 1 else "tiles"}


@pytest.fixture
def timed(monkeypatch):
    """Return a function that sets how long a launch takes: a function of (launch, tokens)."""

    def tell(us):
        def time(impls, make_inputs, seconds):
            times = {}
            for name, impl in impls.items():
                launch = getattr(impl, "keywords", {"launch": UNFUSED})["launch"]
                took = us(launch, time.key[3])
                ok = Timing((took,) * 11, 20, 1) if took else None
                times[name] = ok or Failure("out of registers")
            return times

        def fastest(key, launches, dtype, dense):
            time.key = key
            dense_layers.append((key, dense))
            return choose(key, launches, dtype, dense)

        choose = tuning._fastest
        monkeypatch.setattr(tuning, "time_in_graph", time)
        monkeypatch.setattr(tuning, "_fastest", fastest)
        monkeypatch.setattr(tuning, "_compile", lambda todo, dtype: iter([(1, 1)]))
        return dense_layers

    dense_layers = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(device, "device_at", lambda index: TOY)
    return tell


def test_the_fastest_is_chosen_and_cublas_where_nothing_is_faster(timed):
    best = Launch("gemv", 4, 2048, 8)

    def us(launch, tokens):
        if tokens == 1:
            return {best: 5.0, CUBLAS: 10.0}.get(launch, 7.0)
        return {CUBLAS: 10.0}.get(launch, 9.95 if tokens == 16 else None)

    timed(us)
    steps = []
    layer = ("dense_linear", 6144, 4096)
    found = tune([layer], (1, 16, 32), progress=lambda *said: steps.append(said))
    # 9.95 is less than cuBLAS's 10, but by no more than the clock's noise
    assert found == {(*layer, 1): best, (*layer, 16): CUBLAS, (*layer, 32): CUBLAS}
    assert [said[1:] for said in steps] == [(1, 1), (0, 3), (1, 3), (2, 3)]


def test_a_gated_layer_is_held_to_its_dense_layer_and_the_activation(timed):
    dense, gated = ("dense_linear", 28672, 4096), ("gated_linear", 14336, 4096)
    given = timed(lambda launch, tokens: 10.0 if launch in (CUBLAS, UNFUSED) else 8.0)
    found = tune([gated, dense], (32,))
    assert given == [((*dense, 32), None), ((*gated, 32), found[*dense, 32])]
    assert {launch.tier for launch in found.values()} == {"tiles"}
    timed(lambda launch, tokens: {UNFUSED: 4.0}.get(launch, 5.0))
    assert tune([gated], (32,)) == {(*gated, 32): UNFUSED}


@pytest.mark.gpu
def test_candidates_are_compiled_in_other_processes():
    todo = {("dense_linear", 64, 128, 1): [Launch("gemv", 1, 128, 2), Launch("gemv", 2, 128, 2)]}
    assert list(tuning._compile(todo, torch.float16)) == [(1, 2), (2, 2)]


def test_the_command_adds_to_its_table(timed, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    out = tmp_path / "table.json"

    def call(shape):
        done = CliRunner().invoke(app, ["tune", "--shape", shape, "--out", str(out)])
        assert done.exit_code == 0, done.output
        return done.stdout, read_table(out, TOY)

    timed(lambda launch, tokens: 10.0)
    said, first = call("smollm2-135m")
    assert "30 launches measured, 0 of them ours" in said.replace("\n", " ")
    assert set(first.values()) == {CUBLAS, UNFUSED}
    timed(lambda launch, tokens: 10.0 if launch in (CUBLAS, UNFUSED) else 5.0)
    _, both = call("qwen3-0.6b")
    assert first.items() <= both.items()
    assert {c.tier for key, c in both.items() if key not in first} == {"gemv", "tiles"}


def test_a_damaged_table_is_not_written_over(timed, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
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
