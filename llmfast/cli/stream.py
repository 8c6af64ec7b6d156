"""Token ids to text, piece by piece, as ``model.generate`` makes them."""

from __future__ import annotations

import time
from typing import Any, TextIO

import torch
from transformers.generation.streamers import BaseStreamer


class TextStream(BaseStreamer):  # type: ignore[misc]  # transformers is not followed
    """Writes each token's text as soon as it is whole; the pieces add up to the decoded answer.

    A token is decoded with the few before it, never with the whole answer, so that its cost
    does not grow: a tokenizer joins neighbours (a leading space, the bytes of one character).
    """

    def __init__(self, tokenizer: Any, out: TextIO) -> None:
        self._tokenizer = tokenizer
        self._out = out
        self._ids: list[int] = []  # the last written piece's tokens, then those not yet written
        self._written = 0  # how many of _ids are written
        self._seen_prompt = False
        self.count = 0
        self.first_at = self.last_at = 0.0  # time.perf_counter() at the first and last token

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first over their time; None if there was but one."""
        span = self.last_at - self.first_at
        return (self.count - 1) / span if self.count > 1 and span > 0 else None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then each new token."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        self.last_at = time.perf_counter()
        if self.count == 0:
            self.first_at = self.last_at
        ids = value.reshape(-1).tolist()
        self.count += len(ids)
        self._ids += ids
        before, after = self._decode(self._ids[: self._written]), self._decode(self._ids)
        # a trailing replacement character may be the first bytes of one that the next completes
        if len(after) > len(before) and not after.endswith("\ufffd"):
            del self._ids[: self._written]
            self._written = len(self._ids)
            self._write(after[len(before) :])  # last: an interrupt must not have it written twice

    def end(self) -> None:
        """Write what was held back, and a newline."""
        before, after = self._decode(self._ids[: self._written]), self._decode(self._ids)
        self._ids, self._written = [], 0
        self._write(after[len(before) :] + "\n")

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
