"""Incremental detokenization without half characters, and the search for stop texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers.decoders import ByteLevel

UNFINISHED = "\ufffd"  # a tokenizer returns this for bytes that are not a character yet


class Decoder:
    """Turns tokens into text with a tokenizer, and keeps the texts of single tokens."""

    def __init__(self, tokenizer: Any) -> None:
        """
        Args:
            tokenizer: a transformers tokenizer; None: the decoder must not be called.
        """
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._joins = tokenizer is not None and _joins(tokenizer)

    def __call__(self, tokens: list[int]) -> str:
        return self._text(tokens[0]) if len(tokens) == 1 else _decode(self._tokenizer, tokens)

    def detokenizer(self) -> Detokenizer:
        """Return a new detokenizer, without text."""
        return Detokenizer(self, self._whole if self._joins else None)

    def _text(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = _decode(self._tokenizer, [token])
        return text

    def _whole(self, token: int) -> str | None:
        text = self._text(token)
        return None if UNFINISHED in text else text


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    text: str = tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def _joins(tokenizer: Any) -> bool:
    """Return whether text is the bytes of each token joined, checked on a sample of tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(getattr(backend, "decoder", None), ByteLevel):
        return False
    size = len(tokenizer)
    texts = {token: _decode(tokenizer, [token]) for token in range(0, size, size // 64 + 1)}
    whole = [token for token, text in texts.items() if UNFINISHED not in text]
    return _decode(tokenizer, whole) == "".join(texts[token] for token in whole)


class Detokenizer:
    """Turns tokens into text one by one.

    A token's text may depend on the token before (a space that only a first word lacks). So a few
    tokens before are decoded with it, and their text is removed again. Bytes that are not a whole
    character yet are held back.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        whole: Callable[[int], str | None] | None = None,
    ) -> None:
        """
        Args:
            decode: returns the text of some tokens.
            whole: returns the text of a token, or None if it has half characters. Give it only if
                joined texts of tokens are the text of the sequence.
        """
        self.text = ""
        self._decode = decode
        self._whole = whole
        self._before: list[int] = []
        self._fresh: list[int] = []
        self._taken = 0  # characters of the fresh tokens that are in the text

    def push(self, token: int) -> None:
        """Append a token, and to the text what is certain of it."""
        if self._whole is not None and not self._fresh:
            own = self._whole(token)
            if own is not None:
                self.text += own
                return
        self._fresh.append(token)
        whole = self._fresh_text()
        stable = whole.rstrip(UNFINISHED)
        self.text += stable[self._taken :]
        self._taken = max(self._taken, len(stable))
        if whole and stable == whole:
            self._before, self._fresh, self._taken = self._fresh, [], 0

    def finish(self) -> None:
        """Append the text that was held back: no token follows."""
        if self._fresh:
            self.text += self._fresh_text()[self._taken :]
            self._fresh = []

    def _fresh_text(self) -> str:
        return self._decode(self._before + self._fresh)[len(self._decode(self._before)) :]


def find_stop(text: str, start: int, stops: Sequence[str]) -> tuple[int, str] | None:
    """Return where the first stop text begins that ends after ``start``, and the stop text."""
    found = [
        (at, stop) for stop in stops if (at := text.find(stop, max(0, start - len(stop) + 1))) >= 0
    ]
    return min(found) if found else None


def held_back(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of ``text`` may begin a stop text."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )
