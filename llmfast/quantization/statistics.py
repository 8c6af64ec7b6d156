"""Statistics of the inputs of linear layers, gathered while calibration runs."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..model.decoder import hooked, linears


class InputStatistics:
    """The statistics of a linear layer's inputs: sums over the tokens of the calibration.

    ``gram``: float32 ``[k, k]``, the mean of x x^T (half of GPTQ's Hessian). ``magnitude``:
    float32 ``[k]``, the mean of |x|. Both are zero before the first token.
    """

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._gram = torch.zeros(k, k, device=device)
        self._magnitude = torch.zeros(k, device=device)

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        """Add the rows of ``x [..., k]``, of any floating dtype; the sums are float32."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self._gram.addmm_(rows.T, rows)
        self._magnitude += rows.abs().sum(0)
        self.tokens += len(rows)

    @property
    def gram(self) -> torch.Tensor:
        return self._gram / max(self.tokens, 1)

    @property
    def squares(self) -> torch.Tensor:
        """The mean of x**2, float32 ``[k]``: the diagonal of ``gram``."""
        return self._gram.diagonal() / max(self.tokens, 1)

    @property
    def magnitude(self) -> torch.Tensor:
        return self._magnitude / max(self.tokens, 1)


@contextmanager
def gather_statistics(layer: nn.Module) -> Generator[dict[str, InputStatistics]]:
    """Count the inputs of the linear layers of ``layer`` within the context, by name.

    Linear layers that are given one and the same tensor share their statistics.
    """
    statistics: dict[str, InputStatistics] = {}
    leader: dict[str, str] = {}  # the layer that counts for each layer
    inputs: dict[str, torch.Tensor] = {}  # of leaders in this forward; held so that ids stay unique

    def clear(*_: Any) -> None:
        inputs.clear()

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x: torch.Tensor = args[0]
            if name not in leader:
                leader[name] = next((other for other, seen in inputs.items() if seen is x), name)
                if leader[name] == name:
                    statistics[name] = InputStatistics(x.shape[-1], x.device)
                else:
                    statistics[name] = statistics[leader[name]]
            if leader[name] == name:
                inputs[name] = x
                statistics[name].add(x)

        return hook

    handles = [layer.register_forward_hook(clear)]
    handles += [
        part.register_forward_pre_hook(watch(name)) for name, part in linears(layer).items()
    ]
    with hooked(handles):
        yield statistics
