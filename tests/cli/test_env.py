"""`llmfast env`: true on every machine, and it never fails."""

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import llmfast
from llmfast.cli import env
from llmfast.cli.main import app
from llmfast.loading.embedded import INSTALL, embedded_model_path
from llmfast.model.patch import MIN_CAPABILITY


def lines(*args):
    result = CliRunner().invoke(app, ["env", *args])
    assert result.exit_code == 0
    assert result.stderr == ""
    return dict(line.split(maxsplit=1) for line in result.stdout.splitlines())


def facts():
    result = CliRunner().invoke(app, ["env", "--json"])
    assert result.exit_code == 0
    return json.loads(result.stdout)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to have a GPU of the given compute capability."""

    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(env, "_driver", lambda: "580.1")

    return pretend


def test_a_machine_without_gpu(no_gpu):
    got = facts()
    assert got["llmfast"] == llmfast.__version__
    assert got["python"] == sys.version.split()[0]
    assert got["torch"] == torch.__version__
    for name in ("triton", "transformers", "gguf"):
        assert got[name] == metadata.version(name)
    assert got["gpu"] is None
    assert got["kernels"] == "PyTorch references on the CPU"
    assert got["threads"] == torch.get_num_threads()


def test_the_table_says_the_same(no_gpu):
    table = lines()
    assert table["llmfast"] == llmfast.__version__
    assert table["torch"] == torch.__version__
    assert table["GPU"] == "none"
    assert table["kernels"] == "PyTorch references on the CPU"
    assert table["threads"] == str(torch.get_num_threads())


@pytest.mark.parametrize(
    ("capability", "kernels"),
    [
        ((8, 0), "Triton kernels"),
        ((9, 0), "Triton kernels"),
        ((12, 0), "Triton kernels"),
        ((7, 5), "refused: this GPU is older than compute capability 8.0"),
    ],
)
def test_the_gpu_decides_the_tier(gpu, capability, kernels):
    gpu(capability)
    got = facts()
    assert got["gpu"] == {
        "name": "Some GPU",
        "capability": ".".join(map(str, capability)),
        "driver": "580.1",
        "count": 1,
    }
    assert got["kernels"].startswith(kernels)
    assert "Some GPU, compute capability" in lines()["GPU"]


def test_env_and_patch_refuse_the_same_gpus():
    assert env.OLDEST_CAPABILITY == MIN_CAPABILITY


def test_a_gpu_without_triton_is_refused(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(env, "_version", lambda name: None)
    assert facts()["kernels"] == "refused: Triton is not installed"


def test_a_gpu_that_does_not_answer_is_reported(gpu, monkeypatch):
    gpu((9, 0))

    def fail():
        raise RuntimeError("CUDA unknown error\nand more")

    monkeypatch.setattr(torch.cuda, "get_device_name", fail)
    assert facts()["kernels"] == "none: the GPU does not answer (CUDA unknown error)"


def test_missing_packages_are_said_to_be_missing(no_gpu, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setattr(env, "embedded_model_path", lambda: None)
    monkeypatch.setitem(sys.modules, "torch", None)  # its import now fails
    got = facts()
    assert [got[name] for name in (*env.PACKAGES, "embedded_model", "threads")] == [None] * 6
    assert got["kernels"].startswith("none: torch does not import")
    table = lines()
    for name in env.PACKAGES:
        assert table[name] == "not installed"
    assert INSTALL in CliRunner().invoke(app, ["env"]).stdout


@pytest.mark.skipif(embedded_model_path() is None, reason=f"needs the embedded model: {INSTALL}")
def test_the_embedded_models_folder_is_named():
    folder = facts()["embedded_model"]
    assert Path(folder).is_dir()
    assert embedded_model_path() in Path(folder).iterdir()


def test_no_driver_program_is_no_failure(monkeypatch):
    monkeypatch.setattr(env.shutil, "which", lambda name: None)
    assert env._driver() == "unknown"
    monkeypatch.setattr(env.shutil, "which", lambda name: "/nowhere/nvidia-smi")
    assert env._driver() == "unknown"
