"""A request, its sequences, and its output. No torch."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from .structured import Matcher


class SequenceStatus(Enum):
    """The state of a sequence in the scheduler."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability under the raw logits."""

    logprob: float
    decoded_token: str | None  # None without a tokenizer


@dataclass(eq=False)
class Sequence:
    """The tokens of one answer: the prompt, and the output so far."""

    tokens: list[int]  # prompt and output
    prompt_len: int
    limit: int  # the length at which it ends, in tokens
    parent: Sequence | None = None  # the first answer to the same prompt
    scored: int | None = None  # tokens of the prompt with log-probabilities; None: not wanted
    priority: int = 0  # lower ones first
    # the scheduler's
    arrival: int = 0
    status: SequenceStatus = SequenceStatus.WAITING
    computed: int = 0  # tokens with keys and values in the cache when all launched steps have run
    confirmed: int = 0  # of these, tokens of steps that have run
    pending: int = 0  # tokens of launched steps that the host has not read into `tokens`
    # the blocks of each cache group, in order; a list only grows, other blocks are another list
    block_tables: list[list[int]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of the full blocks of tokens
    awaits: bytes | None = None  # the digest of a block that another sequence is computing
    cached_tokens: int | None = None  # found in the cache when it was first admitted
    preemptions: int = 0

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next can be sampled; 1 for a decoding sequence."""
        return len(self.tokens) + self.pending - self.computed

    @property
    def total(self) -> int:
        """The number of its tokens, including those that the host does not know yet."""
        return len(self.tokens) + self.pending

    @property
    def order(self) -> tuple[int, int]:
        """The sort key of the queue: lower priorities, then earlier arrivals."""
        return self.priority, self.arrival

    @property
    def shared(self) -> int:
        """Tokens that answers to one prompt share: each computes the last for its own logits."""
        return self.prompt_len - 1

    @property
    def scores_prompt(self) -> bool:
        """True if tokens of its prompt still lack their log-probabilities."""
        return self.scored is not None and self.scored < self.prompt_len

    @property
    def output(self) -> list[int]:
        """A copy of the tokens after the prompt."""
        return self.tokens[self.prompt_len :]


@dataclass(eq=False)
class Answer:
    """A sequence with its parameters and results, which the scheduler does not need."""

    index: int
    sequence: Sequence
    params: SamplingParams
    seed: int
    stop_tokens: frozenset[int]
    bad_words: tuple[tuple[int, ...], ...] = ()
    matcher: Matcher | None = None  # of its structured outputs
    num_output: int = 0
    text: str = ""
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def position(self) -> int:
        """The number of the next token to sample, from 0."""
        return self.num_output + self.sequence.pending

    @property
    def sampled_on_device(self) -> bool:
        """True if its next token can be sampled before the host has seen the one before it."""
        params = self.params
        return not (
            params.needs_host or self.position < params.min_tokens or self.sequence.scores_prompt
        )


@dataclass(frozen=True)
class CompletionOutput:
    """One answer so far."""

    index: int
    text: str  # "" without a tokenizer
    token_ids: list[int]
    cumulative_logprob: float | None  # None without logprobs
    logprobs: list[dict[int, Logprob]] | None  # of each token: it, and the most likely ones
    finish_reason: str | None  # "stop", "length", "abort" or "error"; None: unfinished
    stop_reason: int | str | None = None  # the stop token or text; None: an end token of the model
    error: str | None = None  # what went wrong, with finish_reason "error"


@dataclass
class RequestMetrics:
    """Times in seconds, of a clock whose differences alone mean something; None: not yet."""

    arrival: float = field(default_factory=time.perf_counter)
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    cached_tokens: int = 0  # of the prompt, found in the cache
    preemptions: int = 0  # how often an answer lost its blocks and was computed again

    @property
    def queue_time(self) -> float | None:
        """From arrival to the first step."""
        return None if self.first_scheduled is None else self.first_scheduled - self.arrival

    @property
    def time_to_first_token(self) -> float | None:
        """From arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def total_time(self) -> float | None:
        """From arrival to the end."""
        return None if self.finished is None else self.finished - self.arrival


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its answers."""

    request_id: str
    prompt: str | None  # None if it was given as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    # of each token of the prompt: it, and the most likely ones; None for the first
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass(eq=False)
class Request:
    """A request in the engine."""

    id: str
    prompt: str | None
    prompt_ids: list[int]
    answers: list[Answer]
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # so far; None: not wanted
    changed: bool = False  # since its output was last taken
    error: str | None = None  # why it cannot be run
    finished: bool = False  # every answer has its finish reason, and its text
