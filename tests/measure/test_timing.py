"""Timing: its choices on any machine, its measurements on a GPU."""

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from llmfast.errors import UserError
from llmfast.measure import timing
from llmfast.measure.stats import Estimate
from llmfast.measure.timing import (
    L2_MULTIPLE,
    MAX_CALLS,
    MAX_SETS,
    MIN_CALLS,
    MIN_ROUNDS,
    Failure,
    Timing,
    copy_bandwidth,
    copy_bytes,
    count_calls,
    count_rounds,
    count_sets,
    round_order,
    time_in_graph,
)

MIB, GIB = 2**20, 2**30
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@pytest.mark.parametrize("size", [1, 12 * MIB, 50 * MIB, 199 * MIB, 200 * MIB, 10 * GIB])
def test_a_pass_over_the_sets_passes_the_l2_four_times_and_no_more(size):
    n = count_sets(50 * MIB, size, size, 80 * GIB)
    assert n == 1 or (n - 1) * size < L2_MULTIPLE * 50 * MIB
    assert n == MAX_SETS or n * size >= L2_MULTIPLE * 50 * MIB


def test_sets_fit_in_memory():
    # a call reads 1 MiB of a set that holds 1 GiB
    assert count_sets(50 * MIB, MIB, GIB, 80 * GIB) == 20
    assert count_sets(50 * MIB, MIB, GIB, GIB) == 1


@pytest.mark.parametrize("sets", [1, 3, 20, 21, 256])
@pytest.mark.parametrize("us", [0.0, 0.4, 2.0, 49.0, 51.0, 1e4])
def test_a_graph_holds_whole_passes_and_lasts_a_millisecond(sets, us):
    calls = count_calls(sets, us)
    assert calls % sets == 0 and calls >= MIN_CALLS
    assert calls * us >= 1000 or calls >= MAX_CALLS
    # one pass less would be too few
    assert calls == sets or calls - sets < MIN_CALLS or (calls - sets) * us < 1000


def test_rounds_follow_the_time_there_is():
    assert count_rounds(1e3, 50, seconds=4) == 50
    assert count_rounds(1e5, 50, seconds=4) == 40
    assert count_rounds(1e7, 50, seconds=4) == MIN_ROUNDS
    assert count_rounds(1e7, 5, seconds=4) == 5
    assert count_rounds(0.0, 50, seconds=4) == 50


def test_every_round_has_every_implementation_in_changing_order():
    names = ["a", "b", "c"]
    orders = [round_order(names, index) for index in range(60)]
    assert all(sorted(order) == names for order in orders)
    assert orders == [round_order(names, index) for index in range(60)]
    assert {order[0] for order in orders} == set(names)
    assert {order[order.index("b") - 1] for order in orders if order[0] != "b"} == {"a", "c"}


def test_rates_come_from_the_time():
    found = Timing((2.0, 4.0, 1.0), calls=20, sets=1)
    assert (found.us, found.rounds) == (Estimate(2.0, 1.0, 4.0), 3)
    assert found.per_second(6000) == Estimate(3.0, 1.5, 6.0)  # 6 kB in 2 us are 3 GB/s


@needs_none
def test_without_a_gpu_it_says_so():
    with pytest.raises(UserError, match="time_in_graph: needs a CUDA device"):
        time_in_graph({"a": torch.add}, lambda: (torch.ones(1), torch.ones(1)))
    with pytest.raises(UserError, match="copy_bandwidth: needs a CUDA device"):
        copy_bandwidth()


class FakeGpu:
    """A clock that functions advance, in microseconds, and graphs that play what they captured."""

    def __init__(self):
        self.now = 0.0
        self.capturing = None
        self.replayed = []

    def run(self, us, name=""):
        if self.capturing is not None:
            self.capturing.append((us, name))
        else:
            self.now += us

    @contextmanager
    def graph(self, graph, stream):
        self.capturing = graph.calls
        try:
            yield
        except Exception:
            raise RuntimeError("capture was cut short") from None
        finally:
            self.capturing = None

    def make_graph(self):
        def replay():
            self.replayed.append(graph.calls[0][1])
            self.now += sum(us for us, _ in graph.calls) + 5  # 5: the start of a graph

        graph = SimpleNamespace(calls=[], replay=replay, reset=lambda: None)
        return graph

    def make_event(self, enable_timing):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: (end.at - event.at) / 1e3
        return event


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu()

    @contextmanager
    def nothing(*_):
        yield

    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device": nothing,
        "stream": nothing,
        "Stream": object,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (80 * GIB, 80 * GIB),
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=50 * MIB),
        "graph": fake.graph,
        "CUDAGraph": fake.make_graph,
        "Event": fake.make_event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


def test_implementations_are_timed_in_turn_on_the_same_sets(gpu):
    seen = {"fast": set(), "slow": set()}

    def impl(name, us):
        def fn(x):
            seen[name].add(x.data_ptr())
            gpu.run(us, name)

        return fn

    found = time_in_graph(
        {"fast": impl("fast", 2.0), "slow": impl("slow", 300.0)},
        lambda: (torch.empty(1),),
        bytes_per_set=80 * MIB,
        rounds=30,
    )
    fast, slow = found["fast"], found["slow"]
    assert (fast.sets, slow.sets) == (20, 20) and seen["fast"] == seen["slow"]
    assert slow.calls == 20 and fast.calls % 20 == 0
    assert 900 <= 2 * fast.calls <= 1000  # the pilot's figure holds the start of its graph
    # that start is shared by all calls
    assert fast.us.value == pytest.approx(2 + 5 / fast.calls)
    assert slow.us.value == pytest.approx(300 + 5 / 20)
    in_rounds = gpu.replayed[-60:]
    for i in range(30):
        assert sorted(in_rounds[2 * i : 2 * i + 2]) == ["fast", "slow"]


def test_a_failure_is_reported_by_its_first_cause_and_hurts_no_other(gpu):
    def fails_in_capture(x):
        if gpu.capturing is not None:
            raise ValueError("waits for the device\nmore")
        gpu.run(1.0)

    def fails_at_once(x):
        raise NotImplementedError("not here")

    found = time_in_graph(
        {"a": fails_in_capture, "b": fails_at_once, "c": lambda x: gpu.run(7.0, "c")},
        lambda: (torch.empty(MIB),),
    )
    assert found["a"] == Failure("ValueError: waits for the device")
    assert found["b"] == Failure("NotImplementedError: not here")
    assert found["c"].us.value == pytest.approx(7, rel=0.01)
    assert found["c"].sets == 256  # the upper limit
    assert list(found) == ["a", "b", "c"]


def test_outputs_live_until_their_set_comes_round(gpu):
    refs, most = [], 0

    class Output:
        pass

    def fn(x):
        nonlocal most
        gpu.run(60.0, "a")
        out = Output()
        refs.append(weakref.ref(out))
        most = max(most, sum(ref() is not None for ref in refs))
        return out

    found = time_in_graph({"a": fn}, lambda: (torch.empty(1),), bytes_per_set=320 * MIB)["a"]
    assert found.sets == 5
    assert most == 6  # one for each set, and one that replaces another


def test_no_implementation_is_refused(gpu):
    with pytest.raises(UserError, match="at least one implementation"):
        time_in_graph({}, lambda: ())


def test_copy_bandwidth_counts_reads_and_writes(gpu, monkeypatch):
    def fake(impls, make_inputs, *, bytes_per_set, rounds, device):
        assert bytes_per_set == copy_bytes() == 2 * GIB
        times = zip(impls, (1200.0, 1000.0), strict=True)
        return {name: Timing((us,) * rounds, 20, 1) for name, us in times}

    monkeypatch.setattr(timing, "time_in_graph", fake)
    assert copy_bandwidth().per_second(copy_bytes()).value == pytest.approx(2147.483648)


@needs_cuda
def test_a_longer_kernel_takes_longer_and_a_failure_is_reported():
    def make_inputs():
        return (torch.randn(4 * MIB, device="cuda"),)

    def fails_in_capture(x):
        return x.sum().item()  # waits for the device, which a capture forbids

    def fails_at_once(x):
        raise NotImplementedError("not on this device")

    found = time_in_graph(
        {
            "once": lambda x: x + 1,
            "in capture": fails_in_capture,
            "at once": fails_at_once,
            "thrice": lambda x: x + 1 + 1 + 1,
        },
        make_inputs,
        bytes_per_set=32 * MIB,
    )
    assert list(found) == ["once", "in capture", "at once", "thrice"]
    once, thrice = found["once"], found["thrice"]
    assert isinstance(found["in capture"], Failure)
    assert found["at once"] == Failure("NotImplementedError: not on this device")
    assert once.calls >= MIN_CALLS and once.calls % once.sets == 0
    assert once.us.low <= once.us.value <= once.us.high
    assert thrice.us.value > 1.5 * once.us.value


@needs_cuda
def test_a_call_reads_the_set_whose_turn_it_is():
    seen = torch.zeros(1, device="cuda")
    made = []

    def make_inputs():
        made.append(len(made) + 1)
        return (torch.full((2 * MIB,), float(made[-1]), device="cuda"),)

    found = time_in_graph({"a": lambda x: torch.maximum(seen, x[:1], out=seen)}, make_inputs)["a"]
    assert found.sets == len(made)
    assert seen.item() == len(made)


@needs_cuda
def test_copy_bandwidth_is_that_of_a_gpu():
    rate = copy_bandwidth(gib=1.0).per_second(copy_bytes(1.0))
    assert 50 < rate.value < 20_000  # GB/s: any GPU with a compute capability of 8 or more
