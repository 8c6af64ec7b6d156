"""A process writes its figures as they arrive, each with the run's ceiling."""

import subprocess

import pytest

from llmfast.errors import UserError
from llmfast.measure import environment
from llmfast.measure.environment import capture_env, gpu_folder, run_id
from llmfast.measure.figures import make_row
from llmfast.measure.results import read
from llmfast.measure.stats import Estimate
from recorder import Recorder

TEN = Estimate(10.0, 9.0, 11.0)


def test_rows_are_written_as_they_arrive(tmp_path, env):
    recorder = Recorder(tmp_path, env)
    assert recorder.write() == []
    recorder.set_ceiling(Estimate(3000.0, 2990.0, 3010.0), 25)
    recorder.add("norm", make_row("tokens=1", "llmfast", "us", TEN, 50))
    recorder.write()
    recorder.add("norm", make_row("tokens=1", "llmfast", "us", Estimate(8.0, 8.0, 8.0), 50))
    recorder.add("prefill", make_row("seq=512", "cudnn", "tflops", TEN, 50))
    paths = recorder.write()
    assert {path.name for path in paths} == {"norm.json", "prefill.json", "ceilings.json"}
    for path in paths:
        (run,) = read(path)
        assert run.id == recorder.id and run.id.startswith("20261121T225101Z-1f2e3d4c5b6a-")
        assert [row.value for row in run.rows if row.case == "op=copy"] == [3000.0]
    (run,) = read(tmp_path / "norm.json")
    assert [row.value for row in run.rows if row.metric == "us"] == [8.0]


def test_rows_outside_the_schema_are_refused_at_once(tmp_path, env):
    recorder = Recorder(tmp_path, env)
    with pytest.raises(UserError, match="suite must be one of"):
        recorder.add("noise", make_row("a=1", "llmfast", "us", TEN, 50))
    with pytest.raises(UserError, match="metric must be one of tflops in suite prefill; got 'us'"):
        recorder.add("prefill", make_row("a=1", "llmfast", "us", TEN, 50))
    with pytest.raises(UserError, match="case: "):
        recorder.add("norm", make_row("a", "llmfast", "us", TEN, 50))


@pytest.mark.parametrize(
    ("device", "folder"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("", "unknown"),
    ],
)
def test_a_gpu_names_its_folder(device, folder):
    assert gpu_folder(device) == folder


def test_the_environment_is_found_out():
    env = capture_env(commit="abc")
    assert env.commit == "abc"
    assert all(vars(env).values())
    assert "Z-abc-" in run_id(env) and run_id(env) != run_id(env)


def test_the_commit_tells_of_changed_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "llmfast/measure/environment.py"))
    assert environment._commit() == "unknown"

    def git(*arguments):
        who = ["-c", "user.name=t", "-c", "user.email=t@t"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True
        ).stdout.decode()

    git("init", "-q")
    (tmp_path / "source.py").write_text("1\n")
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "bench/results/norm.json").write_text("1\n")
    git("add", ".")
    git("commit", "-qm", "one")
    head = git("rev-parse", "--short=12", "HEAD").strip()
    (tmp_path / "bench/results/norm.json").write_text("2\n")
    assert environment._commit() == head
    (tmp_path / "source.py").write_text("2\n")
    assert environment._commit() == f"{head}-dirty"
