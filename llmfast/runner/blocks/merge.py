"""Linear layers with the same input, merged into one layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...weights.dense import DenseWeight
from ...weights.parameters import MergedParameters
from ...weights.weight import Linear


class MergedLinears:
    """Several linear layers as one, whose weights and biases become views of merged tensors.

    Operations that move the layers' data (``.to()``, a deepcopy of the model) leave this object
    stale; the override of ``generate`` checks for that.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        """Merge ``layers``.

        Raises:
            ValueError: some of the layers have a bias and some have none.
        """
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if len(biases) not in (0, len(layers)):
            raise ValueError("some of the layers to be merged have a bias and some have none")
        self._merged = [MergedParameters([layer.weight for layer in layers])]
        if biases:
            self._merged.append(MergedParameters(biases))
        weight, *bias = (merged.tensor for merged in self._merged)
        self.linear = Linear(DenseWeight(weight), bias[0] if bias else None)

    def restore(self) -> None:
        """Restore each layer's own tensors, with their present values."""
        for merged in self._merged:
            merged.restore()
