"""Text of a growing list of tokens: no half characters, and where a stop text begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what a tokenizer gives for bytes that are no character yet


class Detokenizer:
    """Turns tokens into text one by one.

    A token's text may depend on the one before (a space that only a first word lacks), so a few
    tokens before are decoded with it and their text is taken off again. Bytes that are no whole
    character yet are held back.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.text = ""
        self._decode = decode
        self._before: list[int] = []
        self._fresh: list[int] = []
        self._taken = 0  # characters of the fresh tokens that are in the text

    def push(self, token: int) -> None:
        self._fresh.append(token)
        whole = self._fresh_text()
        stable = whole.rstrip(UNFINISHED)
        self.text += stable[self._taken :]
        self._taken = max(self._taken, len(stable))
        if whole and stable == whole:
            self._before, self._fresh, self._taken = self._fresh, [], 0

    def finish(self) -> None:
        """Nothing follows: what was held back is text now."""
        if self._fresh:
            self.text += self._fresh_text()[self._taken :]
            self._fresh = []

    def _fresh_text(self) -> str:
        return self._decode(self._before + self._fresh)[len(self._decode(self._before)) :]


def find_stop(text: str, start: int, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the first stop text begins that ends behind ``start``, and which it is."""
    found = [
        (at, stop) for stop in stops if (at := text.find(stop, max(0, start - len(stop) + 1))) >= 0
    ]
    return min(found) if found else None


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of ``text`` may be the beginning of a stop text."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )
