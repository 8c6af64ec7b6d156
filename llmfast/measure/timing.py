"""Time GPU functions in CUDA graphs, over rotated buffers, implementations side by side.

The graph excludes Python and launches from the figure, and the rotation excludes hits in the L2
cache. Interleaved rounds give every implementation the same clocks and temperature.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UserError
from .stats import Estimate, median_estimate

L2_MULTIPLE = 32  # one pass over the sets moves this many times the L2, so that nothing hits it
MAX_SETS = 256
MEMORY_SHARE = 0.25  # of the free memory, for all input sets together
MIN_CALLS = 20  # in one graph
MAX_CALLS = 4000  # a graph's nodes take memory and time to instantiate
MIN_REPLAY_US = 1000.0  # long enough to hide the few microseconds of a graph's launch
MIN_ROUNDS = 11  # enough for an interval of the median without the extremes
WARM_REPLAYS = 3

Impl = Callable[..., object]


@dataclass(frozen=True)
class Timing:
    """The time per call of one implementation."""

    samples: tuple[float, ...]  # microseconds per call, one for each round
    calls: int  # in one graph
    sets: int  # input sets that the calls rotate through

    @property
    def us(self) -> Estimate:
        """The median over the rounds, in microseconds per call."""
        return median_estimate(self.samples)

    @property
    def rounds(self) -> int:
        """The number of samples."""
        return len(self.samples)

    def per_second(self, amount: float) -> Estimate:
        """Return the rate in units of 1e9 per second, if one call does ``amount`` (bytes: GB/s)."""
        return self.us.map(lambda us: amount / us / 1e3)


@dataclass(frozen=True)
class Failure:
    """The reason why an implementation could not be timed."""

    reason: str


def count_sets(l2_bytes: int, bytes_per_set: int, held_bytes: int, free_bytes: int) -> int:
    """Choose how many input sets to rotate. Pure: it asks no device.

    Args:
        l2_bytes: the size of the L2 cache.
        bytes_per_set: bytes that one call reads and writes.
        held_bytes: memory of one input set.
        free_bytes: free memory before any set is made.
    """
    wanted = -(-L2_MULTIPLE * l2_bytes // max(bytes_per_set, 1))
    fits = int(free_bytes * MEMORY_SHARE) // max(held_bytes, 1)
    return max(1, min(wanted, fits, MAX_SETS))


def count_calls(n_sets: int, us_per_call: float) -> int:
    """Choose how many calls a graph holds: whole passes over the sets, MIN_CALLS or more.

    A fast call is repeated more, until a replay lasts MIN_REPLAY_US or the graph has MAX_CALLS.
    """
    wanted = max(MIN_CALLS, min(MAX_CALLS, -(-MIN_REPLAY_US // max(us_per_call, 1e-3))))
    return int(-(-wanted // n_sets)) * n_sets


def count_rounds(us_per_round: float, rounds: int, seconds: float) -> int:
    """Choose how many rounds fit in ``seconds``: at most ``rounds``, at least MIN_ROUNDS."""
    return min(rounds, max(MIN_ROUNDS, int(seconds * 1e6 / max(us_per_round, 1e-3))))


def round_order(names: Sequence[str], index: int) -> list[str]:
    """Order the implementations of one round: shuffled, so that none always follows the same."""
    order = list(names)
    random.Random(index).shuffle(order)
    return order


def time_in_graph(
    impls: Mapping[str, Impl],
    make_inputs: Callable[[], tuple[Any, ...]],
    *,
    bytes_per_set: int | None = None,
    rounds: int = 50,
    seconds: float = 4.0,
    device: torch.device | int | None = None,
) -> dict[str, Timing | Failure]:
    """Time ``fn(*inputs)`` for every implementation on the same inputs in one process.

    Enough input sets are made that one pass over them moves ``L2_MULTIPLE`` times the L2 cache. The
    calls of a graph rotate through the sets. Each call's output is kept until its set is used
    again, so outputs rotate as well. Each round replays each graph once, between two events on one
    stream; nothing waits for the host.

    Args:
        impls: functions by name. A CUDA graph must be able to capture them.
        make_inputs: returns one fresh input set, the positional arguments of a call.
        bytes_per_set: bytes that one call reads and writes. None: those of the set's tensors.
        rounds: replays of each implementation, fewer (MIN_ROUNDS or more) where they would take
            longer than ``seconds`` together.
        seconds: see ``rounds``.
        device: the CUDA device. None: the current one.

    Returns:
        For each name, in the order given, its timing, or why it could not be run or captured.

    Raises:
        UserError: there is no CUDA device, or no implementation.
    """
    _require_cuda("time_in_graph")
    if not impls:
        raise UserError("time_in_graph: impls must hold at least one implementation, got none")
    with torch.cuda.device(device if device is not None else torch.cuda.current_device()):
        torch.cuda.empty_cache()  # mem_get_info counts cached memory as used
        free, _ = torch.cuda.mem_get_info()
        first = make_inputs()
        if bytes_per_set is None:
            bytes_per_set = _tensor_bytes(first)
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        n_sets = count_sets(l2, bytes_per_set, _storage_bytes(first), free)
        sets = [first, *(make_inputs() for _ in range(n_sets - 1))]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()  # the sets were made on another stream

        captured: dict[str, _Captured] = {}
        failures: dict[str, Failure] = {}
        for name, fn in impls.items():
            try:
                captured[name] = _prepare(fn, sets, stream)
            except Exception as error:  # a peer may raise anything; its reason is returned
                torch.cuda.synchronize()  # raises if the error broke the device
                failures[name] = Failure(f"{type(error).__name__}: {error}".strip().splitlines()[0])
        timings = _replay(captured, rounds, seconds, stream, n_sets)
    return {name: timings[name] if name in timings else failures[name] for name in impls}


def copy_bandwidth(
    device: torch.device | int | None = None, *, gib: float = 2.0, rounds: int = 25
) -> Timing:
    """Time a device-to-device copy of half of ``gib`` GiB, in the same harness.

    Return the faster of the driver's copy and an elementwise kernel: in a graph the driver's copy
    may run on a copy engine, which does not reach the full memory bandwidth.

    ``copy_bandwidth().per_second(copy_bytes(gib))`` is in GB/s, bytes read plus bytes written.

    Raises:
        UserError: there is no CUDA device.
    """
    _require_cuda("copy_bandwidth")
    half = copy_bytes(gib) // 2

    def make_inputs() -> tuple[torch.Tensor, torch.Tensor]:
        where = f"cuda:{torch.cuda.current_device()}"
        source = torch.empty(half // 4, dtype=torch.int32, device=where).random_()
        return source, torch.empty_like(source)

    timings = time_in_graph(
        {
            "copy": lambda source, target: target.copy_(source),
            "elementwise": lambda source, target: torch.bitwise_not(source, out=target),
        },
        make_inputs,
        bytes_per_set=2 * half,
        rounds=rounds,
        device=device,
    )
    done = [timing for timing in timings.values() if isinstance(timing, Timing)]
    if not done:
        raise RuntimeError(f"copy_bandwidth: {timings['copy']}")
    return min(done, key=lambda timing: timing.us.value)


def copy_bytes(gib: float = 2.0) -> int:
    """Return the bytes that one copy of :func:`copy_bandwidth` reads and writes."""
    return int(gib * 2**30)


def _require_cuda(what: str) -> None:
    if not torch.cuda.is_available():
        raise UserError(f"{what}: needs a CUDA device, and torch {torch.__version__} sees none")


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    calls: int
    us_per_replay: float  # estimated


def _prepare(fn: Impl, sets: list[tuple[Any, ...]], stream: torch.cuda.Stream) -> _Captured:
    """Compile and warm up, estimate the time of a call, and capture as many calls as needed."""
    with torch.cuda.stream(stream):
        for i in range(3):
            fn(*sets[i % len(sets)])
    torch.cuda.synchronize()
    calls = count_calls(len(sets), MIN_REPLAY_US)  # the minimum
    graph = _capture(fn, sets, calls, stream)
    us = _rough_us(graph, stream)
    wanted = count_calls(len(sets), us / calls)
    if wanted > calls:
        graph.reset()
        graph, us, calls = _capture(fn, sets, wanted, stream), us * wanted / calls, wanted
    return _Captured(graph, calls, us)


def _capture(
    fn: Impl, sets: list[tuple[Any, ...]], calls: int, stream: torch.cuda.Stream
) -> torch.cuda.CUDAGraph:
    outputs: list[object] = [None] * len(sets)
    graph = torch.cuda.CUDAGraph()
    first_error: Exception | None = None
    try:
        with torch.cuda.graph(graph, stream=stream):
            try:
                for i in range(calls):
                    outputs[i % len(sets)] = fn(*sets[i % len(sets)])
            except Exception as error:
                first_error = error
                raise
    except Exception as error:  # ending a broken capture raises too, with a vaguer message
        raise first_error or error from None
    return graph


def _rough_us(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> float:
    with torch.cuda.stream(stream):
        graph.replay()
        start, end = _event(), _event()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def _replay(
    captured: Mapping[str, _Captured],
    rounds: int,
    seconds: float,
    stream: torch.cuda.Stream,
    n_sets: int,
) -> dict[str, Timing]:
    rounds = count_rounds(sum(c.us_per_replay for c in captured.values()), rounds, seconds)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in captured}
    with torch.cuda.stream(stream):
        for one in captured.values():
            for _ in range(WARM_REPLAYS):
                one.graph.replay()
        # no wait between rounds: the GPU always has work queued, so host speed does not matter
        for index in range(rounds):
            for name in round_order(list(captured), index):
                start, end = _event(), _event()
                start.record()
                captured[name].graph.replay()
                end.record()
                events[name].append((start, end))
    torch.cuda.synchronize()
    timings = {}
    for name, one in captured.items():
        samples = [start.elapsed_time(end) * 1e3 / one.calls for start, end in events[name]]
        timings[name] = Timing(tuple(samples), one.calls, n_sets)
    return timings


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _tensors(value: object) -> list[torch.Tensor]:
    """Return the tensors of an input set, also those in its lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _tensor_bytes(inputs: object) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(inputs))


def _storage_bytes(inputs: object) -> int:
    """Count a set's memory: a view counts its whole storage, a shared storage counts once."""
    storages = [tensor.untyped_storage() for tensor in _tensors(inputs)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
