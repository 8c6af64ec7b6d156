"""Random requests for the engine, and how long it takes to answer them."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ..engine.llm import LLM
from ..engine.request import RequestOutput
from ..engine.sampling_params import SamplingParams
from ..errors import UserError
from ..model.sizes import ModelSizes
from ..weights.model_weights import label_of, quantized_weights_of
from .figures import BenchResult, Progress
from .prepare import prepare
from .shapes import Source

LAST_TOKEN = 10_000  # largest id in random prompts, or the vocabulary's last


@dataclass(frozen=True)
class Workload:
    """Requests with random prompts. The defaults are the 256 that nano-vllm's bench.py draws."""

    requests: int = 256
    input: tuple[int, int] = (100, 1024)  # tokens of a prompt, least and most
    output: tuple[int, int] = (100, 1024)  # tokens of an answer; end tokens do not end it
    temperature: float = 0.6
    seed: int = 0

    def draw(self, vocabulary: int, again: int = 0) -> tuple[list[list[int]], list[SamplingParams]]:
        """Draw prompts and sampling parameters with Python's own generator.

        Args:
            again: another number gives other prompts, which the prefix cache does not know.
        """
        rng = random.Random(self.seed + again)
        last = min(LAST_TOKEN, vocabulary - 1)
        prompts = [
            [rng.randint(0, last) for _ in range(rng.randint(*self.input))]
            for _ in range(self.requests)
        ]
        params = [
            SamplingParams(
                temperature=self.temperature, ignore_eos=True, max_tokens=rng.randint(*self.output)
            )
            for _ in range(self.requests)
        ]
        return prompts, params

    @property
    def longest(self) -> int:
        """The most tokens that a request can have, prompt and answer."""
        return self.input[1] + self.output[1]

    @property
    def key(self) -> dict[str, Any]:
        """The pairs of a results file's case. Default values are left out."""
        usual = Workload()
        key: dict[str, Any] = {
            "requests": self.requests,
            "in": _range(self.input),
            "out": _range(self.output),
        }
        if self.temperature != usual.temperature:
            key["temperature"] = self.temperature
        if self.seed != usual.seed:
            key["seed"] = self.seed
        return key


def _range(ends: tuple[int, int]) -> str:
    low, high = ends
    return str(low) if low == high else f"{low}-{high}"


@dataclass(frozen=True)
class Batch:
    """Requests of one length that arrive together."""

    batch: int = 8
    input: int = 512  # tokens of each prompt
    output: int = 128  # tokens of each answer

    @property
    def workload(self) -> Workload:
        """The same requests as a workload."""
        return Workload(self.batch, (self.input, self.input), (self.output, self.output))

    @property
    def key(self) -> dict[str, Any]:
        """The pairs of a results file's case."""
        return {"batch": self.batch, "in": self.input, "out": self.output}


@dataclass
class Timeline:
    """The arrival times of one request's tokens, in seconds of one clock."""

    sent_at: float
    received_at: list[float] = field(default_factory=list)  # each time that there were more tokens
    counts: list[int] = field(default_factory=list)  # the number of tokens at each of these times

    def record(self, tokens: int) -> None:
        """Record that the request has ``tokens`` tokens now."""
        if tokens > self.tokens:
            self.received_at.append(time.perf_counter())
            self.counts.append(tokens)

    @property
    def tokens(self) -> int:
        """The number of tokens received so far."""
        return self.counts[-1] if self.counts else 0

    def tokens_between(self, start: float, end: float) -> int:
        """Count the tokens received after ``start``, up to ``end``."""
        known = [n for at, n in zip(self.received_at, self.counts, strict=True) if at <= end]
        before = sum(at <= start for at in self.received_at)
        return max(known, default=0) - (self.counts[before - 1] if before else 0)

    @property
    def time_to_first_token(self) -> float:
        """Seconds from sending to the first token."""
        return self.received_at[0] - self.sent_at

    @property
    def end_to_end(self) -> float:
        """Seconds from sending to the last token."""
        return self.received_at[-1] - self.sent_at

    @property
    def gaps(self) -> list[float]:
        """Seconds between consecutive outputs (inter-token latency)."""
        return [after - before for before, after in pairwise(self.received_at)]


def prepare_engine_model(
    source: Source, prompt: int, answer: int, progress: Progress
) -> tuple[BenchResult, Any]:
    """Make the model and an empty result, for requests of up to ``prompt + answer`` tokens.

    Raises:
        UserError: such a request is longer than the model's context.
    """
    result, model = prepare(source, progress)
    context = ModelSizes.of(model).context_length
    if context and prompt + answer > context:
        raise UserError(
            f"a prompt of {prompt} tokens and an answer of {answer} are "
            f"longer than the model's context of {context} tokens"
        )
    return result, model


def engine_options(longest: int, given: dict[str, Any] | None) -> dict[str, Any]:
    """Return options of ``LLM`` for requests of ``longest`` tokens, prompt and answer."""
    return {"max_model_len": max(longest, 8), **(given or {})}  # 8: for the warm-up


def label_weights(result: BenchResult, model: Any, options: dict[str, Any] | None) -> None:
    """Name the weights that the engine was asked to round in all cases added from now on."""
    if (options or {}).get("weights"):
        result.model["weights"] = label_of(quantized_weights_of(model) or {})


def warm_up(llm: LLM) -> None:
    """Run two short requests."""
    llm.generate([[1, 2, 3]] * 2, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)


def time_generate(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams]
) -> tuple[float, list[RequestOutput]]:
    """Return the seconds that ``generate`` takes, and its outputs.

    Raises:
        UserError: a request failed.
    """
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    for output in outputs:
        check_answered(output)
    return seconds, outputs


def check_answered(output: RequestOutput) -> None:
    """Refuse the output of a request that failed.

    Raises:
        UserError: the request failed.
    """
    error = output.outputs[0].error
    if error is not None:
        raise UserError(f"a request failed: {error}")
