"""The engine core: requests are queued, run step by step, and finished."""

from __future__ import annotations

import logging
import math
import time
from collections import abc, deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from ..errors import UserError
from .model_runner import LaunchedBatch, ModelRunner
from .outputs import OutputProcessor
from .processor import InputProcessor
from .request import Answer, Request, RequestOutput, Sequence, SequenceStatus
from .sampling import SampledToken, score
from .scheduler import Scheduler
from .scheduler_output import SchedulerOutput
from .sharing import SharedSteps

logger = logging.getLogger("llmfast")
T = TypeVar("T")

_STATUS = {
    1: "the model's logits hold NaN or infinity",
    2: "every token is barred: by logit_bias, min_tokens, structured_outputs or the model",
}


def _nothing() -> None:
    """Do nothing."""


@dataclass(eq=False)
class InFlightStep:
    """A step that was launched and not collected yet."""

    handle: LaunchedBatch
    # of each sequence: its computed tokens after the step, and its preemptions at launch
    computed: dict[Sequence, tuple[int, int]]
    sampled: list[Sequence]  # those that get a token
    num_prompt_logits: dict[Sequence, int]


class EngineCore:
    """The engine core: queues requests, runs steps and collects tokens.

    Any number of threads may call it at the same time. :meth:`add` and :meth:`abort` never wait for
    a step. :meth:`run_until` shares steps: one thread runs them, all take their own results.

    Attributes:
        processor: makes the requests that :meth:`add` takes.
        model_runner: runs steps on the model's device.
        scheduler: chooses what runs in a step.
        outputs: makes outputs of requests.
        requests: unfinished requests by id.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        scheduler: Scheduler,
        processor: InputProcessor,
        outputs: OutputProcessor,
        *,
        on_close: abc.Callable[[], None] = _nothing,
    ) -> None:
        """
        Args:
            on_close: called once, after the model runner is closed.
        """
        self.model_runner = model_runner
        self.scheduler = scheduler
        self.processor = processor
        self.outputs = outputs
        self.requests: dict[str, Request] = {}
        self._on_close = on_close
        self._owners: dict[Sequence, tuple[Request, Answer]] = {}
        self._in_flight: deque[InFlightStep] = deque()  # oldest first
        self._shared = SharedSteps(self._step)
        self._closed = False

    # ---------------------------------------------------------------------- from any thread

    def add(self, requests: abc.Sequence[Request], *, streaming: bool = False) -> None:
        """Queue requests; one that cannot be run is finished with an error.

        Args:
            streaming: keep the text of answers up to date with each token.

        Raises:
            RuntimeError: the engine is closed.
        """
        if self._closed:
            raise RuntimeError("LLM: it is closed")
        self._shared.post(partial(self._queue, list(requests), streaming))

    def abort(self, requests: abc.Sequence[Request]) -> None:
        """End requests before the next step; those that are finished stay as they are."""
        self._shared.post(partial(self._abort, list(requests)))

    def abort_id(self, request_id: str) -> None:
        """End the request of an id before the next step, if there is an unfinished one."""
        self._shared.post(partial(self._abort_id, request_id))

    @property
    def has_work(self) -> bool:
        """True if a request is queued or running."""
        return bool(self.requests) or self._shared.has_posted

    @property
    def idle(self) -> bool:
        """True if nothing is kept of any request. A step in flight may still compute its tokens."""
        return not (
            self.has_work
            or self._owners
            or self.scheduler.has_sequences
            or self.outputs.num_detokenizers
        )

    def step(self) -> None:
        """Schedule a step, launch it, and collect the tokens of the steps that have run.

        If it raises, its sequences wait again, and the engine can go on. If memory runs out, the
        request with the most tokens in the step ends with an error, and nothing is raised.

        Raises:
            RuntimeError: the engine is closed.
        """
        self._shared.step()

    def run_until(self, collect: abc.Callable[[], T | None]) -> T:
        """Run steps until ``collect`` returns a result, together with other threads that do so.

        Args:
            collect: called between steps, by any of these threads: what it reads does not change
                meanwhile. None: no result yet.

        Raises:
            Exception: what ``collect`` or a step raised; every thread that waits gets the latter.
        """
        return self._shared.run_until(collect)

    def output(self, request: Request) -> RequestOutput:
        """Return the output of a request so far. Call it in :meth:`run_until`, or when finished."""
        return self.outputs.output(request)

    def close(self) -> None:
        """Abort all requests, wait for a running step, and free the cache and the model."""
        with self._shared.exclusive():
            if self._closed:
                return
            self._closed = True
            self._abort(list(self.requests.values()))
            self._in_flight.clear()
            with self._device():
                self.model_runner.close()
                self._on_close()
            self._on_close = _nothing  # it holds the model
            self._shared.hand_out()

    # ----------------------------------------------------------------------------- requests

    def _queue(self, requests: list[Request], streaming: bool) -> None:
        for request in requests:
            if self._closed:  # since it was added
                self._end(request, "abort")
                continue
            try:
                if request.error is not None:
                    raise UserError(request.error)
                for answer in request.answers:
                    self.scheduler.add(answer.sequence)
            except UserError as error:
                self._end(request, "error", error=str(error))
                continue
            self.requests[request.id] = request
            for answer in request.answers:
                self._owners[answer.sequence] = (request, answer)
                if streaming or answer.params.stop:
                    self.outputs.start_text(answer)

    def _abort(self, requests: list[Request]) -> None:
        for request in requests:
            self._end(request, "abort")

    def _abort_id(self, request_id: str) -> None:
        request = self.requests.get(request_id)
        if request is not None:
            self._end(request, "abort")

    def _end(
        self, request: Request, reason: str, *, error: str | None = None, forget: bool = False
    ) -> None:
        """Finish the answers of a request that are not finished."""
        for answer in request.answers:
            if answer.finish_reason is None:
                self._finish(request, answer, reason, error=error, forget=forget)

    def _finish(
        self,
        request: Request,
        answer: Answer,
        reason: str,
        *,
        error: str | None = None,
        forget: bool = False,
    ) -> None:
        """Finish an answer. With ``forget``, its blocks are not found as a prefix."""
        sequence = answer.sequence
        if sequence.status != SequenceStatus.FINISHED:
            self.scheduler.finish(sequence, forget=forget)
        self._owners.pop(sequence, None)
        answer.finish_reason, answer.error = reason, error
        request.changed = True
        self.outputs.finish(answer)
        metrics = request.metrics
        metrics.preemptions += sequence.preemptions
        if error is not None:
            logger.warning("llmfast: request %s failed: %s", request.id, error)
        if all(each.finish_reason is not None for each in request.answers):
            metrics.finished = time.perf_counter()
            request.finished = True
            if self.requests.get(request.id) is request:
                del self.requests[request.id]

    # -------------------------------------------------------------------------------- steps

    def _step(self) -> None:
        if self._closed:
            raise RuntimeError("LLM: it is closed")
        # steps write to tensors that other callers' steps write to, in whatever mode they call
        with self._device(), torch.inference_mode(False):
            self._run_step()

    def _device(self) -> AbstractContextManager[object]:
        """Make the model's GPU the current one of this thread."""
        device = self.model_runner.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _run_step(self) -> None:
        scheduled = self.scheduler.schedule()
        counts = scheduled.num_scheduled_tokens
        if not counts and not self._in_flight:
            assert not self.requests, "nothing is scheduled and something waits"
            return
        now = time.perf_counter()
        for sequence in counts:
            metrics = self._owners[sequence][0].metrics
            if metrics.first_scheduled is None:
                metrics.first_scheduled = now
                metrics.cached_tokens = sequence.cached_tokens or 0
        try:
            if counts:
                self._launch(scheduled)
            ahead = self._max_in_flight() if counts else 0
            while len(self._in_flight) > ahead:
                self._collect()
        except BaseException as error:
            largest = self._largest(scheduled)
            self._in_flight.clear()
            for sequence in list(self.scheduler.running):
                self.scheduler.preempt(sequence)
            if not isinstance(error, torch.OutOfMemoryError) or largest is None:
                raise
            self._fail_for_memory(largest)

    def _largest(self, scheduled: SchedulerOutput) -> Sequence | None:
        """Return the running sequence with the most tokens in a step, the last of several."""
        running = reversed(self.scheduler.running)
        return max(running, key=lambda s: scheduled.num_scheduled_tokens.get(s, 0), default=None)

    def _fail_for_memory(self, sequence: Sequence) -> None:
        """End the request of a sequence that a step had no memory for; the others run again."""
        request, _ = self._owners[sequence]
        error = (
            "memory ran out in a step in which no request had more tokens than this one; lower "
            "max_num_batched_tokens, max_num_seqs or gpu_memory_utilization"
        )
        self._end(request, "error", error=error)

    def _max_in_flight(self) -> int:
        """Return how many steps may be in flight while the next one is prepared.

        One, so that the GPU does not wait for the host. None if a token that is to be chosen
        depends on tokens that the host has not seen.
        """
        if not self.model_runner.asynchronous:
            return 0
        running = self.scheduler.running  # waiting sequences have no token in flight
        return int(all(self._owners[sequence][1].sampled_on_device for sequence in running))

    def _launch(self, scheduled: SchedulerOutput) -> None:
        counts, num_prompt_logits = scheduled.num_scheduled_tokens, scheduled.num_prompt_logits
        sampled = [s for s, count in counts.items() if count == s.remaining]
        answers = [self._owners[sequence][1] for sequence in sampled]
        previous = self._in_flight[-1].handle if self._in_flight else None
        handle = self.model_runner.launch(scheduled, answers, previous, num_prompt_logits)
        computed = {}
        for sequence, count in counts.items():
            self.scheduler.begin(sequence, count)
            computed[sequence] = (sequence.computed, sequence.preemptions)
        for sequence in sampled:
            sequence.pending += 1
        self._in_flight.append(InFlightStep(handle, computed, sampled, num_prompt_logits))

    def _collect(self) -> None:
        """Wait for the oldest step in flight, and append the tokens that it sampled."""
        step = self._in_flight.popleft()
        tokens = self.model_runner.collect(step.handle)
        # a sequence that has finished or was preempted since the launch has no use for its token
        alive = {
            sequence
            for sequence, (_, preemptions) in step.computed.items()
            if sequence.status == SequenceStatus.RUNNING and sequence.preemptions == preemptions
        }
        for sequence, (computed, _) in step.computed.items():
            if sequence in alive:
                self.scheduler.confirm(sequence, computed)
        if step.num_prompt_logits:
            self._append_prompt_logprobs(step, alive)
        for sequence, token in zip(step.sampled, tokens, strict=True):
            if sequence in alive and sequence.status == SequenceStatus.RUNNING:
                sequence.pending -= 1
                self._append(*self._owners[sequence], token)

    def _append_prompt_logprobs(self, step: InFlightStep, alive: set[Sequence]) -> None:
        start = 0
        for sequence, count in step.num_prompt_logits.items():
            logits = step.handle.logits[start : start + count]
            start += count
            if sequence not in alive:
                continue
            request, answer = self._owners[sequence]
            first = sequence.scored or 1
            tokens = sequence.tokens[first : first + count]
            found = score(logits, tokens, [answer.params.prompt_logprobs or 0] * count)
            assert request.prompt_logprobs is not None
            for token, (logprob, top) in zip(tokens, found, strict=True):
                if math.isnan(logprob):
                    self._end(request, "error", error=_STATUS[1], forget=True)
                    break
                request.prompt_logprobs.append(self.outputs.logprobs(token, logprob, top))
            sequence.scored = first + count

    def _append(self, request: Request, answer: Answer, sampled: SampledToken) -> None:
        """Append a token, and finish the answer if it ends with it."""
        if sampled.error is not None:
            self._finish(request, answer, "error", error=sampled.error)
            return
        if sampled.status:
            message = _STATUS.get(sampled.status, f"sampling failed with status {sampled.status}")
            self._finish(request, answer, "error", error=message, forget=True)
            return
        if answer.matcher is not None and not answer.matcher.accept(sampled.token):
            error = f"the token {sampled.token} does not fit structured_outputs"
            self._finish(request, answer, "error", error=error)
            return
        request.changed = True
        if request.metrics.first_token is None:
            request.metrics.first_token = time.perf_counter()
        reason = self.outputs.append(answer, sampled)
        if reason is not None:
            self._finish(request, answer, reason)
