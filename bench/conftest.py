"""The fixtures of ``pytest bench``: they time implementations and write results files.

    pytest bench                                     into bench/results/<gpu>/<suite>.json
    pytest bench/bench_norm.py --results DIR         into DIR/<suite>.json

Each implementation of a case is one entry of pytest-benchmark, in the group of its case: so
``--benchmark-json``, ``--benchmark-compare`` and the like work. Its rounds are those of the CUDA
graphs. Without a GPU the same files run small sizes on the CPU, and no results file is written.

Published figures are combined from three processes: see docs/measuring.md.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import GPU_IMPLS, ON_GPU, ReplayClock, time_on_cpu
from llmfast.measure.environment import capture_env, gpu_folder
from llmfast.measure.figures import OURS, make_row
from llmfast.measure.results import format_case, parse_case
from llmfast.measure.stats import Estimate
from llmfast.measure.suites import SUITES
from llmfast.measure.timing import Failure, Impl, Timing, copy_bandwidth, copy_bytes, time_in_graph
from recorder import Recorder

ROOT = Path(__file__).parents[1]
SECONDS = 0.4  # of one case, all implementations together, unless --seconds says otherwise

Timings = dict[str, Timing | Failure]

notes_key = pytest.StashKey[list[str]]()
clock = ReplayClock()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("llmfast")
    group.addoption(
        "--results", metavar="DIR", help="write DIR/<suite>.json (default: bench/results/<gpu>)"
    )
    group.addoption("--seconds", type=float, default=SECONDS, help="of one case")
    group.addoption(
        "--commit", help="commit of the sources, where the checkout has no history to ask"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("bench needs pytest-benchmark: pip install 'llmfast[bench]'")
    config.stash[notes_key] = []


@pytest.hookimpl(trylast=True)  # after a function's own parameters: the sizes vary slowest
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of each implementation that ``@pytest.mark.impls`` names."""
    if "bench_op" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("impls")
    if mark is None:
        raise pytest.UsageError(f"{metafunc.definition.nodeid} lacks @pytest.mark.impls(names)")
    names = [name for name in mark.args if ON_GPU or name not in GPU_IMPLS]
    metafunc.parametrize("bench_op", names, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=clock.read))


@pytest.hookimpl(optionalhook=True)  # so that pytest_configure can say what is missing
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["gpu"] = torch.cuda.get_device_name() if ON_GPU else "none"
    machine_info["torch"] = torch.__version__


@pytest.fixture(scope="session")
def session_recorder(request: pytest.FixtureRequest) -> Recorder | None:
    """The results files of this process; None without a GPU."""
    if not ON_GPU:
        return None
    env = capture_env(commit=request.config.getoption("--commit"))
    given = request.config.getoption("--results")
    return Recorder(Path(given) if given else ROOT / "bench/results" / gpu_folder(env.gpu), env)


@pytest.fixture(scope="session")
def session_timings() -> dict[tuple[str, str], Timings]:
    """The timings of each suite and case: the first of its tests measures all implementations."""
    return {}


@pytest.fixture
def record(
    request: pytest.FixtureRequest, session_recorder: Recorder | None
) -> Iterator[Callable[..., None]]:
    """Record figures: ``record(suite, case, impl, metric, estimate, repeats)``.

    The files are written after each test, so that an interrupted run loses nothing.
    """

    def add(suite: str, case: str, impl: str, metric: str, figure: Estimate, repeats: int) -> None:
        if session_recorder is not None:
            session_recorder.add(suite, make_row(case, impl, metric, figure, repeats))

    yield add
    if session_recorder is not None:
        notes = request.config.stash[notes_key]
        notes += [n for p in session_recorder.write() if (n := f"written: {p}") not in notes]


