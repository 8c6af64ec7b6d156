"""``LLM``: many requests on one model, a step at a time."""

from __future__ import annotations

import logging
import math
import os
import random
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from operator import index
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import UserError
from ..model.load import load
from ..model.patch import refuse
from ..runner.cache import BLOCK_SIZE
from .block_manager import BlockManager
from .executor import Executor, Flight
from .logits import limit_scored, score
from .request import (
    FINISHED,
    RUNNING,
    Answer,
    CompletionOutput,
    Logprob,
    Request,
    RequestMetrics,
    RequestOutput,
)
from .request import Sequence as Tokens
from .sampler import Choice, is_plain
from .sampling_params import SamplingParams
from .scheduler import Plan, Scheduler
from .text import Decoder, Detokenizer, find_stop, held_back

logger = logging.getLogger("llmfast")

Prompt = str | Sequence[int] | Mapping[str, Any]
MAX_TOKENS_OF_A_STEP = 4096  # more take memory for activations and gain no speed
_STATUS = {
    1: "the model's logits hold NaN or infinity",
    2: "every token is barred: by logit_bias, min_tokens or the model",
}


@dataclass(eq=False)
class _Started:
    """A step that is on its way."""

    flight: Flight
    # of each sequence: its tokens in the cache after the step, and how often it was preempted
    computed: dict[Tokens, tuple[int, int]]
    ready: list[Tokens]


