"""A streamer that writes text while ``model.generate`` makes tokens."""

from __future__ import annotations

import time
from typing import Any, TextIO

import torch
from transformers.generation.streamers import BaseStreamer


class TextStream(BaseStreamer):  # type: ignore[misc]  # transformers is not followed
    """A streamer that writes each token's text as soon as it is complete.

    The pieces add up to the decoded answer. A token is decoded with the few tokens before it,
    because a tokenizer joins neighbours (a leading space, the bytes of one character). It is never
    decoded with the whole answer, so the cost of a token does not grow.
    """

    def __init__(self, tokenizer: Any, out: TextIO) -> None:
        self._tokenizer = tokenizer
        self._out = out
        self._ids: list[int] = []  # tokens of the last written piece, then pending tokens
        self._written = 0  # the number of tokens in _ids that are written
        self._seen_prompt = False
        self.count = 0
        self.first_at = self.last_at = 0.0  # time.perf_counter() at the first and last token

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first, per second; None if there was only one."""
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
        # a trailing replacement character may be an incomplete one that the next token completes
        if len(after) > len(before) and not after.endswith("\ufffd"):
            del self._ids[: self._written]
            self._written = len(self._ids)
            self._write(after[len(before) :])  # last: an interrupt before it must not write twice

    def end(self) -> None:
        """Write pending text and a newline."""
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
