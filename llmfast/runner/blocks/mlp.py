"""The gated MLP: the feed-forward part of a transformer's block.

Paper: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch

from ...weights.weight import Linear
from .run import Run


@dataclass(frozen=True)
class GatedMLP:
    """``down(activation(gate(x)) * up(x))``, gate and up merged."""

    gate_up: Linear
    down: Linear
    activation: str  # of the gate, as gated_linear names it

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.gate_up, self.down)

    def map_linears(self, convert: Callable[[Linear], Linear]) -> Self:
        return replace(self, gate_up=convert(self.gate_up), down=convert(self.down))

    def __call__(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        return self.down(self.gate_up.gated(x, self.activation))
