"""Decoding speed of the runner, of ``model.generate`` through ``patch``, and of transformers.

All three run in one process, greedy, on the same random prompts. The clock runs from the call, with
the prompts on the device, to the arrival of each token on the host.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..model.costs import decode_step_bytes
from ..model.sizes import ModelSizes
from ..weights.model_weights import label_of, quantized_weights_of
from .figures import OURS, PEER, BenchResult, Progress, no_progress
from .prepare import prepare, weight_options
from .results import CEILING_CASE
from .shapes import Source
from .stats import Estimate, median_estimate

if TYPE_CHECKING:
    from ..runner.generate.batch import StaticBatch
    from ..runner.generate.override import GenerateOverride

VIA_GENERATE = {"through": "generate"}  # in the case of model.generate on a patched model
WARM_UP_ROWS, WARM_UP_TOKENS = 8, 4  # of the first run, which compiles and captures
PEER_TOKENS = 16  # transformers' step time is that of its Python code: it does not change
PEER_SECONDS = 20.0  # limit of one case; at least one run is made


@dataclass(frozen=True)
class Case:
    """A batch of ``batch`` prompts of ``prompt`` tokens each, answered with ``tokens`` tokens."""

    batch: int
    prompt: int
    tokens: int

    @property
    def key(self) -> dict[str, int]:
        """The pairs of a results file's case. The usual number of tokens is left out."""
        key = {"batch": self.batch, "prompt": self.prompt}
        if self.tokens != usual_tokens(self.batch):
            key["new"] = self.tokens
        return key

    def __str__(self) -> str:
        return f"batch {self.batch}, prompt {self.prompt}"


def usual_tokens(batch: int) -> int:
    """Return the tokens per row that give a steady figure in about a second."""
    return 64 if batch >= 128 else 128


@dataclass(frozen=True)
class Times:
    """Seconds of one run."""

    first: float  # from the call to the first tokens
    step: float  # of each later step, on average


class TokenClock:
    """A streamer that records when tokens arrive."""

    def __init__(self, *, gets_prompt: bool) -> None:
        self.started = time.perf_counter()
        self.received_at: list[float] = []
        self._is_prompt = gets_prompt

    def put(self, tokens: torch.Tensor) -> None:
        """Record the arrival of one token per row."""
        if not self._is_prompt:
            self.received_at.append(time.perf_counter())
        self._is_prompt = False

    def end(self) -> None:
        """Do nothing: the last token was recorded by ``put``."""

    def times(self, tokens: int) -> Times:
        """Return the times of a run that must have made ``tokens`` tokens per row."""
        if len(self.received_at) != tokens:
            raise RuntimeError(f"wanted {tokens} tokens a row, got {len(self.received_at)}")
        first, last = self.received_at[0], self.received_at[-1]
        return Times(first - self.started, (last - first) / (tokens - 1))


def add_times(
    result: BenchResult,
    impl: str,
    key: dict[str, Any],
    case: Case,
    times: list[Times],
    step_bytes: float | None = None,
) -> None:
    """Append the rows of a case's runs; the roofline's share if bandwidth and bytes are known."""
    step = median_estimate([t.step for t in times])
    figures = {
        "tok_per_s": step.map(lambda s: case.batch / s),
        "ms_per_step": step.map(lambda s: s * 1e3),
        "ttft_ms": median_estimate([t.first * 1e3 for t in times]),
    }
    if result.bandwidth is not None and step_bytes is not None:
        least = step_bytes / (result.bandwidth.value * 1e9)
        figures["roofline_share"] = step.map(lambda s: least / s)
    for metric, figure in figures.items():
        result.add(impl, key, metric, figure, len(times))


