"""Rotary tables, made by the model's own rotary module outside any graph.

Frequencies that depend on the length of a sequence (longrope, dynamic) are chosen once, when the
sequence is admitted, by the length it may reach. Its tables are a range of rows, and its positions
count from the first of them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from ...model.trace import Rotary


class RopeTable:
    """The cos and sin tables of one rotary module, ``[rows, rotary_dim // 2]`` each."""

    def __init__(
        self,
        rotary: Rotary,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Args:
            rotary: the module, and its arguments other than positions.
            max_length: tokens of the longest sequence.
            dtype: the model's; the module rounds its tables to it.
        """
        self._rotary = rotary
        self._like = torch.empty(1, 1, 1, dtype=dtype, device=device)
        parameters = _parameters(rotary)
        kind = str(parameters.get("rope_type", "default"))
        self._by_length = "dynamic" in kind
        # up to this length the frequencies are those of training; None: at any length
        self._original: int | None = None
        if self._by_length or kind == "longrope":
            given = parameters.get("original_max_position_embeddings")
            config: Any = rotary.module.config
            self._original = int(given or config.max_position_embeddings)
        self.resize(max_length)

    def resize(self, max_length: int) -> None:
        """Reallocate the tables for sequences of another length."""
        regions = 1 if self._original is None else 2
        first, _ = self._make(2)  # at position 0 all columns are equal
        shape = (regions * max_length, first.shape[1])
        self._max_length = max_length
        self.cos, self.sin = (
            torch.zeros(shape, dtype=first.dtype, device=first.device) for _ in range(2)
        )
        self._filled: dict[int, int] = {}  # by region: the length its rows were made for

    def admit(self, length: int) -> int:
        """Return the first row of the tables for a sequence that may reach ``length`` tokens.

        Where the frequencies depend on the exact length ("dynamic"), sequences that run at the same
        time must be admitted with the same length: there is one such region.
        """
        if length > self._max_length:
            raise ValueError(f"rope tables: made for {self._max_length} tokens, got {length}")
        if self._original is None:
            self._fill(0, self._max_length)
            return 0
        if length <= self._original:
            self._fill(0, min(self._original, self._max_length))
            return 0
        self._fill(1, length if self._by_length else self._max_length)
        return self._max_length

    def _fill(self, region: int, length: int) -> None:
        if self._filled.get(region) == length:
            return
        start = region * self._max_length
        cos, sin = self._make(length)
        self.cos[start : start + length] = cos
        self.sin[start : start + length] = sin
        self._filled[region] = length

    @torch.no_grad()
    def _make(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tables for ``length`` tokens, made by a copy: some modules keep state."""
        module = copy.deepcopy(self._rotary.module)
        positions = torch.arange(length, device=self._like.device)[None]
        for seen in (positions[:, :1], positions):  # a single token resets the module
            cos, sin = module(self._like, seen, *self._rotary.args, **self._rotary.kwargs)
        half = cos.shape[-1] // 2
        # one column per pair: the module has each twice, in two halves or side by side (Cohere)
        halves = torch.equal(cos[..., :half], cos[..., half:])
        columns = slice(0, half) if halves else slice(0, None, 2)
        return cos[0, :, columns], sin[0, :, columns]


def _parameters(rotary: Rotary) -> dict[str, Any]:
    """Return the module's rotary parameters; a model may have a set for each layer type."""
    parameters: dict[str, Any] = getattr(rotary.module.config, "rope_parameters", None) or {}
    for argument in (*rotary.args, *rotary.kwargs.values()):
        if isinstance(argument, str) and isinstance(parameters.get(argument), dict):
            parameters = parameters[argument]
    return parameters