class LLM:
    """Serves many requests with one model: continuous batching over a paged cache.

    Requests of any lengths run together; a step computes one token of each that decodes and
    chunks of new prompts. Prompts that begin alike share their blocks. What a request yields does
    not depend on what runs beside it, but for rounding. Not for several threads at once;
    :meth:`abort` alone may be called from another.

    Papers: Yu et al., Orca (OSDI 2022): batching by steps; Kwon et al., PagedAttention,
    arXiv:2309.06180; Agrawal et al., Sarathi-Serve, arXiv:2403.02310: chunked prefill.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        *,
        tokenizer: Any = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        block_size: int = BLOCK_SIZE,
        num_blocks: int | None = None,
        enforce_eager: bool = False,
        seed: int = 0,
    ) -> None:
        """
        Args:
            model: what :func:`llmfast.load` opens (``"embedded"``, a folder, a GGUF file, an id of
                the Hugging Face hub), or a model of transformers, which must not be moved or
                changed until :meth:`close`.
            tokenizer: of a model that is given; None: prompts are token ids and answers have no
                text.
            dtype, device: of a model that is loaded.
            max_model_len: tokens of a prompt and its answer; None: what the model was made for,
                or the cache holds if that is less.
            gpu_memory_utilization: the share of the GPU's memory that may be taken, with weights
                and what others hold; the cache gets what is left of it.
            max_num_seqs: answers that are worked on at the same time.
            max_num_batched_tokens: tokens of a step; None: 4,096, or max_num_seqs if that is more.
                Smaller ones shorten the steps that others wait for.
            enable_prefix_caching: keep finished blocks, for prompts that begin alike.
            enable_chunked_prefill: split long prompts, and run the chunks beside sequences that
                decode. Otherwise those wait while there are prompts to run, which are run whole:
                as many as max_num_batched_tokens takes, or one that is longer.
            block_size: tokens of a block: 16, 32, 64, 128 or 256.
            num_blocks: of the cache, instead of what gpu_memory_utilization gives.
            enforce_eager: run every step without CUDA graphs. Otherwise, on a GPU, those in which
                every sequence decodes are captured here.
            seed: of the seeds of requests that have none.

        Raises:
            UserError: the model cannot be loaded or run, or its cache does not fit.
            ValueError: an argument that is out of range.
        """
        if max_num_batched_tokens is None:
            max_num_batched_tokens = max(MAX_TOKENS_OF_A_STEP, max_num_seqs)
        for name, value in (
            ("max_model_len", max_model_len),
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("num_blocks", num_blocks),
        ):
            if value is not None and value < 1:
                raise ValueError(f"LLM: {name} must be 1 or more; got {value}")
        if block_size not in (16, 32, 64, 128, 256):
            raise ValueError(f"LLM: block_size must be 16, 32, 64, 128 or 256; got {block_size}")
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(
                "LLM: gpu_memory_utilization must be more than 0 and at most 1; "
                f"got {gpu_memory_utilization}"
            )
        if isinstance(model, (str, os.PathLike)):
            model, loaded_tokenizer = load(model, device=device, dtype=dtype)
            tokenizer = loaded_tokenizer if tokenizer is None else tokenizer
        elif dtype is not None or device is not None:
            raise ValueError(
                "LLM: dtype and device are of a model that is loaded; this one was given"
            )
        try:
            refuse(model)
        except UserError as error:
            raise UserError(str(error).replace("patch:", "LLM:", 1)) from None
        self.tokenizer = tokenizer
        self._decode = Decoder(tokenizer)
        self._end_tokens = _end_tokens(model, tokenizer)
        self._executor = Executor(
            model,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            utilization=gpu_memory_utilization,
            block_size=block_size,
            num_blocks=num_blocks,
            chunked=enable_chunked_prefill,
            eager=enforce_eager,
        )
        self.max_model_len = self._executor.max_model_len
        num_blocks = self._executor.num_blocks
        self._blocks = BlockManager(num_blocks, block_size, caching=enable_prefix_caching)
        self._scheduler = Scheduler(
            self._blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            chunked=enable_chunked_prefill,
        )
        self._seeds = random.Random(seed)
        self._requests: dict[str, Request] = {}  # that are not finished
        self._owners: dict[Tokens, tuple[Request, Answer]] = {}
        self._texts: dict[Answer, Detokenizer] = {}
        self._aborted: set[str] = set()
        self._flights: deque[_Started] = deque()  # steps on their way, oldest first
        self._count = 0
        self._closed = False

    # -------------------------------------------------------------------------- for callers

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Answer prompts, all at once.

        Args:
            prompts: texts, lists of token ids, or dictionaries ``{"prompt": text}`` or
                ``{"prompt_token_ids": ids}``; one of them or a list.
            sampling_params: for all prompts, or a list with one for each.
            use_tqdm: show a progress bar.
            priority: for all prompts, or a list with one for each: lower ones go first.

        Returns:
            An output for each prompt, in their order. A request that cannot be run (an empty
            prompt, say) has the finish reason ``"error"`` and says why in ``error``; the others
            are answered.

        Raises:
            UserError: text without a tokenizer.
            ValueError: another number of ``sampling_params`` or priorities than of prompts.
            TypeError: something that is no prompt.
        """
        requests = self._add(prompts, sampling_params, priority, streaming=False)
        progress: Any = None
        try:
            if use_tqdm:
                from tqdm.auto import tqdm  # type: ignore[import-untyped]

                progress = tqdm(total=len(requests), desc="Requests", dynamic_ncols=True)
            unfinished = requests
            while unfinished:
                before = len(unfinished)
                unfinished = [request for request in unfinished if not request.finished]
                if progress is not None:
                    progress.update(before - len(unfinished))
                if unfinished:
                    self._step()
            return [self._output(request) for request in requests]
        finally:
            if progress is not None:
                progress.close()
            self._drop(requests)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Answer conversations: lists of ``{"role": ..., "content": ...}``; one, or a list of them.

        Raises:
            UserError: there is no tokenizer, or it has no chat template; otherwise as
                :meth:`generate`.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        prompts = [self.chat_prompt(conversation) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm, priority=priority)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The prompt that the chat template makes of a conversation, for generate or stream.

        Raises:
            UserError: there is no tokenizer, or it has no chat template.
        """
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise UserError("LLM.chat: wants a tokenizer with a chat template; this has none")
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer.encode(text, add_special_tokens=False)  # the template has them
        return {"prompt": text, "prompt_token_ids": ids}

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> Generator[RequestOutput]:
        """Answer prompts, and yield the output of a request each time that it has grown.

        An output has everything so far. Its text has no half characters, nor anything that may
        turn out to be the beginning of a stop text. The requests are queued when the first output
        is asked for; leaving the loop aborts what is not finished. Several streams may be read in
        turn: a step runs the requests of all. Arguments and errors are those of :meth:`generate`.
        """
        requests = self._add(prompts, sampling_params, priority, streaming=True)
        try:
            while requests:
                if not any(request.changed for request in requests):
                    self._step()
                for request in requests:
                    if request.changed:
                        request.changed = False
                        yield self._output(request)
                # another stream's step may have finished one since it was yielded
                requests = [r for r in requests if r.changed or not r.finished]
        finally:
            self._drop(requests)

    def abort(self, request_id: str) -> None:
        """End a request before the next step; its finish reason is ``"abort"``.

        Of an id that is not, or no more, known nothing happens.
        """
        self._aborted.add(request_id)

    def close(self) -> None:
        """Free the cache, and leave a model that was given as it was."""
        if self._closed:
            return
        self._drop(list(self._requests.values()))
        self._closed = True
        self._flights.clear()
        self._executor.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ----------------------------------------------------------------------------- requests

    def _add(
        self,
        prompts: Any,
        params: Any,
        priority: int | Sequence[int] = 0,
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
        parts = _as_list(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(parts)
        if len(params) != len(parts):
            raise ValueError(
                f"LLM: wants as many sampling_params as prompts, {len(parts)}; got {len(params)}"
            )
        for given in params:
            if not isinstance(given, SamplingParams):
                raise TypeError(f"LLM: wants SamplingParams, got {type(given).__name__}")
        priorities = _as_priorities(priority, len(parts))
        known = [self._tokenize(prompt) for prompt in parts]  # raises before anything is queued
        requests = []
        for (text, ids), given, own in zip(known, params, priorities, strict=True):
            request = self._make_request(text, ids, given)
            request.id = request_id or request.id
            requests.append(request)
            try:
                self._check(request, given)
                for answer in request.answers:
                    answer.sequence.priority = own
                    self._scheduler.add(answer.sequence)
            except UserError as error:
                for answer in request.answers:
                    self._finish(request, answer, "error", error=str(error))
                continue
            self._requests[request.id] = request
            for answer in request.answers:
                self._owners[answer.sequence] = (request, answer)
                if self.tokenizer is not None and (streaming or given.stop):
                    self._texts[answer] = self._decode.detokenizer()
        return requests

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        text: str | None = None
        if isinstance(prompt, Mapping):
            text = prompt.get("prompt")
            if "prompt_token_ids" in prompt:
                return text, [index(token) for token in prompt["prompt_token_ids"]]
            if text is None:
                raise TypeError(
                    f"LLM: wants 'prompt' or 'prompt_token_ids' in a prompt; got {list(prompt)}"
                )
        elif isinstance(prompt, str):
            text = prompt
        else:
            return None, [index(token) for token in prompt]
        if self.tokenizer is None:
            raise UserError("LLM: no tokenizer was given; give prompts as lists of token ids")
        return text, list(self.tokenizer.encode(text))

    def _make_request(self, text: str | None, ids: list[int], params: SamplingParams) -> Request:
        most = self.max_model_len
        if params.max_tokens is None:
            room = self._blocks.num_blocks * self._blocks.block_size
            most = max(min(most, room + 1), len(ids) + 1)  # the last token is never computed
        else:
            most = min(most, len(ids) + params.max_tokens)
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        stops = set(params.stop_token_ids or ()) | (
            set() if params.ignore_eos else self._end_tokens
        )
        bad_words = self._words(params)
        answers: list[Answer] = []
        for number in range(params.n):
            parent = answers[0].sequence if answers else None
            sequence = Tokens(list(ids), len(ids), most, parent)
            own = _seed_of(seed, number)
            answers.append(Answer(number, sequence, params, own, frozenset(stops), bad_words))
        self._count += 1
        request = Request(str(self._count - 1), text, ids, answers, RequestMetrics())
        if params.prompt_logprobs is not None and ids:
            request.prompt_logprobs = [None]
            answers[0].sequence.scored = 1
        return request

    def _words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """The bad words as token ids; texts both as a first word and after a space."""
        words: dict[tuple[int, ...], None] = {}
        for word in params.bad_words or ():
            if not isinstance(word, str):
                words[tuple(word)] = None
            elif self.tokenizer is not None:
                for text in (word, " " + word.lstrip()):
                    words[tuple(self.tokenizer.encode(text, add_special_tokens=False))] = None
        return tuple(word for word in words if word)

    def _check(self, request: Request, params: SamplingParams) -> None:
        """Raise UserError if a request cannot be run."""
        ids, vocabulary = request.prompt_ids, self._executor.vocabulary
        if not ids:
            raise UserError("the prompt is empty; it wants at least one token")
        if len(ids) >= self.max_model_len:
            raise UserError(
                f"the prompt has {len(ids)} tokens and max_model_len is {self.max_model_len}, "
                "with at least one for the answer; shorten the prompt or raise max_model_len"
            )
        for name, tokens in (
            ("the prompt", ids),
            ("stop_token_ids", params.stop_token_ids or ()),
            ("logit_bias", params.logit_bias or ()),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("bad_words", [t for w in params.bad_words or () if not isinstance(w, str) for t in w]),
        ):
            bad = next((token for token in tokens if not 0 <= token < vocabulary), None)
            if bad is not None:
                raise UserError(
                    f"{name} has the token id {bad}; the model's are 0 to {vocabulary - 1}"
                )
        for name, most in (
            ("logprobs", params.logprobs),
            ("prompt_logprobs", params.prompt_logprobs),
        ):
            if (most or 0) > vocabulary:
                raise UserError(f"{name} is {most}, more than the {vocabulary} tokens of the model")
        if params.stop and self.tokenizer is None:
            raise UserError("stop texts want a tokenizer; give stop_token_ids instead")
        if self.tokenizer is None and any(isinstance(w, str) for w in params.bad_words or ()):
            raise UserError("bad_words as texts want a tokenizer; give lists of token ids instead")

    def _drop(self, requests: Sequence[Request]) -> None:
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
        if sequence.state != FINISHED:
            self._scheduler.finish(sequence, forget=forget)
        self._owners.pop(sequence, None)
        answer.finish_reason, answer.error = reason, error
        request.changed = True
        text = self._texts.pop(answer, None)
        if answer.stop_reason is None or not isinstance(answer.stop_reason, str):
            if text is not None:
                text.finish()
                answer.text = text.text
            elif self.tokenizer is not None:
                answer.text = self._decode(self._shown(answer))
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

        If it raises, what was in the step waits again, and the engine can go on.
        """
        if self._closed:
            raise RuntimeError("LLM: it is closed")
        while self._aborted:
            request = self._requests.get(self._aborted.pop())
            if request is not None:
                self._drop([request])
        plan = self._scheduler.schedule()
        if not plan.counts and not self._flights:
            assert not self._requests, "nothing is scheduled and something waits"
            return
        now = time.perf_counter()
        for sequence in plan.counts:
            metrics = self._owners[sequence][0].metrics
            if metrics.first_scheduled is None:
                metrics.first_scheduled = now
                metrics.cached_tokens = sequence.cached_tokens or 0
        try:
            if plan.counts:
                self._launch(plan)
            ahead = self._ahead() if plan.counts else 0
            while len(self._flights) > ahead:
                self._collect()
        except BaseException:
            self._flights.clear()
            for sequence in list(self._scheduler.running):
                self._scheduler.preempt(sequence)
            raise

    def _ahead(self) -> int:
        """How many steps may be on their way while the next one is prepared.

        One, so that a GPU need not wait for the host; but none while what is chosen depends on
        tokens that the host has not seen.
        """
        if not self._executor.asynchronous:
            return 0
        return int(all(is_plain(self._owners[s][1]) for s in self._scheduler.running))

    def _launch(self, plan: Plan) -> None:
        scored = limit_scored(plan, self._scheduler.max_num_seqs)
        ready = [s for s, count in plan.counts.items() if count == s.remaining]
        answers = [self._owners[sequence][1] for sequence in ready]
        previous = self._flights[-1].flight if self._flights else None
        flight = self._executor.launch(plan, answers, previous, scored)
        computed = {}
        for sequence, count in plan.counts.items():
            self._scheduler.begin(sequence, count)
            computed[sequence] = (sequence.computed, sequence.preemptions)
        for sequence in ready:
            sequence.pending += 1
        self._flights.append(_Started(flight, computed, ready))

    def _collect(self) -> None:
        """Wait for the oldest step on its way, and give each answer that has one its token."""
        started = self._flights.popleft()
        choices = self._executor.collect(started.flight)
        # those that have ended, or lost their blocks, since it was started have no use for it
        alive = {
            sequence
            for sequence, (_, preemptions) in started.computed.items()
            if sequence.state == RUNNING and sequence.preemptions == preemptions
        }
        for sequence, (computed, _) in started.computed.items():
            if sequence in alive:
                self._scheduler.confirm(sequence, computed)
        if started.flight.scored:
            self._take_prompts(started.flight, alive)
        for sequence, choice in zip(started.ready, choices, strict=True):
            if sequence in alive and sequence.state == RUNNING:
                sequence.pending -= 1
                self._take(*self._owners[sequence], choice)

    def _take_prompts(self, flight: Flight, alive: set[Tokens]) -> None:
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
                request.prompt_logprobs.append(self._logprobs(token, logprob, top))
            sequence.scored = first + count

    def _logprobs(
        self, token: int, logprob: float, top: Sequence[tuple[int, float]]
    ) -> dict[int, Logprob]:
        found = dict([*top, (token, logprob)])
        return {t: Logprob(lp, self._piece(t)) for t, lp in found.items()}

    def _take(self, request: Request, answer: Answer, choice: Choice) -> None:
        """Append a token, and see whether the answer ends with it."""
        if choice.error is not None:
            self._finish(request, answer, "error", error=choice.error)
            return
        if choice.status:
            message = _STATUS.get(choice.status, f"sampling failed with status {choice.status}")
            self._finish(request, answer, "error", error=message, forget=True)
            return
        request.changed = True
        if request.metrics.first_token is None:
            request.metrics.first_token = time.perf_counter()
        token, params, sequence = choice.token, answer.params, answer.sequence
        sequence.tokens.append(token)
        answer.num_output += 1
        if params.logprobs is not None and choice.logprob is not None:
            answer.cumulative_logprob += choice.logprob
            answer.logprobs.append(self._logprobs(token, choice.logprob, choice.top))
        if token in answer.stop_tokens:
            ends = token in self._end_tokens and not params.ignore_eos
            answer.stop_reason = None if ends else token
            self._finish(request, answer, "stop")
            return
        text = self._texts.get(answer)
        if text is not None:
            before = len(text.text)
            text.push(token)
            answer.text = text.text
            if params.stop and answer.num_output >= params.min_tokens:
                stop = find_stop(text.text, before, params.stop)
                if stop is not None:
                    answer.text, answer.stop_reason = text.text[: stop[0]], stop[1]
                    self._finish(request, answer, "stop")
                    return
            if params.stop:
                answer.text = text.text[: len(text.text) - held_back(text.text, params.stop)]
        if len(sequence.tokens) >= sequence.limit:
            self._finish(request, answer, "length")

    # ------------------------------------------------------------------------------ outputs

    def _output(self, request: Request) -> RequestOutput:
        outputs = []
        for answer in request.answers:
            wanted = answer.params.logprobs is not None
            outputs.append(
                CompletionOutput(
                    index=answer.index,
                    text=answer.text,
                    token_ids=answer.sequence.output,
                    cumulative_logprob=answer.cumulative_logprob if wanted else None,
                    logprobs=list(answer.logprobs) if wanted else None,
                    finish_reason=answer.finish_reason,
                    stop_reason=answer.stop_reason,
                    error=answer.error,
                )
            )
        prompt_logprobs = request.prompt_logprobs
        return RequestOutput(
            request_id=request.id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_ids,
            outputs=outputs,
            finished=request.finished,
            metrics=request.metrics,
            prompt_logprobs=None if prompt_logprobs is None else list(prompt_logprobs),
        )

    def _shown(self, answer: Answer) -> list[int]:
        """The output without the token that stopped it."""
        output = answer.sequence.output
        stopped = answer.finish_reason == "stop" and not isinstance(answer.stop_reason, str)
        return output[:-1] if stopped else output

    def _piece(self, token: int) -> str | None:
        return None if self.tokenizer is None else str(self.tokenizer.decode([token]))


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    parts = list(prompts)
    if parts and not isinstance(parts[0], (str, Mapping, Sequence)):
        try:
            return [[index(token) for token in parts]]
        except TypeError:
            pass  # a list of tensors or arrays of token ids
    return parts


def _as_priorities(priority: int | Sequence[int], count: int) -> list[int]:
    if not isinstance(priority, Sequence):
        return [index(priority)] * count
    if len(priority) != count:
        raise ValueError(f"LLM: wants as many priorities as prompts, {count}; got {len(priority)}")
    return [index(each) for each in priority]


def _seed_of(seed: int, number: int) -> int:
    """The seed of an answer: that of the request for the first, so that n changes nothing of it."""
    if number == 0:
        return seed
    digest = blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _end_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """The model's end tokens: those of its generation config, or the tokenizer's."""
    config = model.generation_config
    given = None if config is None else config.eos_token_id
    if given is None:
        given = getattr(tokenizer, "eos_token_id", None)
    if given is None:
        return set()
    return {given} if isinstance(given, int) else set(given)
