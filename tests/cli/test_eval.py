"""`llmfast eval` on a tiny model: comparisons, output, files and refusals."""

import json
from typing import NamedTuple

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import llmfast
from llmfast.cli import eval as eval_module
from llmfast.cli.eval import EvalOptions, evaluate
from llmfast.errors import UserError
from llmfast.measure.results import parse_case, read, validate

SMALL = {"tokens": 200, "window": 32}


def tiny(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def tokenizer(text, *, verbose):
    assert verbose is False
    return {"input_ids": [ord(c) % 64 for c in text]}


@pytest.fixture
def loads(monkeypatch):
    """Make ``llmfast.load`` return tiny models: a different one for the name "other"."""
    asked = []

    class Loaded(NamedTuple):
        model: object
        tokenizer: object

    def load(path=None, *, device=None, dtype=None, on_progress=None):
        asked.append((path, device, dtype))
        return Loaded(tiny(int(path == "other")), tokenizer)

    monkeypatch.setattr(llmfast, "load", load, raising=False)
    return asked


def test_patched_and_unpatched_agree_within_float32(loads, capsys):
    found = evaluate(EvalOptions(ops="all", **SMALL))
    # float32 sums in another order: logits differ by some epsilons of 1.2e-7
    assert found.perplexity_ratio.value == pytest.approx(1, abs=1e-5)
    assert 0 <= abs(found.kl.value) < 1e-9
    assert found.top1_agreement.value == 1.0
    out = capsys.readouterr().out
    assert "perplexity, unpatched" in out and "modules swapped" in out
    assert "0 modules swapped" not in out
    assert "persuasion, 193 tokens scored in 7 windows of 32" in out
    assert len(loads) == 1


def test_on_a_cpu_nothing_is_swapped_unless_asked_for(loads, capsys):
    if torch.cuda.is_available():
        pytest.skip("tests what happens to a model on the CPU by default; needs no CUDA device")
    found = evaluate(EvalOptions(**SMALL))
    assert found.kl.value == 0.0
    out = capsys.readouterr().out
    assert "0 modules swapped" in out and "ops='all'" in out.replace('"', "'")


def test_a_reference_is_another_model(loads):
    found = evaluate(EvalOptions(reference="other", device="cpu", dtype="float32", **SMALL))
    assert loads == [(None, "cpu", "float32"), ("other", "cpu", "float32")]
    assert found.kl.low > 0.1
    assert found.top1_agreement.high < 0.5


def test_the_twin_shares_the_weights_and_is_not_patched():
    model = tiny()
    twin = eval_module._twin(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    ids = torch.arange(16)[None]
    before = twin(input_ids=ids).logits
    llmfast.patch(model, ops="all")
    assert not [module for module in twin.modules() if "forward" in vars(module)]
    assert torch.equal(twin(input_ids=ids).logits, before)


def test_json_is_a_results_file_of_its_own_rows(loads, tmp_path, capsys):
    path = tmp_path / "figures.json"
    evaluate(EvalOptions(ops="all", json_path=str(path), **SMALL))
    evaluate(EvalOptions(ops="all", json_path=str(path), stride=16, **SMALL))
    runs = read(path, suite="quality")
    assert len(runs[-1].rows) == 5
    case = parse_case(runs[-1].rows[0].case)
    assert case == {
        "model": "smollm2-135m",
        "weights": "fp32",
        "text": "persuasion",
        "tokens": "200",
        "window": "32",
        "stride": "16",
    }
    assert sum(len(run.rows) for run in runs) == 10
    capsys.readouterr()

    evaluate(EvalOptions(reference="org/Other Model=2", json_path="-", **SMALL))
    out = capsys.readouterr()
    data = json.loads(out.out)
    validate(data, suite="quality")
    cases = {row["impl"]: parse_case(row["case"])["model"] for row in data["runs"][0]["rows"]}
    assert cases == {"llmfast": "smollm2-135m", "transformers": "other-model-2"}
    assert "top-1 agreement" in out.err and "modules swapped" in out.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window": 1}, "--window must be at least 2 tokens, got 1"),
        ({"tokens": 32}, "--tokens must be more than one window of 32"),
        ({"stride": 33}, "--stride must be from 1 to the window of 32, got 33"),
        ({"text": "emma"}, "persuasion or pride-and-prejudice or a file; 'emma'"),
        ({"json_path": "nowhere/f.json"}, "--json: there is no folder nowhere"),
        ({"json_path": "."}, "--json: . is a folder"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_loaded(loads, options, says):
    with pytest.raises(UserError, match=says):
        evaluate(EvalOptions(**SMALL | options))
    assert loads == []


def test_options_that_do_not_fit_the_model_are_refused(loads, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("It was a truth.")
    with pytest.raises(UserError, match=r"short\.txt has 15 tokens for this model, got 200"):
        evaluate(EvalOptions(text=str(short), **SMALL))
    with pytest.raises(UserError, match="context of 64 tokens, got 65"):
        evaluate(EvalOptions(tokens=200, window=65))
    with pytest.raises(UserError, match="norms"):
        evaluate(EvalOptions(ops="norms", **SMALL))


def test_the_command_passes_its_options_on(loads):
    app = typer.Typer()
    app.command()(eval_module.eval_command)
    arguments = ["--tokens", "200", "--window", "32", "--ops", "norm, activation", "--text"]
    result = CliRunner().invoke(app, [*arguments, "pride-and-prejudice"])
    assert result.exit_code == 0, result.output
    assert "pride-and-prejudice, 193 tokens" in result.output
    help_text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    for option in ("--model", "--reference", "--text", "--tokens", "--window", "--ops", "--json"):
        assert option in help_text
