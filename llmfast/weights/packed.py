"""Quantized weights as the kernels read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llmfast_kernels import int4_linear, int8_linear, pack_int4, pack_int8
from llmfast_kernels.linear.int4_layout import dequantize_int4
from llmfast_kernels.linear.reference import dequantize_int8

from .quantized import QuantizedWeight

# by the bits of codes, what multiplies with them
OPERATIONS: Mapping[int, Callable[..., torch.Tensor]] = {4: int4_linear, 8: int8_linear}


@dataclass(frozen=True)
class PackedWeight:
    """The weight ``[n, k]`` of a linear layer for :func:`llmfast_kernels.int4_linear` or
    :func:`llmfast_kernels.int8_linear`.

    Args:
        bits: 4 or 8.
        codes: as :func:`llmfast_kernels.pack_int4` or :func:`llmfast_kernels.pack_int8` lays
            them.
        scales: ``[n, groups]``, in ``dtype`` or float16.
        zeros: uint8 ``[n, groups]``, or None.
        minima: ``[n, groups]``, in the scales' dtype, or None.
        permutation: int64 ``[k]``: column j of the codes is for input ``permutation[j]``, so that
            groups are neighbours; None: they were (no act-order).
        group_size: 32, 64, 128, or k.
        k: inputs.
        dtype: of the layer's inputs and outputs.
    """

    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    minima: torch.Tensor | None
    permutation: torch.Tensor | None
    group_size: int
    k: int
    dtype: torch.dtype

    @classmethod
    def from_quantized(cls, w: QuantizedWeight, dtype: torch.dtype) -> PackedWeight:
        """Pack ``w`` on its device, for inputs of ``dtype``.

        Scales and minima in float16, as checkpoints have them, stay so where ``dtype`` has fewer
        digits; others are rounded to ``dtype``.

        Raises:
            ValueError: scales that ``dtype`` cannot hold.
        """
        codes, permutation = w.codes, None
        if w.g_idx is not None:
            permutation = w.g_idx.long().argsort(stable=True)
            codes = codes[:, permutation]
        codes = pack_int4(codes) if w.bits == 4 else pack_int8(codes)
        own = dtype
        if dtype == torch.bfloat16 and w.scales.dtype == torch.float16:
            own = torch.float16
        scales = w.scales.to(own).contiguous()
        minima = None if w.minima is None else w.minima.to(own).contiguous()
        for name, tensor in (("scales", scales), ("minima", minima)):
            if tensor is not None and not bool(tensor.isfinite().all()):
                raise ValueError(f"PackedWeight: {name} are too large for {own}")
        zeros = None if w.zeros is None else w.zeros.contiguous()
        return cls(
            w.bits, codes, scales, zeros, minima, permutation, w.group_size, w.shape[1], dtype
        )

    @property
    def n(self) -> int:
        """Outputs."""
        return len(self.codes)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.codes, self.scales, self.zeros, self.minima, self.permutation)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def rows(self, start: int, stop: int) -> PackedWeight:
        """The outputs from ``start`` to ``stop``: a view, which takes no memory."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        minima = None if self.minima is None else self.minima[start:stop]
        return replace(
            self,
            codes=self.codes[start:stop],
            scales=self.scales[start:stop],
            zeros=zeros,
            minima=minima,
        )

    def dequantize(self) -> torch.Tensor:
        """The weight ``[n, k]``, computed in float32 and rounded to ``dtype``."""
        exact = torch.promote_types(self.dtype, torch.float32)
        dequantize = dequantize_int4 if self.bits == 4 else dequantize_int8
        given = (self.codes, self.scales, self.zeros)
        w = dequantize(*given, self.k, self.group_size, exact, self.minima)
        if self.permutation is not None:
            w = w[:, self.permutation.argsort()]
        return w.to(self.dtype)

    def linear(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        operations: Mapping[int, Callable[..., torch.Tensor]] = OPERATIONS,
        **more: Any,
    ) -> torch.Tensor:
        """``x @ weight.T + bias`` for ``x [..., k]`` in ``dtype``; ``[..., n]``.

        ``operations``: by the bits of codes; ``more``: their other arguments.
        """
        if self.permutation is not None:
            x = x[..., self.permutation]
        return operations[self.bits](
            x,
            self.codes,
            self.scales,
            self.zeros,
            bias,
            group_size=self.group_size,
            minima=self.minima,
            **more,
        )


def side_by_side(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Layers with one input as one layer: the outputs of the first, then those of the next.

    Symmetric weights get zero points where others have them.

    Raises:
        ValueError: other inputs, bits, groups or act-order, or minima in some only.
    """
    first = weights[0]
    for w in weights[1:]:
        same_order = (w.g_idx is None) == (first.g_idx is None) and (
            w.g_idx is None or first.g_idx is None or torch.equal(w.g_idx, first.g_idx)
        )
        if (
            (w.shape[1], w.bits, w.group_size) != (first.shape[1], first.bits, first.group_size)
            or (w.minima is None) != (first.minima is None)
            or w.scales.dtype != first.scales.dtype
            or not same_order
        ):
            raise ValueError("layers with one input have weights of different forms")
    if len(weights) == 1:
        return first
    zeros = None
    if any(w.zeros is not None for w in weights):
        zeros = torch.cat([w.zero_points() for w in weights])
    return replace(
        first,
        codes=torch.cat([w.codes for w in weights]),
        scales=torch.cat([w.scales for w in weights]),
        zeros=zeros,
        minima=_cat([w.minima for w in weights if w.minima is not None]),
    )


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return torch.cat(list(tensors)) if tensors else None
