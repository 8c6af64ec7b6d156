"""Linear layers with one input, multiplied as one: their weights side by side in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .blocks import Linear


class MergedLinears:
    """One tensor that holds the weights of several layers; the layers keep views of it.

    So merging takes no memory and the layers work as before. What moves their data elsewhere
    (``.to()``, a deepcopy of the model) leaves this one stale; :class:`.generate.Takeover` looks
    out for that.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        """
        Raises:
            ValueError: some of the layers have a bias and some have none.
        """
        biases = [layer.bias for layer in layers]
        if any(b is None for b in biases) and any(b is not None for b in biases):
            raise ValueError("some of the layers to be merged have a bias and some have none")
        self._layers = list(layers)
        self._parameters: list[tuple[torch.Tensor, torch.Tensor]] = []
        weight = self._merge([layer.weight for layer in layers])
        bias = None if biases[0] is None else self._merge(biases)
        self.linear = Linear(weight, bias)

    def _merge(self, parameters: Sequence[Any]) -> torch.Tensor:
        first: torch.Tensor = parameters[0].data
        merged = torch.cat([p.data for p in parameters]) if len(parameters) > 1 else first
        start = 0
        for parameter in parameters:
            view = merged[start : start + len(parameter)]
            parameter.data = view
            self._parameters.append((parameter, view))
            start += len(parameter)
        return merged

    def restore(self) -> None:
        """Give each layer a tensor of its own again, with the values that it has now."""
        if len(self._layers) == 1:
            return
        for parameter, view in self._parameters:
            if parameter.data_ptr() == view.data_ptr():
                parameter.data = view.clone()
