"""What callers give, as requests that are checked."""

from __future__ import annotations

import random
from collections import abc
from hashlib import blake2b
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from .request import Answer, Request, RequestMetrics, Sequence
from .sampling_params import SamplingParams
from .structured import Grammars, wants_xgrammar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Prompt = str | abc.Sequence[int] | abc.Mapping[str, Any]


class ParsedPrompt(NamedTuple):
    """A prompt and what is wanted of it."""

    text: str | None  # None if it was given as token ids
    ids: list[int]
    params: SamplingParams
    priority: int


class InputProcessor:
    """Makes requests; one for each prompt."""

    def __init__(
        self,
        tokenizer: Any,
        end_tokens: set[int],
        *,
        vocabulary: int,
        max_model_len: int,
        room: int,
        seed: int,
    ) -> None:
        """
        Args:
            tokenizer: None: prompts are token ids.
            room: tokens that the cache holds.
            seed: of the seeds of requests that have none.
        """
        self.tokenizer = tokenizer
        self.end_tokens = end_tokens
        self.vocabulary = vocabulary
        self.max_model_len = max_model_len
        self.room = room
        self._grammars = Grammars(tokenizer, end_tokens, vocabulary)
        self._seeds = random.Random(seed)
        self._count = 0

    def read(
        self, prompts: Any, params: Any, priority: int | abc.Sequence[int]
    ) -> list[ParsedPrompt]:
        """The arguments of ``LLM.generate``, prompt by prompt.

        Raises:
            UserError, ValueError, TypeError: as ``LLM.generate``.
        """
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
            if given.structure is not None:
                wants_xgrammar()
        priorities = _as_priorities(priority, len(parts))
        known = [self._tokenize(prompt) for prompt in parts]
        return [
            ParsedPrompt(*prompt, *own)
            for prompt, *own in zip(known, params, priorities, strict=True)
        ]

    def make(self, parsed: ParsedPrompt, request_id: str | None = None) -> Request:
        """A request, not checked yet.

        Args:
            request_id: None: one is made.
        """
        text, ids, params, priority = parsed
        most = self.max_model_len
        if params.max_tokens is None:
            most = max(min(most, self.room + 1), len(ids) + 1)  # the last token is never computed
        else:
            most = min(most, len(ids) + params.max_tokens)
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else self.end_tokens)
        bad_words = self._words(params)
        answers: list[Answer] = []
        for number in range(params.n):
            parent = answers[0].sequence if answers else None
            sequence = Sequence(list(ids), len(ids), most, parent, priority=priority)
            own = _seed_of(seed, number)
            answers.append(Answer(number, sequence, params, own, frozenset(stops), bad_words))
        made = str(self._count)
        self._count += 1
        request = Request(request_id or made, text, ids, answers, RequestMetrics())
        if params.prompt_logprobs is not None and ids:
            request.prompt_logprobs = [None]
            answers[0].sequence.scored = 1
        return request

    def check(self, request: Request, params: SamplingParams) -> None:
        """Raise UserError if a request cannot be run; answers get their matchers."""
        ids, vocabulary = request.prompt_ids, self.vocabulary
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
        if params.structure is not None:
            for answer in request.answers:
                answer.matcher = self._grammars.matcher(params.structure)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        text: str | None = None
        if isinstance(prompt, abc.Mapping):
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


def end_tokens_of(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """The model's end tokens: those of its generation config, or the tokenizer's."""
    config = model.generation_config
    given = None if config is None else config.eos_token_id
    if given is None:
        given = getattr(tokenizer, "eos_token_id", None)
    if given is None:
        return set()
    return {given} if isinstance(given, int) else set(given)


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, (str, abc.Mapping)):
        return [prompts]
    parts = list(prompts)
    if parts and not isinstance(parts[0], (str, abc.Mapping, abc.Sequence)):
        try:
            return [[index(token) for token in parts]]
        except TypeError:
            pass  # a list of tensors or arrays of token ids
    return parts


def _as_priorities(priority: int | abc.Sequence[int], count: int) -> list[int]:
    if not isinstance(priority, abc.Sequence):
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
