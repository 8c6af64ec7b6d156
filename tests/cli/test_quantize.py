"""`llmfast quantize`: from a folder to a folder that loads, with refusals in one line."""

import json

import pytest
import torch

import llmfast
from generating import tokenizer
from llmfast.cli.eval import EvalOptions, evaluate
from llmfast.cli.main import app
from llmfast.cli.quantize import QuantizeOptions
from llmfast.errors import UserError
from llmfast.measure.results import parse_case, read
from llmfast.quantization.driver import quantize, simulate
from llmfast.weights.model_weights import quantized_weights_of
from tiny_models import make, tokens

TEXT = "the quick brown fox jumps over the lazy dog " * 40


@pytest.fixture
def folder(tmp_path):
    make("Llama", intermediate_size=128).save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "dense"


def run(capsys, *arguments):
    """Run the program; return its exit code, stdout and stderr."""
    code = app(args=list(map(str, arguments)), prog_name="llmfast", standalone_mode=False)
    out = capsys.readouterr()
    return code or 0, out.out, out.err


@torch.no_grad()
def logits(model):
    return model(tokens(2, 20)).logits


@pytest.mark.parametrize("method", ["nearest", "gptq", "awq"])
def test_a_folder_is_quantized_and_loads(method, folder, capsys):
    out, text = folder.with_name("out"), folder.with_name("text.txt")
    options = ["--method", method, "--group-size", "32", "--zero-points", "--calibration", text]
    code, stdout, err = run(capsys, "quantize", folder, "--out", out, *options, "--device", "cpu")
    assert code == 0
    assert "note: 14 linear layers: 0.3 MiB of weights become 0.1 MiB." in err
    assert stdout.startswith(f"{out}: 14 linear layers in int4-g32-zeros-{method}, ")
    model, ids = llmfast.load(folder, device="cpu").model, None
    if method != "nearest":
        ids = torch.tensor(tokenizer()(TEXT).input_ids)
    found = quantize(
        model, method=method, group_size=32, symmetric=False, calibration=ids, window=256
    )
    loaded = llmfast.load(out, device="cpu").model
    with simulate(model, found):
        assert torch.equal(logits(loaded), logits(model))
    assert len(quantized_weights_of(loaded)) == 14


def test_an_interrupted_run_resumes(folder, capsys, monkeypatch):
    from llmfast.quantization import save

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    out = folder.with_name("out")
    work = folder.with_name(".out.work")
    command = ("quantize", folder, "--out", out, "--group-size", "32", "--device", "cpu")
    with monkeypatch.context() as patched:
        patched.setattr(save, "save_file", full)
        code, stdout, err = run(capsys, *command)
    assert code == 2 and stdout == "" and not out.exists()
    assert err.splitlines()[-1].endswith("cannot be written: No space left on device")
    assert len(list(work.glob("layer*"))) == 2
    code, _, err = run(capsys, *command[:4], "--group-size", "64")
    assert code == 2 and f"{work} holds finished layers of other work (another scheme)" in err
    code, stdout, err = run(capsys, *command)
    assert code == 0 and f"going on with the finished layers in {work}" in err
    assert stdout.startswith(f"{out}: 14 linear layers")
    assert not work.exists()


def test_mistakes_are_one_line_and_code_2(folder, capsys):
    out, text = folder.with_name("out"), folder.with_name("text.txt")
    short = folder.with_name("short.txt")
    short.write_text("a few words")
    for options, says in (
        (["--weights", "int3"], "--weights must be one of int4, int8; got int3"),
        (["--method", "best"], "--method must be one of nearest, gptq, awq; got best"),
        (["--group-size", "48"], "--group-size must be one of 32, 64, 128, 0; got 48"),
        (["--group-size", "128"], "group_size 128 does not divide the 64 inputs"),
        (["--method", "gptq", "--calibration", short], "calibration too short"),
        (["--method", "gptq", "--calibration", "emma"], "or a file; 'emma': No such file"),
        (["--calibration-tokens", "0"], "--calibration-tokens must be at least 1"),
        (["--out", text], "is there already, and not empty"),
        (["--out", folder], "is there already, and not empty"),
        (["--out", folder / "no" / "out"], "--out: there is no folder"),
    ):
        code, stdout, err = run(capsys, "quantize", folder, "--out", out, *options)
        assert code == 2 and stdout == "", options
        (line,) = err.splitlines()
        assert line.startswith("llmfast: error: ") and says in line
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        "dense",
        "short.txt",
        "text.txt",
    ]


def test_eval_quantizes_the_model_and_not_its_reference(folder, capsys):
    path, text = folder.with_name("quality.json"), folder.with_name("text.txt")
    choice = QuantizeOptions(
        "int4", "gptq", 32, calibration="pride-and-prejudice", calibration_tokens=2000
    )
    sizes = {"text": str(text), "tokens": 400, "window": 64, "device": "cpu", "dtype": "float32"}
    quality = evaluate(EvalOptions(model=str(folder), choice=choice, json_path=str(path), **sizes))
    assert quality.kl.value > 1e-5
    dense = evaluate(EvalOptions(model=str(folder), **sizes))
    assert quality.reference_perplexity == dense.perplexity
    (first,) = read(path, suite="quality")
    found = {(row.impl, row.metric): parse_case(row.case)["weights"] for row in first.rows}
    assert found["llmfast", "kl_to_dense"] == "int4-g32-gptq"
    assert found["transformers", "perplexity"] == "fp32"
    capsys.readouterr()
    nearest = evaluate(
        EvalOptions(model=str(folder), choice=QuantizeOptions(group_size=32), **sizes)
    )
    assert nearest.kl.value > 1e-5 and nearest.kl != quality.kl


def test_eval_of_a_saved_folder_beside_the_dense_one(folder, capsys):
    out = folder.with_name("out")
    assert run(capsys, "quantize", folder, "--out", out, "--device", "cpu")[0] == 0
    text = folder.with_name("text.txt")
    sizes = ["--text", text, "--tokens", 400, "--window", 64, "--device", "cpu", "--json", "-"]
    _, stdout, _ = run(capsys, "eval", "--model", out, "--reference", folder, *sizes)
    rows = json.loads(stdout)["runs"][0]["rows"]
    saved = {row["metric"]: row["value"] for row in rows if row["impl"] == "llmfast"}
    assert {parse_case(row["case"])["weights"] for row in rows} == {"int4-g64", "fp32"}
    _, stdout, _ = run(capsys, "eval", "--model", folder, "--weights", "int4", *sizes)
    rows = json.loads(stdout)["runs"][0]["rows"]
    assert saved == {row["metric"]: row["value"] for row in rows if row["impl"] == "llmfast"}
    code, _, err = run(capsys, "eval", "--model", out, "--weights", "int4", *sizes)
    assert code == 2 and "has quantized weights already" in err


def test_calibrating_on_the_text_that_is_measured_is_refused():
    choice = QuantizeOptions(method="gptq", calibration="persuasion")
    with pytest.raises(UserError, match="--calibration must be another text than --text"):
        EvalOptions(choice=choice).check()
