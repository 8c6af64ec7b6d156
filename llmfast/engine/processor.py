"""From a caller's arguments to checked requests: tokenization, seeds, stop tokens, grammars."""

from __future__ import annotations

import random
from collections import abc
from hashlib import blake2b
from operator import index
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from .request import Answer, Request, RequestMetrics, Sequence
from .sampling_params import SamplingParams
from .structured import Grammars, require_xgrammar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Prompt = str | abc.Sequence[int] | abc.Mapping[str, Any]


class ParsedPrompt(NamedTuple):
    """A prompt as token ids, with its parameters."""

    text: str | None  # None if it was given as token ids
    ids: list[int]
    params: SamplingParams
    priority: int


class InputProcessor:
    """Makes one request of each prompt. Several threads may use it at the same time.

    Tokenizing and compiling a grammar take long, and hold up no step: neither needs the engine.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_tokens: set[int],
        *,
        vocabulary: int,
        max_model_len: int,
        cache_tokens: int,
        seed: int,
    ) -> None:
        """
        Args:
            tokenizer: a transformers tokenizer, or None if prompts are token ids.
            end_tokens: the model's own.
            vocabulary: number of tokens that the model has logits for.
            max_model_len: tokens of a prompt with its answer, at most.
            cache_tokens: tokens that the cache holds.
            seed: of the seeds drawn for requests without one.
        """
        self.tokenizer = tokenizer
        self.end_tokens = end_tokens
        self.vocabulary = vocabulary
        self.max_model_len = max_model_len
        self.cache_tokens = cache_tokens
        self.grammars = Grammars(tokenizer, end_tokens, vocabulary)
        self._seeds = random.Random(seed)
        self._count = 0
        self._lock = Lock()  # over _seeds and _count
        # a fast tokenizer sets its truncation before it encodes, and must not meanwhile encode
        self._encoding = Lock()

    def process(
        self,
        prompts: Any,
        params: Any = None,
        priority: int | abc.Sequence[int] = 0,
        *,
        request_id: str | None = None,
        seed: int | None = None,
    ) -> list[Request]:
        """Return a request for each prompt; one that cannot be run has its ``error``.

        Args:
            prompts, params, priority: as :meth:`.llm.LLM.generate` takes them.
            request_id: of a single prompt; None: one is made.
            seed: of a request without one, from :meth:`draw_seed`; None: it is drawn here.

        Raises:
            UserError, ValueError, TypeError: as :meth:`.llm.LLM.generate`.
        """
        parsed = self.parse(prompts, params, priority)  # raises before any seed is drawn
        return [self._make(each, request_id, seed) for each in parsed]

    def parse(
        self, prompts: Any, params: Any, priority: int | abc.Sequence[int]
    ) -> list[ParsedPrompt]:
        """Return the arguments of ``LLM.generate`` prompt by prompt, tokenized.

        Raises:
            UserError, ValueError, TypeError: as :meth:`.llm.LLM.generate`.
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
                require_xgrammar()
        priorities = _as_priorities(priority, len(parts))
        tokenized = [self._tokenize(prompt) for prompt in parts]
        return [
            ParsedPrompt(*prompt, *own)
            for prompt, *own in zip(tokenized, params, priorities, strict=True)
        ]

    def draw_seed(self) -> int:
        """Return the next seed for a request without one."""
        with self._lock:
            return self._seeds.getrandbits(63)

    def encode(self, text: str, **options: Any) -> list[int]:
        """Return the token ids of a text.

        Raises:
            UserError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError("LLM: no tokenizer was given; give prompts as lists of token ids")
        with self._encoding:
            return list(self.tokenizer.encode(text, **options))

    def chat_prompt(self, messages: abc.Sequence[abc.Mapping[str, Any]]) -> dict[str, Any]:
        """Return the prompt that the chat template makes of a conversation.

        Raises:
            UserError: there is no tokenizer, or it has no chat template.
        """
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise UserError("LLM.chat: wants a tokenizer with a chat template; this has none")
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids = self.encode(text, add_special_tokens=False)  # the template has them
        return {"prompt": text, "prompt_token_ids": ids}

    # -------------------------------------------------------------------------------- inside

    def _make(self, parsed: ParsedPrompt, request_id: str | None, seed: int | None) -> Request:
        text, ids, params, priority = parsed
        limit = self.max_model_len
        if params.max_tokens is None:
            # the last token is never computed, so it needs no place in the cache
            limit = max(min(limit, self.cache_tokens + 1), len(ids) + 1)
        else:
            limit = min(limit, len(ids) + params.max_tokens)
        if params.seed is not None:
            seed = params.seed
        elif seed is None:
            seed = self.draw_seed()
        stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else self.end_tokens)
        bad_words = self._bad_words(params)
        answers: list[Answer] = []
        for number in range(params.n):
            parent = answers[0].sequence if answers else None
            sequence = Sequence(list(ids), len(ids), limit, parent, priority=priority)
            own = _answer_seed(seed, number)
            answers.append(Answer(number, sequence, params, own, frozenset(stops), bad_words))
        with self._lock:
            number, self._count = self._count, self._count + 1
        request = Request(request_id or str(number), text, ids, answers, RequestMetrics())
        if params.prompt_logprobs is not None and ids:
            request.prompt_logprobs = [None]
            answers[0].sequence.scored = 1
        try:
            self._check(ids, params)
            if params.structure is not None:
                for answer in answers:
                    answer.matcher = self.grammars.matcher(params.structure)
        except UserError as error:
            request.error = str(error)
        return request

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        """Raise UserError if a request cannot be run."""
        vocabulary = self.vocabulary
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
        return text, self.encode(text)

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Return the bad words as token ids; a text as a first word and after a space."""
        words: dict[tuple[int, ...], None] = {}
        for word in params.bad_words or ():
            if not isinstance(word, str):
                words[tuple(word)] = None
            elif self.tokenizer is not None:
                for text in (word, " " + word.lstrip()):
                    words[tuple(self.encode(text, add_special_tokens=False))] = None
        return tuple(word for word in words if word)


def takes_long(prompt: Prompt, params: SamplingParams | None) -> bool:
    """Return whether a request takes a tokenizer or a grammar compiler."""
    if isinstance(prompt, str) or (
        isinstance(prompt, abc.Mapping) and "prompt_token_ids" not in prompt
    ):
        return True
    if not isinstance(params, SamplingParams):
        return False
    texts = any(isinstance(word, str) for word in params.bad_words or ())
    return texts or params.structure is not None


def end_tokens_of(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Return the model's end tokens: of its generation config, or else of the tokenizer."""
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


def _answer_seed(seed: int, number: int) -> int:
    """Return the seed of an answer. The first has the request's, whatever n is."""
    if number == 0:
        return seed
    digest = blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
