"""Structured outputs: xgrammar masks the tokens that do not fit a grammar.

Paper: Dong et al., XGrammar, arXiv:2411.15100.
"""

from __future__ import annotations

import importlib.util
import json
import re
from threading import Lock
from typing import Any

import torch

from ..errors import UserError
from .sampling_params import StructuredOutputsParams

MAX_WHITESPACE = 20  # characters in one place of JSON: small models may write nothing else
CACHE_BYTES = 2**28  # of compiled grammars


def require_xgrammar() -> None:
    """Raise UserError if xgrammar is not installed."""
    if importlib.util.find_spec("xgrammar") is None:
        raise UserError(
            "structured_outputs wants the package xgrammar: pip install 'llmfast[structured]'"
        )


class Matcher:
    """The position of one answer in its grammar."""

    def __init__(self, compiled: Any, special: torch.Tensor) -> None:
        """
        Args:
            compiled: an ``xgrammar.CompiledGrammar``.
            special: bool ``[vocabulary]``, True for tokens that are no text.
        """
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._special = special

    def accept(self, token: int) -> bool:
        """Advance by a token. Return False if it does not fit."""
        return bool(self._matcher.accept_token(token))

    @property
    def terminated(self) -> bool:
        """True if the answer is complete and an end token was accepted."""
        return bool(self._matcher.is_terminated())

    def masked_tokens(self) -> torch.Tensor:
        """Return which tokens may not follow: bool ``[vocabulary]``, on the CPU."""
        count = len(self._special)
        words = torch.zeros(1, -(-count // 32), dtype=torch.int32)
        self._matcher.fill_next_token_bitmask(words)
        bits = words[0, :, None] >> torch.arange(32, dtype=torch.int32)
        return (bits & 1 == 0).flatten()[:count] | self._special


class Grammars:
    """Compiles grammars for one tokenizer, each once. Several threads may use it."""

    def __init__(self, tokenizer: Any, end_tokens: set[int], vocabulary: int) -> None:
        """
        Args:
            tokenizer: a transformers tokenizer, or None.
            end_tokens: tokens that end an answer.
            vocabulary: number of tokens that the model has logits for.
        """
        self._tokenizer = tokenizer
        self._ends = sorted(token for token in end_tokens if token < vocabulary)
        self._vocabulary = vocabulary
        self._compiler: Any = None  # made on first use: it reads the whole vocabulary
        self._making = Lock()
        self._special = torch.zeros(vocabulary, dtype=torch.bool)

    def matcher(self, wanted: StructuredOutputsParams) -> Matcher:
        """Return a matcher for a new answer.

        Raises:
            UserError: the grammar does not compile, or there is no tokenizer or no end token.
        """
        if self._tokenizer is None:
            raise UserError("structured_outputs wants a tokenizer")
        if not self._ends:
            raise UserError("structured_outputs wants a model with an end token")
        try:
            with self._making:
                if self._compiler is None:
                    self._compiler = self._make_compiler()
            return Matcher(self._compile(wanted), self._special)
        except Exception as error:  # xgrammar raises exceptions of many kinds
            raise UserError(f"structured_outputs does not compile: {_reason(error)}") from None

    @property
    def compiled_bytes(self) -> int:
        """Bytes of the compiled grammars that are kept."""
        return 0 if self._compiler is None else int(self._compiler.get_cache_size_bytes())

    def _make_compiler(self) -> Any:
        import xgrammar

        for token, added in self._tokenizer.added_tokens_decoder.items():
            if added.special and token < self._vocabulary and token not in self._ends:
                self._special[token] = True
        info = xgrammar.TokenizerInfo.from_huggingface(
            self._tokenizer, vocab_size=self._vocabulary, stop_token_ids=self._ends
        )
        return xgrammar.GrammarCompiler(info, cache_limit_bytes=CACHE_BYTES)

    def _compile(self, wanted: StructuredOutputsParams) -> Any:
        if wanted.regex is not None:
            return self._compiler.compile_regex(wanted.regex)
        if wanted.grammar is not None:
            return self._compiler.compile_grammar(wanted.grammar)
        if wanted.choice is not None:
            texts = (json.dumps(text, ensure_ascii=False) for text in wanted.choice)
            return self._compiler.compile_grammar(f"root ::= {' | '.join(texts)}")
        schema = wanted.json if wanted.json is not None else '{"type": "object"}'
        return self._compiler.compile_json_schema(
            schema,
            any_whitespace=not wanted.disable_any_whitespace,
            max_whitespace_cnt=None if wanted.disable_any_whitespace else MAX_WHITESPACE,
        )


def _reason(error: Exception) -> str:
    """Return the first line, without the time and the C++ line that precede it."""
    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", first)
