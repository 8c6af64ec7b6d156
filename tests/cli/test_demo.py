"""`llmfast demo`: an answer with its statistics, then the kernels' verification."""

import os
import subprocess
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import llmfast
from llmfast.cli import demo, interpreted, ui
from llmfast.cli.main import app
from llmfast.errors import UserError
from llmfast.loading.embedded import INSTALL, embedded_model_path


@pytest.fixture
def calls(monkeypatch):
    """Record the commands that the demo would run."""
    calls = SimpleNamespace(requests=[], children=[], code=0)

    def run(command, env):
        calls.children.append((command, env))
        return SimpleNamespace(returncode=calls.code)

    monkeypatch.setattr(demo, "answer", calls.requests.append)
    monkeypatch.setattr(demo.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return calls


def run():
    return CliRunner().invoke(app, ["demo"])


def test_without_a_gpu_it_answers_then_interprets(calls):
    result = run()
    assert result.exit_code == 0
    (request,) = calls.requests
    assert (request.prompt, request.model, request.stats) == (demo.QUESTION, None, True)
    assert request.greedy
    ((command, env),) = calls.children
    assert command[0] == sys.executable
    assert command[-3:] == ["-m", "llmfast.cli.interpreted", demo.QUESTION]
    assert env == os.environ | {"TRITON_INTERPRET": "1"}
    assert demo.QUESTION in result.stdout


def test_with_a_gpu_it_only_answers(calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run().exit_code == 0
    assert len(calls.requests) == 1
    assert calls.children == []


def test_without_triton_it_says_so(calls, monkeypatch):
    monkeypatch.setattr(demo.util, "find_spec", lambda name: None)
    result = run()
    assert result.exit_code == 0
    assert calls.children == []
    assert "Triton is not installed" in result.stderr


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (-9, 1)])
def test_a_failed_verification_fails_the_demo(calls, code, expected):
    calls.code = code
    assert run().exit_code == expected


class Table(SimpleNamespace):
    def __str__(self):
        return "a table"


@pytest.fixture
def verification(monkeypatch):
    """A stand-in for the verification; set `.result` to what it returns, or to what it raises."""
    module = types.ModuleType("llmfast.model.demo")
    module.result = Table(swapped=4, kept=0)

    def verify_first_block(model, token_ids):
        module.asked = (model, token_ids.tolist())
        if isinstance(module.result, BaseException):
            raise module.result
        return module.result

    def tokenizer(text, **kwargs):
        return {"input_ids": [ord(c) for c in text]}

    def load(path, *, device, dtype, on_progress):
        assert (path, device, dtype) == (None, "cpu", "float32")
        return "model", tokenizer

    module.verify_first_block = verify_first_block
    monkeypatch.setitem(sys.modules, "llmfast.model.demo", module)
    monkeypatch.setattr(llmfast, "load", load)
    return module


def test_the_report_is_printed(verification, capsys):
    assert interpreted.main("why") == 0
    assert verification.asked == ("model", [[119, 104, 121]])
    assert capsys.readouterr() == ("a table\n", "")


@pytest.mark.parametrize("counts", [(3, 1), (0, 0)])
def test_a_kernel_that_is_not_verified_fails_the_demo(verification, counts, capsys):
    verification.result = Table(swapped=counts[0], kept=counts[1])
    assert interpreted.main("why") == 1
    assert capsys.readouterr() == (
        "a table\n",
        "llmfast: error: a kernel of the first block failed its numerical check: "
        "the table says which\n",
    )


def test_a_mistake_in_the_child_is_one_line(verification, capsys):
    verification.result = UserError("no embedded model")
    assert interpreted.main("why?") == 2
    assert capsys.readouterr() == ("", "llmfast: error: no embedded model\n")


def test_ctrl_c_in_the_child_is_quiet(verification, capsys):
    verification.result = KeyboardInterrupt()
    assert interpreted.main("why?") == ui.INTERRUPTED
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(embedded_model_path() is None, reason=f"needs the embedded model: {INSTALL}")
def test_the_whole_demo():
    result = subprocess.run(
        [sys.executable, "-m", "llmfast", "demo"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "The capital of France is Paris." in result.stdout
    for figure in ("time to first token", "tokens/s", "peak memory"):
        assert figure in result.stderr
    assert "rms_norm" in result.stdout + result.stderr
