"""How requests are worked on: queued, stepped, finished."""

from __future__ import annotations

import logging
import math
import time
from collections import abc, deque
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UserError
from .model_runner import LaunchedBatch, ModelRunner
from .outputs import Outputs
from .processor import InputProcessor
from .request import Answer, Request, RequestOutput, Sequence, SequenceStatus
from .sampling import SampledToken, limit_scored, score
from .scheduler import Scheduler, SchedulerOutput

logger = logging.getLogger("llmfast")

_STATUS = {
    1: "the model's logits hold NaN or infinity",
    2: "every token is barred: by logit_bias, min_tokens, structured_outputs or the model",
}


@dataclass(eq=False)
class InFlightStep:
    """A step that is on its way."""

    flight: LaunchedBatch
    # of each sequence: its tokens in the cache after the step, and how often it was preempted
    computed: dict[Sequence, tuple[int, int]]
    sampled: list[Sequence]


class EngineCore:
    """What :class:`.llm.LLM` does with requests."""

    _executor: ModelRunner  # these are LLM's
    _scheduler: Scheduler
    _processor: InputProcessor
    _outputs: Outputs

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}  # that are not finished
        self._owners: dict[Sequence, tuple[Request, Answer]] = {}
        self._aborted: set[str] = set()
        self._in_flight: deque[InFlightStep] = deque()  # steps on their way, oldest first
        self._closed = False

    def _add(
        self,
        prompts: Any,
        params: Any,
        priority: int | abc.Sequence[int] = 0,
        *,
        streaming: bool,
        request_id: str | None = None,
    ) -> list[Request]:
        """Queue requests; those that cannot be run are finished already, with an error.

        Args:
            request_id: of a single prompt, that no unfinished request has; None: one is made.
        """
        if self._closed:
            raise RuntimeError("LLM: it is closed")
        # raises before anything is queued
        parsed = self._processor.read(prompts, params, priority)
        requests = []
        for each in parsed:
            request = self._processor.make(each, request_id)
            requests.append(request)
            try:
                self._processor.check(request, each.params)
                for answer in request.answers:
                    self._scheduler.add(answer.sequence)
            except UserError as error:
                for answer in request.answers:
                    self._finish(request, answer, "error", error=str(error))
                continue
            self._requests[request.id] = request
            for answer in request.answers:
                self._owners[answer.sequence] = (request, answer)
                if streaming or each.params.stop:
                    self._outputs.follow(answer)
        return requests

    def _drop(self, requests: abc.Sequence[Request]) -> None:
        """Abort those that are not finished."""
        for request in requests:
            for answer in request.answers:
                if answer.finish_reason is None:
                    self._finish(request, answer, "abort")

    def _finish(
        self,
        request: Request,
        answer: Answer,
        reason: str,
        *,
        error: str | None = None,
        forget: bool = False,
    ) -> None:
        sequence = answer.sequence
        if sequence.status != SequenceStatus.FINISHED:
            self._scheduler.finish(sequence, forget=forget)
        self._owners.pop(sequence, None)
        answer.finish_reason, answer.error = reason, error
        request.changed = True
        self._outputs.finish(answer)
        metrics = request.metrics
        metrics.preemptions += sequence.preemptions
        if error is not None:
            logger.warning("llmfast: request %s failed: %s", request.id, error)
        if request.finished:
            metrics.finished = time.perf_counter()
            self._requests.pop(request.id, None)
            self._aborted.discard(request.id)

    # -------------------------------------------------------------------------------- steps

    def _step(self) -> None:
        """Run what is scheduled next, and give each answer that has one its token.

        If it raises, what was in the step waits again, and the engine can go on. If memory ran out,
        the request with the most tokens in the step ends, and nothing is raised.
        """
        if self._closed:
            raise RuntimeError("LLM: it is closed")
        while self._aborted:
            request = self._requests.get(self._aborted.pop())
            if request is not None:
                self._drop([request])
        plan = self._scheduler.schedule()
        if not plan.num_scheduled_tokens and not self._in_flight:
            assert not self._requests, "nothing is scheduled and something waits"
            return
        now = time.perf_counter()
        for sequence in plan.num_scheduled_tokens:
            metrics = self._owners[sequence][0].metrics
            if metrics.first_scheduled is None:
                metrics.first_scheduled = now
                metrics.cached_tokens = sequence.cached_tokens or 0
        try:
            if plan.num_scheduled_tokens:
                self._launch(plan)
            ahead = self._ahead() if plan.num_scheduled_tokens else 0
            while len(self._in_flight) > ahead:
                self._collect()
        except BaseException as error:
            largest = self._largest(plan)
            self._in_flight.clear()
            for sequence in list(self._scheduler.running):
                self._scheduler.preempt(sequence)
            if not isinstance(error, torch.OutOfMemoryError) or largest is None:
                raise
            self._fail_for_memory(largest)

    def _largest(self, plan: SchedulerOutput) -> Sequence | None:
        """The sequence that runs and has the most tokens in a step; the last of several."""
        running = reversed(self._scheduler.running)
        return max(running, key=lambda s: plan.num_scheduled_tokens.get(s, 0), default=None)

    def _fail_for_memory(self, sequence: Sequence) -> None:
        """End the request of a sequence that a step had no memory for; the others run again."""
        request, _ = self._owners[sequence]
        error = (
            "memory ran out in a step in which no request had more tokens than this one; lower "
            "max_num_batched_tokens, max_num_seqs or gpu_memory_utilization"
        )
        for answer in request.answers:
            if answer.finish_reason is None:
                self._finish(request, answer, "error", error=error)

    def _ahead(self) -> int:
        """How many steps may be on their way while the next one is prepared.

        One, so that a GPU need not wait for the host; but none while what is chosen depends on
        tokens that the host has not seen.
        """
        if not self._executor.asynchronous:
            return 0
        running = self._scheduler.running  # of those that wait no token is on its way
        return int(all(self._owners[sequence][1].sampled_on_device for sequence in running))

    def _launch(self, plan: SchedulerOutput) -> None:
        scored = limit_scored(plan, self._scheduler.max_num_seqs)
        sampled = [s for s, count in plan.num_scheduled_tokens.items() if count == s.remaining]
        answers = [self._owners[sequence][1] for sequence in sampled]
        previous = self._in_flight[-1].flight if self._in_flight else None
        flight = self._executor.launch(plan, answers, previous, scored)
        computed = {}
        for sequence, count in plan.num_scheduled_tokens.items():
            self._scheduler.begin(sequence, count)
            computed[sequence] = (sequence.computed, sequence.preemptions)
        for sequence in sampled:
            sequence.pending += 1
        self._in_flight.append(InFlightStep(flight, computed, sampled))

    def _collect(self) -> None:
        """Wait for the oldest step on its way, and give each answer that has one its token."""
        started = self._in_flight.popleft()
        choices = self._executor.collect(started.flight)
        # those that have ended, or lost their blocks, since it was started have no use for it
        alive = {
            sequence
            for sequence, (_, preemptions) in started.computed.items()
            if sequence.status == SequenceStatus.RUNNING and sequence.preemptions == preemptions
        }
        for sequence, (computed, _) in started.computed.items():
            if sequence in alive:
                self._scheduler.confirm(sequence, computed)
        if started.flight.scored:
            self._take_prompts(started.flight, alive)
        for sequence, choice in zip(started.sampled, choices, strict=True):
            if sequence in alive and sequence.status == SequenceStatus.RUNNING:
                sequence.pending -= 1
                self._take(*self._owners[sequence], choice)

    def _take_prompts(self, flight: LaunchedBatch, alive: set[Sequence]) -> None:
        """Append log-probabilities of prompts."""
        start = 0
        for sequence, count in flight.scored.items():
            logits = flight.logits[start : start + count]
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
                    for each in request.answers:
                        self._finish(request, each, "error", error=_STATUS[1], forget=True)
                    break
                request.prompt_logprobs.append(self._outputs.logprobs(token, logprob, top))
            sequence.scored = first + count

    def _take(self, request: Request, answer: Answer, choice: SampledToken) -> None:
        """Append a token, and see whether the answer ends with it."""
        if choice.error is not None:
            self._finish(request, answer, "error", error=choice.error)
            return
        if choice.status:
            message = _STATUS.get(choice.status, f"sampling failed with status {choice.status}")
            self._finish(request, answer, "error", error=message, forget=True)
            return
        if answer.matcher is not None and not answer.matcher.accept(choice.token):
            error = f"the token {choice.token} does not fit structured_outputs"
            self._finish(request, answer, "error", error=error)
            return
        request.changed = True
        if request.metrics.first_token is None:
            request.metrics.first_token = time.perf_counter()
        reason = self._outputs.append(answer, choice)
        if reason is not None:
            self._finish(request, answer, reason)

    def _output(self, request: Request) -> RequestOutput:
        return self._outputs.output(request)
