"""Several processes make one run of medians, and no figure is lost."""

from dataclasses import replace

import pytest

from combine import combine_folders, combine_runs
from llmfast.errors import UserError
from llmfast.measure.results import Row, read, write


@pytest.fixture
def three(make_run, make_row, env, copy_row):
    return [
        make_run(
            make_row(value),
            replace(copy_row, value=copy_row.value + i / 10),
            id=f"p{i}",
            env=replace(env, date=f"2026-11-21T22:5{i}:00Z"),
        )
        for i, value in enumerate((12.0, 10.0, 30.0))
    ]


def test_a_figure_is_the_median_and_spans_every_interval(three, env):
    run = combine_runs(three)
    assert run.id == "p2-x3"
    assert run.env == replace(env, date="2026-11-21T22:52:00Z")
    case = "op=rms_norm tokens=1"
    assert run.rows[0] == Row(case, "llmfast", "us", "us", 12.0, 9.0, 31.0, 3)
    assert (run.rows[1].case, run.rows[1].value) == ("op=copy", 3000.1)


def test_processes_must_agree(three, make_row, make_run, env):
    with pytest.raises(UserError, match=r"p0 and p1 differ in gpu: 'NVIDIA H100 .*' and 'A100'"):
        combine_runs([three[0], replace(three[1], env=replace(env, gpu="A100"))])
    with pytest.raises(UserError, match="run p1 lacks op=copy / torch / gb_per_s"):
        combine_runs([three[0], replace(three[1], rows=three[1].rows[:1])])
    with pytest.raises(UserError, match="at least one run"):
        combine_runs([])


def test_commits_may_differ_if_asked_for_and_are_all_named(three, env):
    three[1] = replace(three[1], env=replace(three[1].env, commit="other"))
    with pytest.raises(UserError, match="differ in commit"):
        combine_runs(three)
    run = combine_runs(three, across_commits=True)
    assert run.env.commit == f"{env.commit}+other"


def test_folders_are_combined_into_the_results(three, tmp_path, make_run, make_row):
    folders = [tmp_path / run.id for run in three]
    for folder, run in zip(folders, three, strict=True):
        write(folder / "norm.json", (run,))
    into = tmp_path / "h100"
    old = make_row(1.0, case="tokens=99")
    write(into / "norm.json", (make_run(old, id="old"),))

    assert combine_folders(folders, into) == [into / "norm.json"]
    kept, combined = read(into / "norm.json")
    assert kept.rows == (old,)
    assert combined == combine_runs(three)


def test_folders_that_do_not_fit_leave_the_results_alone(three, tmp_path):
    folders = [tmp_path / run.id for run in three[:2]]
    for folder, run in zip(folders, three[:2], strict=True):
        write(folder / "norm.json", (run,))
    write(folders[0] / "activation.json", (three[0],))
    into = tmp_path / "h100"
    with pytest.raises(UserError, match=r"activation\.json: cannot be read"):
        combine_folders(folders, into)
    assert not into.exists()

    write(folders[1] / "activation.json", (three[0], replace(three[1], rows=(three[1].rows[1],))))
    with pytest.raises(UserError, match="wanted the run of one process, got 2 runs"):
        combine_folders(folders, into)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no results"):
        combine_folders([tmp_path / "empty"], into)
    with pytest.raises(UserError, match="is not a folder"):
        combine_folders([tmp_path / "none"], into)
    assert not into.exists()
