"""Weights of four bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmfast_kernels import int4_linear, pack_int4
from llmfast_kernels.quantized_linear.formats import INT4

from .integer import IntegerWeight, scale_bytes


@dataclass(frozen=True, eq=False)
class Int4Weight(IntegerWeight):
    """A weight of four bits, for :func:`llmfast_kernels.int4_linear`."""

    format: ClassVar[str] = "int4"
    description: ClassVar[str] = "four bits"

    @staticmethod
    def pack_codes(codes: torch.Tensor) -> torch.Tensor:
        return pack_int4(codes)

    @classmethod
    def packed_bytes(cls, n: int, k: int, group_size: int | None, symmetric: bool) -> int:
        rows = n * -(-k // 128) * 64  # columns are filled up to 128
        return rows + scale_bytes(n, k, group_size, symmetric)

    @classmethod
    def prefill_note(cls, arch: str) -> str:
        if arch == "sm_90":  # measured on an H100, whose kernel for many tokens all of Hopper runs
            return "not faster than in 16 bits, and up to 1.2 times slower below 1,000"
        return "slower than in 16 bits"

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return int4_linear(**self.arguments(x, bias))

    def gated(self, x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
        return int4_linear(**self.arguments(x, bias), activation=activation)

    def dequantize(self) -> torch.Tensor:
        """Return the weight ``[n, k]``, computed in float32 and rounded to ``dtype``."""
        exact = torch.promote_types(self.dtype, torch.float32)
        stored = (self.codes, self.scales, self.zeros)
        return self.unpermuted(
            INT4.dequantize(*stored, self.k, self.group_size, exact, self.minima)
        )