def measure_decode(
    source: Source,
    cases: Iterable[Case],
    *,
    repeats: int = 3,
    peers: bool = True,
    starts: int = 0,
    weights: str | None = None,
    progress: Progress = no_progress,
) -> BenchResult:
    """Measure every case, and ``starts`` process starts with a cold and a filled kernel cache.

    A case that runs out of memory is noted, and the others continue. With ``weights`` (such as
    ``int4-g64``, ``int8-g128``, or ``int8`` with one scale per output) the decoder's linear layers
    are rounded to nearest. Starts and peers use the model's own weights.

    Raises:
        UserError: the runner does not run this model, a case is longer than its context, or no
            case could be measured.
    """
    cases = list(cases)
    done, total = 0, 2 * starts + len(cases) * (2 if peers else 1) + 1

    def report(what: str) -> None:
        nonlocal done
        progress(what, done, total)
        done += 1

    start_seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(starts):  # first, while this process holds no GPU memory
        with tempfile.TemporaryDirectory(prefix="llmfast-") as folder:
            for start, seconds in start_seconds.items():
                report(f"Starting a process, kernel cache {start}")
                seconds.append(seconds_to_first_token(source, cases[0].prompt, Path(folder)))
    result, model = prepare(source, lambda what, _done, _total: report(what))
    if starts:
        for start, seconds in start_seconds.items():
            key = {"batch": 1, "prompt": cases[0].prompt, "start": start}
            result.add(OURS, key, "start_to_first_token_s", median_estimate(seconds), starts)
    _check_context(model, cases)
    prompts = {case: _prompts(model, case) for case in cases}
    with _patched(model, weights) as override:
        if override.step_model is not None and override.step_model.packed_bytes:
            result.packed = label_of(quantized_weights_of(model) or {})
        for case in cases:
            report(f"{case}: llmfast")
            with _note_failure(result, OURS, case):
                _measure_ours(result, model, override, case, prompts[case], repeats)
    if peers:
        for case in cases:
            report(f"{case}: transformers")
            with _note_failure(result, PEER, case):
                times = _peer_times(model, prompts[case], case, repeats)
                add_times(result, PEER, case.key, case, times)
    if all(row.case == CEILING_CASE for row in result.rows):
        raise UserError(f"nothing could be measured: {'; '.join(result.notes)}")
    return result


# ------------------------------------------------------------------------- one implementation


def _measure_ours(
    result: BenchResult,
    model: Any,
    override: GenerateOverride,
    case: Case,
    prompts: torch.Tensor,
    repeats: int,
) -> None:
    """Measure a batch driven directly and ``model.generate`` on the same batch, in turn."""
    from ..runner.generate.batch import StaticBatch

    assert override.step_model is not None
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    batch = StaticBatch(
        override.step_model, max_rows=case.batch, max_length=case.prompt + case.tokens
    )
    override.batch = batch
    try:
        # rows beyond the first few have one token each: they only take part in the graph
        lengths = [case.prompt if row < WARM_UP_ROWS else 1 for row in range(case.batch)]
        short = torch.cat([row[:n] for row, n in zip(prompts, lengths, strict=True)])
        _run(batch, short, lengths, min(WARM_UP_TOKENS, case.tokens))
        direct, generated = [], []
        for index in range(repeats):
            direct.append(_run(batch, prompts.flatten(), [case.prompt] * case.batch, case.tokens))
            if index == 0 and cuda:  # generate runs on the same batch: it allocates nothing more
                peak = torch.cuda.max_memory_allocated(model.device)
                weights = _held_bytes(model) + override.step_model.packed_bytes
                over = (peak - weights - batch.executor.cache.nbytes) / 2**30
                exact = Estimate(over, over, over)
                result.add(OURS, case.key, "peak_over_weights_cache_gib", exact, 1)
            if index > 0 or repeats == 1:  # one run less: prefill of a large batch takes seconds
                generated.append(_generate(model, prompts, case.tokens).times(case.tokens))
    finally:
        batch.close()
        override.batch = None
    saved = override.step_model.dense_bytes - override.step_model.packed_bytes
    add_times(result, OURS, case.key, case, direct, bytes_per_step(model, case) - saved)
    add_times(result, OURS, case.key | VIA_GENERATE, case, generated)


def _run(batch: StaticBatch, ids: torch.Tensor, lengths: list[int], tokens: int) -> Times:
    """Drive a batch as ``generate`` does: the host reads a step while the next one runs."""
    from ..runner.generate.batch import BatchSampling
    from ..runner.generate.loop import device_loop

    greedy = BatchSampling()
    _synchronize(batch.device)
    clock = TokenClock(gets_prompt=False)
    try:
        first = batch.start(ids, lengths, tokens, greedy)
        device_loop(batch, first, tokens, greedy, clock)
    finally:
        batch.end()
    return clock.times(tokens)


