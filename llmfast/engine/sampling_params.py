"""The parameters of a request: how tokens are sampled, and when the answer ends."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError

if TYPE_CHECKING:
    import torch

LogitsProcessor = Callable[[list[int], "torch.Tensor"], "torch.Tensor"]
_LARGEST = 3.0e38  # the sampler computes in float32


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The structure of an answer: one of the first five attributes, with vLLM's names.

    Attributes:
        json: a JSON schema, as a dictionary or as text; it is kept as text.
        regex: a regular expression that the whole answer matches.
        choice: texts; the answer is one of them.
        grammar: a context-free grammar in EBNF; its first rule is ``root``.
        json_object: True: any JSON object.
        disable_any_whitespace: no whitespace in JSON except in the usual separators.

    Raises:
        ValueError: a value that is not allowed, or none or several of the first five.
        TypeError: an unknown parameter.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        kinds = ("json", "regex", "choice", "grammar", "json_object")
        given = [name for name in kinds if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise _wrong("structured_outputs", f"exactly one of {', '.join(kinds)}", got)
        if isinstance(self.json, Mapping):
            try:
                object.__setattr__(self, "json", json.dumps(self.json))
            except (TypeError, ValueError) as error:
                raise ValueError(f"SamplingParams: structured_outputs.json: {error}") from None
        for name in ("json", "regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                wanted = "a text" if name != "json" else "a dictionary or a text"
                raise _wrong(f"structured_outputs.{name}", wanted, getattr(self, name))
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool | None):
                raise _wrong(f"structured_outputs.{name}", "True or False", getattr(self, name))
        choice = self.choice
        if choice is not None:
            if (
                isinstance(choice, str)
                or not isinstance(choice, Sequence)
                or not (choice and all(isinstance(text, str) and text for text in choice))
            ):
                wanted = "a list of at least one text, none empty"
                raise _wrong("structured_outputs.choice", wanted, choice)
            object.__setattr__(self, "choice", tuple(choice))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The parameters of a request, with the names and defaults that vLLM uses.

    Attributes:
        n: answers to the prompt, each drawn on its own.
        temperature: the divisor of logits; 0 is greedy.
        top_p: keep the most likely tokens while those above them sum to less; 0 < top_p <= 1.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        min_p: keep tokens with at least this share of the largest probability, 0 to 1.
        presence_penalty: subtracted from the logits of tokens in the output, -2 to 2.
        frequency_penalty: subtracted for each time that a token is in the output, -2 to 2.
        repetition_penalty: positive logits of tokens in prompt or output are divided by it,
            negative ones multiplied; more than 0.
        seed: the same seed repeats the draws, whatever else runs; None: from the engine's seed.
        stop: texts that end the answer; they are not part of its text.
        stop_token_ids: tokens that end it, beside the model's own end tokens. The token is in
            ``token_ids``, not in the text.
        ignore_eos: go on after the model's own end tokens.
        min_tokens: nothing ends the answer before this many tokens; end tokens are masked.
        max_tokens: the longest answer; None: limited by the model and the cache alone.
        logprobs: for each token of the answer, log-probabilities of it and of this many most likely
            tokens, from the raw logits. None: none.
        prompt_logprobs: the same for each token of the prompt but the first. The whole prompt is
            computed then; nothing is taken from the prefix cache.
        logit_bias: added to the logits of tokens; -inf masks a token.
        allowed_token_ids: all other tokens are masked, end tokens too. None: all are allowed.
        bad_words: texts, or lists of token ids, that the answer must not have: the last token of
            one is masked where the answer ends with those before it. A text stands for its tokens
            with and without a space in front; spelled in other tokens it is not noticed.
        logits_processors: functions ``(ids, logits) -> logits``, called in their order for each
            token: the list of the answer's token ids so far, and the raw logits ``[vocabulary]``,
            a copy, on the model's device. Penalties and later stages use the logits they return.
            They run on the host, one row at a time. One that raises ends its request.
        structured_outputs: the structure of the answer: a :class:`StructuredOutputsParams`, or a
            dictionary of its parameters. Tokens that do not fit are masked. When the answer is
            complete, an end token of the model ends it, in spite of ``ignore_eos``; an answer that
            ``max_tokens`` cuts off is not complete. Needs the package ``xgrammar``.

    Raises:
        ValueError: a value that is not allowed.
        TypeError: an unknown parameter.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str | Sequence[int]] | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._integer("n", 1)
        self._number("temperature", "0 or more", lambda x: 0 <= x)
        self._number("top_p", "more than 0 and at most 1", lambda x: 0 < x <= 1)
        self._integer("top_k", -1)
        self._number("min_p", "from 0 to 1", lambda x: 0 <= x <= 1)
        self._number("presence_penalty", "from -2 to 2", lambda x: -2 <= x <= 2)
        self._number("frequency_penalty", "from -2 to 2", lambda x: -2 <= x <= 2)
        self._number("repetition_penalty", "more than 0", lambda x: 0 < x)
        self._integer("seed", -(2**63), 2**63 - 1, optional=True)
        if not isinstance(self.ignore_eos, bool):
            raise _wrong("ignore_eos", "True or False", self.ignore_eos)
        self._integer("min_tokens", 0)
        self._integer("max_tokens", 1, optional=True)
        self._integer("logprobs", 0, optional=True)
        self._integer("prompt_logprobs", 0, optional=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _wrong("min_tokens", f"at most max_tokens ({self.max_tokens})", self.min_tokens)

        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stop, Sequence) or not all(isinstance(s, str) and s for s in stop):
            raise _wrong("stop", "a text that is not empty, or a list of them", self.stop)
        object.__setattr__(self, "stop", tuple(stop))
        ids = self.stop_token_ids or ()
        if not _are_tokens(ids):
            raise _wrong("stop_token_ids", "a list of token ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        allowed = self.allowed_token_ids
        if allowed is not None:
            if not _are_tokens(allowed) or not allowed:
                raise _wrong("allowed_token_ids", "a list of at least one token id", allowed)
            object.__setattr__(self, "allowed_token_ids", tuple(allowed))
        words = self.bad_words or ()
        if (
            isinstance(words, str)
            or not isinstance(words, Sequence)
            or not all(word and (isinstance(word, str) or _are_tokens(word)) for word in words)
        ):
            wanted = "a list of texts or lists of token ids, none empty"
            raise _wrong("bad_words", wanted, self.bad_words)
        words = tuple(word if isinstance(word, str) else tuple(word) for word in words)
        object.__setattr__(self, "bad_words", words)
        processors = self.logits_processors or ()
        if not isinstance(processors, Sequence) or not all(map(callable, processors)):
            raise _wrong("logits_processors", "a list of functions", self.logits_processors)
        object.__setattr__(self, "logits_processors", tuple(processors))
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, Mapping) or not all(
            _is_integer(token) and token >= 0 and _is_number(by) and by <= _LARGEST
            for token, by in bias.items()
        ):
            wanted = "a dictionary from token ids to finite numbers or -inf"
            raise _wrong("logit_bias", wanted, self.logit_bias)
        object.__setattr__(self, "logit_bias", dict(bias))
        structure = self.structured_outputs
        if isinstance(structure, Mapping):
            object.__setattr__(self, "structured_outputs", StructuredOutputsParams(**structure))
        elif not isinstance(structure, StructuredOutputsParams | None):
            wanted = "StructuredOutputsParams, or a dictionary of its parameters"
            raise _wrong("structured_outputs", wanted, structure)

    @property
    def structure(self) -> StructuredOutputsParams | None:
        """``structured_outputs`` as :class:`StructuredOutputsParams`, or None."""
        assert not isinstance(self.structured_outputs, Mapping)
        return self.structured_outputs

    @property
    def greedy(self) -> bool:
        """True if the most likely token is chosen, so that nothing is drawn."""
        return self.temperature == 0

    @property
    def filters(self) -> bool:
        """True if top_k, top_p or min_p excludes tokens."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def penalizes(self) -> bool:
        """True if logits depend on which tokens the prompt or the output has."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return penalties != (0, 0, 1)

    @cached_property  # asked in every step for every row
    def needs_host(self) -> bool:
        """True if the host chooses each token, because it depends on tokens or masks of the host.

        Temperature, filters and the seed are applied on the device. ``min_tokens`` and
        ``prompt_logprobs`` need the host only at first, see :class:`.request.Answer`.
        """
        return bool(
            self.penalizes
            or self.logit_bias
            or self.allowed_token_ids
            or self.bad_words
            or self.logits_processors
            or self.structured_outputs
            or self.logprobs is not None
        )

    def _integer(
        self, name: str, low: int, high: int | None = None, *, optional: bool = False
    ) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not _is_integer(value) or value < low or (high is not None and value > high):
            upper = " or more" if high is None else f" to {high}"
            none = " or None" if optional else ""
            raise _wrong(name, f"an integer, {low}{upper}{none}", value)

    def _number(self, name: str, wanted: str, allowed: Any) -> None:
        value = getattr(self, name)
        if not _is_number(value) or abs(value) > _LARGEST or not allowed(value):
            raise _wrong(name, f"a number, {wanted}", value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_tokens(value: object) -> bool:
    return isinstance(value, Sequence) and all(_is_integer(i) and i >= 0 for i in value)


def _is_number(value: object) -> bool:
    return _is_integer(value) or (isinstance(value, float) and not math.isnan(value))


def _wrong(name: str, wanted: str, got: object) -> ArgumentError:
    return ArgumentError("SamplingParams", name, f"must be {wanted}; got {got!r}")
