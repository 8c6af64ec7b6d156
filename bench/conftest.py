"""`bench_op`: time implementations side by side on the GPU, and write what they took to results.

    pytest bench                                     into bench/results/<gpu>/<suite>.json
    pytest bench/bench_norm.py --results DIR         into DIR/<suite>.json

Figures that are published come from three processes: see docs/measuring.md.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from llmfast.measure.environment import capture_env, gpu_folder
from llmfast.measure.figures import make_row
from llmfast.measure.results import format_case, parse_case
from llmfast.measure.suites import SUITES
from llmfast.measure.timing import Failure, Impl, Timing, copy_bandwidth, copy_bytes, time_in_graph
from recorder import Recorder

ROOT = Path(__file__).parents[1]
OURS = "llmfast"
SECONDS = 0.4  # of one case, all implementations together, unless --seconds says otherwise

notes_key = pytest.StashKey[list[str]]()


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
    config.stash[notes_key] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="times a GPU: needs a CUDA device"))


@pytest.fixture(scope="session")
def session_recorder(request: pytest.FixtureRequest) -> Recorder:
    env = capture_env(commit=request.config.getoption("--commit"))
    given = request.config.getoption("--results")
    return Recorder(Path(given) if given else ROOT / "bench/results" / gpu_folder(env.gpu), env)


@pytest.fixture
def recorder(request: pytest.FixtureRequest, session_recorder: Recorder) -> Iterator[Recorder]:
    """Where this process's figures go: the files are written after each case, none is lost."""
    yield session_recorder
    notes = request.config.stash[notes_key]
    notes += [n for p in session_recorder.write() if (n := f"written: {p}") not in notes]


@pytest.fixture
def bench_op(request: pytest.FixtureRequest, recorder: Recorder) -> Callable[..., dict[str, Any]]:
    """Time every implementation of one case and record us, GB/s and TFLOP/s.

    ``bench_op(suite, case, impls, make_inputs, bytes_moved=None, flops=None)``: ``case`` is a
    mapping or `key=value` text; ``impls`` maps a name to a function, ours under "llmfast";
    ``make_inputs`` returns one fresh set of arguments; ``bytes_moved`` and ``flops`` are what one
    call must move and compute at the least. Of the metrics, those that the suite has are kept.
    A peer that fails is named in the summary; if ours does, the case fails.
    """

    def run(
        suite: str,
        case: str | Mapping[str, object],
        impls: Mapping[str, Impl],
        make_inputs: Callable[[], tuple[Any, ...]],
        bytes_moved: int | None = None,
        flops: float | None = None,
    ) -> dict[str, Timing | Failure]:
        seconds = request.config.getoption("--seconds")
        case = format_case(parse_case(case) if isinstance(case, str) else case)
        if not recorder.has_ceiling:
            copy = copy_bandwidth()
            recorder.set_ceiling(copy.per_second(copy_bytes()), copy.rounds)
        torch.compiler.reset()  # a compiled peer is compiled for this case's shapes alone
        with torch.no_grad():
            timings = time_in_graph(impls, make_inputs, bytes_per_set=bytes_moved, seconds=seconds)
        for impl, timing in timings.items():
            if isinstance(timing, Failure):
                note = f"{suite}: {case}: {impl} was not timed: {timing.reason}"
                request.config.stash[notes_key].append(note)
                continue
            figures = {"us": timing.us, "us_per_block": timing.us}
            if bytes_moved is not None:
                figures["gb_per_s"] = timing.per_second(bytes_moved)
            if flops is not None:
                figures["tflops"] = timing.per_second(flops / 1e3)
            for metric in SUITES[suite].metrics:
                if metric in figures:
                    row = make_row(case, impl, metric, figures[metric], timing.rounds)
                    recorder.add(suite, row)
        if isinstance(ours := timings.get(OURS), Failure):
            pytest.fail(f"{suite}: {case}: {OURS} was not timed: {ours.reason}")
        return timings

    return run


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for note in config.stash[notes_key]:
        terminalreporter.write_line(note)
