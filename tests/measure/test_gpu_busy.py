"""The GPU's busy share from made-up kernels, and the choice of an engine's steps."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines import engine, executor_of
from llmfast.errors import UserError
from llmfast.measure import gpu_busy, offline, shapes
from llmfast.measure.figures import BenchResult
from llmfast.measure.gpu_busy import StepProfile, busy_share, profile_steps, union_length
from llmfast.measure.shapes import Source
from llmfast.measure.suites import SUITES
from llmfast.measure.workload import Workload
from llmfast.runner.results import StepHandle


@pytest.mark.parametrize(
    ("intervals", "length"),
    [
        ([], 0),
        ([(2, 5)], 3),
        ([(2, 5), (7, 8)], 4),
        ([(2, 5), (5, 8)], 6),
        ([(4, 8), (2, 5)], 6),  # overlapping and unordered
        ([(1, 9), (2, 3), (4, 10)], 9),  # one inside another
        ([(1, 2), (1, 2), (3, 3)], 1),
    ],
)
def test_union_length(intervals, length):
    assert union_length(intervals) == length


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), min_size=1, max_size=20))
def test_union_length_counts_each_moment_once(starts):
    intervals = [(start, start + length) for start, length in starts]
    moments = {moment for start, end in intervals for moment in range(start, end)}
    assert union_length(intervals) == len(moments)
    if moments:
        first, last = min(s for s, _ in intervals), max(e for _, e in intervals)
        assert busy_share(intervals) == len(moments) / (last - first)


def test_the_share_is_of_the_time_from_first_to_last():
    assert busy_share([(10, 11), (12, 14)]) == 0.75
    for empty in ([], [(3, 3)]):
        with pytest.raises(ValueError, match="some length"):
            busy_share(empty)


def test_only_kernels_of_a_trace_count(monkeypatch):
    def event(name, device, start, end, annotation=False):
        return SimpleNamespace(
            name=name,
            device_type=SimpleNamespace(name=device),
            time_range=SimpleNamespace(start=start, end=end),
            is_user_annotation=annotation,
        )

    class Profile:
        def __init__(self, activities):
            assert [activity.name for activity in activities] == ["CUDA"]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.left = True

        def events(self):
            assert self.left
            return [
                event("gemv", "CUDA", 1e6, 2e6),
                event("Memcpy HtoD", "CUDA", 2e6, 3e6),
                event("Memset (Device)", "CUDA", 2e6, 3e6),
                event("cudaLaunchKernel", "CPU", 3e6, 4e6),
                event("ProfilerStep#1", "CUDA", 0, 9e6, annotation=True),
                event("attention", "CUDA", 4e6, 4.5e6),
            ]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with gpu_busy.trace_kernels() as found:
        assert found == []
    assert found == [(1.0, 2.0), (4.0, 4.5)]


WORK = Workload(requests=4, input=(3, 20), output=(20, 25))


@contextmanager
def kernels():
    """Pretend that ten steps take a second each, with a kernel in the first half of each."""
    intervals = []
    yield intervals
    intervals += [(i, i + 0.5) for i in range(10)]


def test_steps_are_measured_once_all_decode(monkeypatch):
    with engine() as llm:
        steps, clock = [], iter(range(10_000))
        step = llm.core.step

        def watch():
            running = llm.core.scheduler.running
            steps.append((len(running), [s.remaining for s in running]))
            step()
            executor_of(llm).results.waited += 0.25

        monkeypatch.setattr(llm.core, "step", watch)
        monkeypatch.setattr(gpu_busy, "_now", lambda: float(next(clock)))
        found = profile_steps(llm, *WORK.draw(101), clocked=5, traced=10, trace=kernels)
        assert llm.core.idle
    looked_at = steps[-15:]
    assert looked_at == [(4, [1] * 4)] * 15 and steps[0] == (0, [])
    assert found.host_seconds == [0.75] * 5  # one tick, of which a quarter is waiting
    assert (found.busy_share, found.gpu_seconds) == (5 / 9.5, 0.5)


def test_of_the_clocked_steps_those_with_the_most_sequences_count():
    with engine() as llm:
        work = Workload(requests=3, input=(3, 3), output=(2, 30))
        outputs = sorted(p.max_tokens for p in work.draw(101)[1])
        found = profile_steps(llm, *work.draw(101), clocked=20, traced=2, trace=kernels)
    assert outputs[0] < 20  # so one ends during the measurement
    assert len(found.host_seconds) == outputs[0] - 1 and all(
        seconds > 0 for seconds in found.host_seconds
    )


def test_more_requests_than_run_at_the_same_time():
    with engine(max_num_seqs=2) as llm:
        found = profile_steps(llm, *WORK.draw(101), clocked=3, traced=4, trace=kernels)
    assert len(found.host_seconds) == 3


def test_answers_that_end_too_early_are_the_users_mistake():
    with engine() as llm:
        with pytest.raises(UserError, match="--busy wants 250 steps in which all"):
            profile_steps(llm, *WORK.draw(101), trace=kernels)
        assert llm.core.idle


def test_waiting_for_a_step_is_counted(monkeypatch):
    now = iter([3.0, 5.5, 7.0, 8.0])
    waits = []

    class Event:
        def synchronize(self):
            waits.append(1)

    with engine() as llm:
        executor = executor_of(llm)
        monkeypatch.setattr("llmfast.runner.results.time.perf_counter", lambda: next(now))
        for _ in range(2):
            result = executor.collect(StepHandle(1, result=torch.tensor([[7], [0]]), done=Event()))
            assert result.tokens.tolist() == [7] and result.status is None
        monkeypatch.undo()
        assert executor.waited == llm.core.model_runner.waited == 2.5 + 1 and len(waits) == 2


def test_figures():
    found = BenchResult({"model": "m"})
    profile = StepProfile([0.003, 0.001, 0.002], 0.9, 0.01)
    offline.add_step_profile(found, {"requests": 2}, profile)
    figures = {row.metric: (row.value, row.repeats) for row in found.rows}
    assert figures == {
        "host_ms_per_step": (2.0, 3),
        "gpu_ms_per_step": (10.0, 1),
        "gpu_busy_share": (0.9, 1),
    }
    assert figures.keys() <= set(SUITES["throughput"].metrics)


def test_it_wants_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shapes, "random_model", None)  # nothing is made before
    with pytest.raises(UserError, match="--busy needs a CUDA device"):
        offline.measure_throughput(Source("qwen3-0.6b"), WORK, busy=True)


def test_text_of_tokens_that_the_tokenizer_does_not_have():
    text = gpu_busy.FoldedTokenizer()
    assert text.decode([len(text) + 504, 504]) == text.decode([504, 504]) != ""
