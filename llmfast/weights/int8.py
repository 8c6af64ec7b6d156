"""Weights of eight bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmfast_kernels import gelu_mul, gelu_tanh_mul, int8_linear, pack_int8, silu_mul
from llmfast_kernels.quantized_linear.formats import INT8

from .integer import IntegerWeight, scale_bytes

_GATED = {"silu": silu_mul, "gelu_tanh": gelu_tanh_mul, "gelu": gelu_mul}


@dataclass(frozen=True, eq=False)
class Int8Weight(IntegerWeight):
    """A weight of eight bits, for :func:`llmfast_kernels.int8_linear`."""

    format: ClassVar[str] = "int8"
    description: ClassVar[str] = "eight bits"

    @staticmethod
    def pack_codes(codes: torch.Tensor) -> torch.Tensor:
        return pack_int8(codes)

    @classmethod
    def packed_bytes(cls, n: int, k: int, group_size: int | None, symmetric: bool) -> int:
        rows = n * -(-k // 16) * 16  # columns are filled up to 16
        return rows + scale_bytes(n, k, group_size, symmetric)

    @classmethod
    def prefill_note(cls, arch: str) -> str:
        return "slower than in 16 bits"

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return int8_linear(**self.arguments(x, bias))

    def gated(self, x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
        return _GATED[activation](self.linear(x, bias))  # two launches: the kernel has no epilogue

    def dequantize(self) -> torch.Tensor:
        """Return the weight ``[n, k]``, computed in float32 and rounded to ``dtype``."""
        exact = torch.promote_types(self.dtype, torch.float32)
        stored = (self.codes, self.scales, self.zeros)
        return self.unpermuted(
            INT8.dequantize(*stored, self.k, self.group_size, exact, self.minima)
        )