@pytest.fixture
def bench_op(
    request: pytest.FixtureRequest,
    benchmark: Any,
    record: Callable[..., None],
    session_recorder: Recorder | None,
    session_timings: dict[tuple[str, str], Timings],
) -> Callable[..., None]:
    """Time every implementation of one case; report one of them, record us, GB/s and TFLOP/s.

    ``bench_op(suite, case, impls, make_inputs, bytes_moved=None, flops=None)``:

    - ``case``: a mapping or ``key=value`` text;
    - ``impls``: functions by name, those that ``@pytest.mark.impls`` names; ours is "llmfast";
    - ``make_inputs``: returns one fresh set of arguments;
    - ``bytes_moved``, ``flops``: the least that one call must move and compute.

    The suite's metrics are recorded. A peer that fails is skipped, with its reason in the summary.
    If ours fails, the test fails.
    """
    impl: str = request.param

    def run(
        suite: str,
        case: str | Mapping[str, object],
        impls: Mapping[str, Impl],
        make_inputs: Callable[[], tuple[Any, ...]],
        bytes_moved: int | None = None,
        flops: float | None = None,
    ) -> None:
        case = format_case(parse_case(case) if isinstance(case, str) else case)
        named = request.node.get_closest_marker("impls").args
        if set(named) != set(impls):
            pytest.fail(f"{suite}: {case}: wanted {', '.join(named)}; got {', '.join(impls)}")
        if (suite, case) not in session_timings:
            if session_recorder is not None and not session_recorder.has_ceiling:
                copy = copy_bandwidth()
                session_recorder.set_ceiling(copy.per_second(copy_bytes()), copy.rounds)
            seconds = request.config.getoption("--seconds")
            timings = _time(impls, make_inputs, bytes_moved, seconds)
            session_timings[suite, case] = timings
            for name, timing in timings.items():
                if isinstance(timing, Timing):
                    for metric, figure in _figures(suite, timing, bytes_moved, flops).items():
                        record(suite, case, name, metric, figure, timing.rounds)
        timing = session_timings[suite, case][impl]
        benchmark.group = f"{suite}: {case}"
        if isinstance(timing, Failure):
            reason = f"{suite}: {case}: {impl} was not timed: {timing.reason}"
            if impl == OURS:
                pytest.fail(reason)
            request.config.stash[notes_key].append(reason)
            benchmark.skipped = True
            pytest.skip(reason)
        for metric, figure in _figures(suite, timing, bytes_moved, flops).items():
            benchmark.extra_info[metric] = figure.value
        clock.load(tuple(us * 1e-6 for us in timing.samples))
        benchmark.pedantic(clock.tick, rounds=timing.rounds)

    return run


def _time(
    impls: Mapping[str, Impl],
    make_inputs: Callable[[], tuple[Any, ...]],
    bytes_moved: int | None,
    seconds: float,
) -> Timings:
    with torch.no_grad():
        if not ON_GPU:
            here = {name: impl for name, impl in impls.items() if name not in GPU_IMPLS}
            return time_on_cpu(here, make_inputs)
        torch.compiler.reset()  # a compiled peer is compiled for this case's shapes alone
        return time_in_graph(impls, make_inputs, bytes_per_set=bytes_moved, seconds=seconds)


def _figures(
    suite: str, timing: Timing, bytes_moved: int | None, flops: float | None
) -> dict[str, Estimate]:
    """Return the suite's metrics that follow from a timing."""
    figures = {"us": timing.us, "us_per_block": timing.us}
    if bytes_moved is not None:
        figures["gb_per_s"] = timing.per_second(bytes_moved)
    if flops is not None:
        figures["tflops"] = timing.per_second(flops / 1e3)
    return {metric: figures[metric] for metric in SUITES[suite].metrics if metric in figures}


@pytest.fixture
def bench_once(benchmark: Any, record: Callable[..., None]) -> Callable[..., None]:
    """Report and record one run that was timed by the caller.

    ``bench_once(suite, case, seconds, **figures)``: ``case`` is a mapping, ``figures`` are further
    metrics of the suite beside its ``s``.
    """

    def run(suite: str, case: Mapping[str, object], seconds: float, **figures: float) -> None:
        text = format_case(case)
        for metric, value in {"s": seconds, **figures}.items():
            record(suite, text, OURS, metric, Estimate(value, value, value), 1)
        benchmark.group = f"{suite}: {text}"
        benchmark.extra_info.update(figures)
        clock.load((seconds,))
        benchmark.pedantic(clock.tick)

    return run


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for note in config.stash[notes_key]:
        terminalreporter.write_line(note)
