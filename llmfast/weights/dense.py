"""Weights of 16 or 32 bits, and the reference for every other weight."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch.nn import functional

from llmfast_kernels import dense_linear, gated_linear
from llmfast_kernels.linear.reference import ACTIVATIONS

from .weight import Weight

_LABELS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """A weight as one tensor ``[n, k]`` in the dtype of the layer's inputs."""

    tensor: torch.Tensor

    @property
    def n(self) -> int:
        return self.tensor.shape[0]

    @property
    def k(self) -> int:
        return self.tensor.shape[1]

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def label(self) -> str:
        dtype = self.tensor.dtype
        return _LABELS.get(dtype, str(dtype).removeprefix("torch."))

    @property
    def form(self) -> Hashable:
        return "dense"

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return dense_linear(x, self.tensor, bias)

    def gated(self, x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
        return gated_linear(x, self.tensor, bias, activation=activation)

    def rows(self, start: int, stop: int) -> DenseWeight:
        return DenseWeight(self.tensor[start:stop])

    def dequantize(self) -> torch.Tensor:
        return self.tensor


@dataclass(frozen=True, eq=False)
class ReferenceWeight:
    """Another weight, multiplied with in plain PyTorch: dequantized in every call."""

    weight: Weight

    @property
    def n(self) -> int:
        return self.weight.n

    @property
    def k(self) -> int:
        return self.weight.k

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    @property
    def label(self) -> str:
        return self.weight.label

    @property
    def form(self) -> Hashable:
        return ("reference", self.weight.form)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return functional.linear(x, self.weight.dequantize(), bias)

    def gated(self, x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
        return ACTIVATIONS[activation](self.linear(x, bias))

    def rows(self, start: int, stop: int) -> ReferenceWeight:
        return ReferenceWeight(self.weight.rows(start, stop))

    def dequantize(self) -> torch.Tensor:
        return self.weight.dequantize()