def _generate(model: Any, prompts: torch.Tensor, tokens: int) -> TokenClock:
    _synchronize(model.device)
    clock = TokenClock(gets_prompt=True)
    model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=tokens,
        do_sample=False,
        streamer=clock,
    )
    return clock


def _peer_times(model: Any, prompts: torch.Tensor, case: Case, repeats: int) -> list[Times]:
    tokens = min(case.tokens, PEER_TOKENS)
    started = time.perf_counter()
    _generate(model, prompts[:WARM_UP_ROWS], min(WARM_UP_TOKENS, tokens))
    times: list[Times] = []
    while len(times) < repeats:
        times.append(_generate(model, prompts, tokens).times(tokens))
        if time.perf_counter() - started > PEER_SECONDS:
            break
    return times


@contextmanager
def _patched(model: Any, weights: str | None = None) -> Iterator[GenerateOverride]:
    """Patch ``model`` so that the runner runs its ``generate``, on rounded ``weights`` if given.

    Raises:
        UserError: the runner does not run this model.
    """
    import llmfast

    from ..runner.generate.override import override_of

    # on the CPU patch swaps nothing by default
    ops = None if model.device.type == "cuda" else "generate"
    rounded = {} if weights is None else weight_options(weights)
    report = llmfast.patch(model, ops=ops, **rounded)
    try:
        override = override_of(model)
        if override is None:
            raise UserError(f"the runner does not run this model: {report.generate_fallback}")
        yield override
    finally:
        llmfast.unpatch(model)
        _release_memory()


@contextmanager
def _note_failure(result: BenchResult, impl: str, case: Case) -> Iterator[None]:
    """Note a case that does not fit in memory instead of raising."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError) as error:
        result.notes.append(f"{impl}, {case}: {str(error).splitlines()[0]}")
    _release_memory()


# ------------------------------------------------------------------------- the bytes of a step


def bytes_per_step(model: Any, case: Case) -> float:
    """Count the bytes that a step must read: all weights once, and each row's keys and values.

    The input embedding is left out unless it is the head too: a step reads a few of its rows. A
    layer with a sliding window reads that window. The context is that of the middle step.
    """
    return decode_step_bytes(model, case.batch, case.prompt + case.tokens / 2)


def _held_bytes(model: Any) -> int:
    """Count the parameters' bytes that are allocated; shared storage counts once."""
    storages = (parameter.untyped_storage() for parameter in model.parameters())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _prompts(model: Any, case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.prompt)
    return torch.randint(ModelSizes.of(model).vocabulary, shape, generator=generator).to(
        model.device
    )


def _check_context(model: Any, cases: Iterable[Case]) -> None:
    context = ModelSizes.of(model).context_length
    for case in cases:
        if context and case.prompt + case.tokens > context:
            raise UserError(
                f"{case}: with {case.tokens} tokens out it is longer than the model's context "
                f"of {context} tokens"
            )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------- process starts


def seconds_to_first_token(source: Source, prompt: int, triton_cache: Path) -> float:
    """Time a new process from its start, imports included, to its first token, in seconds.

    Raises:
        UserError: the process failed.
    """
    arguments = [json.dumps(asdict(source)), str(prompt)]
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "llmfast.measure.decode", *arguments],
        env=os.environ | {"TRITON_CACHE_DIR": str(triton_cache)},  # Triton's own setting
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise UserError(f"the process whose start is to be timed failed: {last}")
    return float(done.stdout.splitlines()[-1]) - started


def answer_once(source: Source, prompt: int) -> float:
    """Make the model, patch it and generate; return the wall-clock time of the first token."""
    model = source.make(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with _patched(model):
        clock = _generate(model, _prompts(model, Case(1, prompt, 2)), 2)
        ago = time.perf_counter() - clock.received_at[0]
        return time.time() - ago


if __name__ == "__main__":
    try:
        print(answer_once(Source(**json.loads(sys.argv[1])), int(sys.argv[2])))
    except UserError as mistake:
        raise SystemExit(str(mistake)) from None
