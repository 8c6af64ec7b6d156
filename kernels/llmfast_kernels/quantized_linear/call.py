"""One call of a quantized linear layer: its tensors and sizes, as every main loop takes them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..common.launch import aligned
from .formats import Format
from .launch import Problem


class Call(NamedTuple):
    """Checked arguments; ``y`` is written."""

    x: torch.Tensor
    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    minima: torch.Tensor | None
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    fmt: Format
    tokens: int
    n: int  # rows of the weight
    k: int
    groups: int  # of a row
    group: int  # columns that share a scale; 0: all
    activation: str | None

    @property
    def problem(self) -> Problem:
        """The call as far as the choice of its launch depends on it."""
        x, scales, minima, residual = self.x, self.scales, self.minima, self.residual
        return Problem(
            bits=self.fmt.bits,
            n=self.n,
            k=self.k,
            tokens=self.tokens,
            group=self.group,
            minima=minima is not None,
            same_dtype=scales.dtype == x.dtype and (minima is None or minima.dtype == x.dtype),
            gated=self.activation is not None,
            pairs=x.data_ptr() % 4 == 0,
            tma_loads=self.k % 8 == 0 and aligned(x, self.packed),
            tma_stores=self.n % 16 == 0 and aligned(residual),
        )

    def output(self) -> torch.Tensor:
        """Allocate the outputs."""
        width = self.n if self.activation is None else self.n // 2
        return torch.empty((*self.x.shape[:-1], width), dtype=self.x.dtype, device=self.x.device)
