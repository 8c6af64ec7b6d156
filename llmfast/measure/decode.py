"""How fast a model decodes: the runner, ``model.generate`` through ``patch``, and transformers.

All in one process, on the same random prompts, greedy. A run is clocked where its caller sees it:
from the call, with the prompts on the device, to each token's arrival on the host.
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..weights.model_weights import label_of, quantized_weights_of
from .record import make_row
from .results import CEILING_CASE, Row, format_case
from .shapes import DTYPE_NAMES, Source
from .stats import Estimate, median_estimate
from .timing import copy_bandwidth, copy_bytes

if TYPE_CHECKING:
    from ..runner.generate import Takeover
    from ..runner.runner import Runner

OURS, PEER = "llmfast", "transformers"
THROUGH = {"through": "generate"}  # in the case of model.generate on a patched model
WARM_UP_ROWS, WARM_UP_TOKENS = 8, 4  # of the first run, which compiles and captures
PEER_TOKENS = 16  # transformers' own pace is that of its Python: a token takes as long as the next
PEER_SECONDS = 20.0  # of one case; there is at least one run

Progress = Callable[[str, int, int], None]  # what is done now, runs done, runs in all


@dataclass(frozen=True)
class Case:
    """A batch of ``batch`` prompts of ``prompt`` tokens each, answered with ``tokens`` tokens."""

    batch: int
    prompt: int
    tokens: int

    @property
    def key(self) -> dict[str, int]:
        """Its part of a case in a results file; the usual number of tokens goes without saying."""
        key = {"batch": self.batch, "prompt": self.prompt}
        if self.tokens != usual_tokens(self.batch):
            key["new"] = self.tokens
        return key

    def __str__(self) -> str:
        return f"batch {self.batch}, prompt {self.prompt}"


def usual_tokens(batch: int) -> int:
    """Tokens a row: enough for a steady figure in a second or so."""
    return 64 if batch >= 128 else 128


@dataclass
class Measured:
    """What came of a measurement."""

    model: dict[str, str]  # the case's part that says what was run
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be measured, and why
    bandwidth: Estimate | None = None  # of a copy, in GB/s
    packed: str | None = None  # ours ran with such weights instead of the model's

    def case(self, impl: str, key: dict[str, Any]) -> str:
        packed = {} if self.packed is None or impl != OURS else {"weights": self.packed}
        return format_case(self.model | packed | key)

    def add(
        self, impl: str, key: dict[str, Any], metric: str, figure: Estimate, repeats: int
    ) -> None:
        self.rows.append(make_row(self.case(impl, key), impl, metric, figure, repeats))

    def add_times(
        self,
        impl: str,
        key: dict[str, Any],
        case: Case,
        times: list[Times],
        step_bytes: float | None = None,
    ) -> None:
        step = median_estimate([t.step for t in times])
        figures = {
            "tok_per_s": step.map(lambda s: case.batch / s),
            "ms_per_step": step.map(lambda s: s * 1e3),
            "ttft_ms": median_estimate([t.first * 1e3 for t in times]),
        }
        if self.bandwidth is not None and step_bytes is not None:
            least = step_bytes / (self.bandwidth.value * 1e9)
            figures["roofline_share"] = step.map(lambda s: least / s)
        for metric, figure in figures.items():
            self.add(impl, key, metric, figure, len(times))


@dataclass(frozen=True)
class Times:
    """Seconds of one run."""

    first: float  # from the call to the first tokens
    step: float  # a step after that


class Clock:
    """A streamer that notes when tokens come."""

    def __init__(self, *, gets_prompt: bool) -> None:
        self.started = time.perf_counter()
        self.came: list[float] = []
        self._is_prompt = gets_prompt

    def put(self, tokens: torch.Tensor) -> None:
        if not self._is_prompt:
            self.came.append(time.perf_counter())
        self._is_prompt = False

    def end(self) -> None:
        pass

    def times(self, tokens: int) -> Times:
        if len(self.came) != tokens:
            raise RuntimeError(f"wanted {tokens} tokens a row, got {len(self.came)}")
        first, last = self.came[0], self.came[-1]
        return Times(first - self.started, (last - first) / (tokens - 1))


def measure_decode(
    source: Source,
    cases: Iterable[Case],
    *,
    repeats: int = 3,
    peers: bool = True,
    starts: int = 0,
    weights: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Measured:
    """Measure every case, and ``starts`` starts of a process of its own with a cold kernel cache.

    A case that fails for want of memory is noted, and the others go on. With ``weights``
    (``int4-g64``, ``int8-g128``, ``int8`` of one scale an output, and their like) the linear layers
    of the decoder are rounded to nearest; starts and ``peers`` are of the weights as they are.

    Raises:
        UserError: the runner does not run this model, a case is longer than its context, or no
            case could be measured.
    """
    cases = list(cases)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    done, total = 0, 2 * starts + len(cases) * (2 if peers else 1) + 1

    def say(what: str) -> None:
        nonlocal done
        progress(what, done, total)
        done += 1

    found = Measured(source.case)
    start_seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(starts):  # first, while this process holds no memory of the GPU
        with tempfile.TemporaryDirectory(prefix="llmfast-") as folder:
            for start in start_seconds:
                say(f"Starting a process, kernel cache {start}")
                seconds = seconds_to_first_token(source, cases[0].prompt, Path(folder))
                start_seconds[start].append(seconds)
    say(f"Preparing the model on {device}")
    if device.type == "cuda":
        copy = copy_bandwidth()
        found.bandwidth = copy.per_second(copy_bytes())
        row = make_row(CEILING_CASE, "torch", "gb_per_s", found.bandwidth, copy.rounds)
        found.rows.append(row)
    model = source.make(device)
    dtype = DTYPE_NAMES.get(model.dtype, str(model.dtype).removeprefix("torch."))
    found.model |= {"weights": dtype, "kv": dtype}
    if starts:
        for start, seconds_each in start_seconds.items():
            key = {"batch": 1, "prompt": cases[0].prompt, "start": start}
            estimate = median_estimate(seconds_each)
            found.add(OURS, key, "start_to_first_token_s", estimate, starts)
    _check_context(model, cases)
    prompts = {case: _prompts(model, case) for case in cases}
    with _taken_over(model, weights) as takeover:
        if takeover.blocks is not None and takeover.blocks.packed_bytes:
            found.packed = label_of(quantized_weights_of(model) or {})
        for case in cases:
            say(f"{case}: llmfast")
            with _noting(found, OURS, case):
                _measure_ours(found, model, takeover, case, prompts[case], repeats)
    if peers:
        for case in cases:
            say(f"{case}: transformers")
            with _noting(found, PEER, case):
                times = _peer_times(model, prompts[case], case, repeats)
                found.add_times(PEER, case.key, case, times)
    if all(row.case == CEILING_CASE for row in found.rows):
        raise UserError(f"nothing could be measured: {'; '.join(found.notes)}")
    return found


# ------------------------------------------------------------------------- one implementation


def _measure_ours(
    found: Measured,
    model: Any,
    takeover: Takeover,
    case: Case,
    prompts: torch.Tensor,
    repeats: int,
) -> None:
    """The runner driven directly, and ``model.generate`` on the same runner, in turn."""
    from ..runner.runner import Runner

    assert takeover.blocks is not None
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    runner = Runner(takeover.blocks, max_rows=case.batch, max_length=case.prompt + case.tokens)
    takeover.runner = runner
    try:
        # the rows past the first few bring one token each: they take part in the graph alone
        lengths = [case.prompt if row < WARM_UP_ROWS else 1 for row in range(case.batch)]
        short = torch.cat([row[:n] for row, n in zip(prompts, lengths, strict=True)])
        _run(runner, short, lengths, min(WARM_UP_TOKENS, case.tokens))
        direct, through = [], []
        for index in range(repeats):
            direct.append(_run(runner, prompts.flatten(), [case.prompt] * case.batch, case.tokens))
            if index == 0 and cuda:  # generate is the same runner's: nothing is added by it
                peak = torch.cuda.max_memory_allocated(model.device)
                weights = _held_bytes(model) + takeover.blocks.packed_bytes
                over = (peak - weights - runner.cache.nbytes) / 2**30
                exact = Estimate(over, over, over)
                found.add(OURS, case.key, "peak_over_weights_cache_gib", exact, 1)
            if index > 0 or repeats == 1:  # one run less: a large batch's prompts take seconds
                through.append(_generate(model, prompts, case.tokens).times(case.tokens))
    finally:
        runner.close()
        takeover.runner = None
    saved = takeover.blocks.dense_bytes - takeover.blocks.packed_bytes
    found.add_times(OURS, case.key, case, direct, bytes_per_step(model, case) - saved)
    found.add_times(OURS, case.key | THROUGH, case, through)


def _run(runner: Runner, ids: torch.Tensor, lengths: list[int], tokens: int) -> Times:
    """Drive the runner as ``generate`` does: the host reads a step while the next one runs."""
    from ..runner.generate import device_loop
    from ..runner.runner import Sampling

    greedy = Sampling()
    _synchronize(runner.device)
    clock = Clock(gets_prompt=False)
    try:
        runner.start(ids, lengths, tokens, greedy)
        device_loop(runner, tokens, greedy, clock)
    finally:
        runner.end()
    return clock.times(tokens)


def _generate(model: Any, prompts: torch.Tensor, tokens: int) -> Clock:
    _synchronize(model.device)
    clock = Clock(gets_prompt=True)
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
def _taken_over(model: Any, weights: str | None = None) -> Iterator[Takeover]:
    """``model`` patched, its ``generate`` the runner's; with ``weights`` on rounded ones.

    Raises:
        UserError: the runner does not run this model.
    """
    import llmfast

    from ..runner.generate import takeover_of

    # on the CPU patch swaps nothing unless it is told to
    ops = None if model.device.type == "cuda" else "generate"
    if weights is None:
        report = llmfast.patch(model, ops=ops)
    else:
        rounded, _, group = weights.partition("-g")
        report = llmfast.patch(
            model, ops=ops, weights=rounded, group_size=int(group) if group else "auto"
        )
    try:
        takeover = takeover_of(model)
        if takeover is None:
            why = [note for note in report.notes if note.startswith("generate")]
            raise UserError(f"the runner does not run this model. {'; '.join(why)}")
        yield takeover
    finally:
        llmfast.unpatch(model)
        _release_memory()


@contextmanager
def _noting(found: Measured, impl: str, case: Case) -> Iterator[None]:
    """A case that does not fit is noted, not raised."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError) as error:
        found.notes.append(f"{impl}, {case}: {str(error).splitlines()[0]}")
    _release_memory()


# ------------------------------------------------------------------------------- what a step reads


def bytes_per_step(model: Any, case: Case) -> float:
    """What a step must read at the least: the weights once, and each row's keys and values.

    Of the input embedding a step reads a few rows, which are left out, unless it is the head too.
    A layer with a sliding window reads that window. Taken in the middle of the steps.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = _weight_bytes(model) - (0 if head is embedding else embedding.nbytes)
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = sum(min(case.prompt + case.tokens / 2, window) for window in _windows(config))
    return float(weights + case.batch * tokens * 2 * heads * dim * model.dtype.itemsize)


def _windows(config: Any) -> list[float]:
    """Of each layer; infinite where it attends to everything."""
    window = getattr(config, "sliding_window", None) or math.inf
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else math.inf for kind in kinds]


def _weight_bytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _held_bytes(model: Any) -> int:
    """Of parameters, as far as there is memory behind them."""
    storages = (parameter.untyped_storage() for parameter in model.parameters())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _prompts(model: Any, case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    shape = (case.batch, case.prompt)
    return torch.randint(vocabulary, shape, generator=generator).to(model.device)


def _check_context(model: Any, cases: Iterable[Case]) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
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


# ------------------------------------------------------------------------------------- a process


def seconds_to_first_token(source: Source, prompt: int, triton_cache: Path) -> float:
    """Seconds from the start of a new process to its first token, imports and all."""
    asked = [json.dumps(asdict(source)), str(prompt)]
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "llmfast.measure.decode", *asked],
        env=os.environ | {"TRITON_CACHE_DIR": str(triton_cache)},  # Triton's own way to be told
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise UserError(f"the process whose start is to be timed failed: {last}")
    return float(done.stdout.splitlines()[-1]) - started


def answer_once(source: Source, prompt: int) -> float:
    """Make the model, patch it and generate; the wall clock's time of the first token."""
    model = source.make(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with _taken_over(model):
        clock = _generate(model, _prompts(model, Case(1, prompt, 2)), 2)
        ago = time.perf_counter() - clock.came[0]
        return time.time() - ago


if __name__ == "__main__":
    try:
        print(answer_once(Source(**json.loads(sys.argv[1])), int(sys.argv[2])))
    except UserError as mistake:
        raise SystemExit(str(mistake)) from None
