"""Four-bit weights as the kernels read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from llmfast_kernels import int4_linear, pack_int4

from .weights import QuantizedWeight


@dataclass(frozen=True)
class PackedInt4:
    """The weight ``[n, k]`` of a linear layer for :func:`llmfast_kernels.int4_linear`.

    Args:
        packed: int32, the codes as :func:`llmfast_kernels.pack_int4` lays them.
        scales: ``[n, groups]``, in the dtype of the layer's inputs.
        zeros: uint8 ``[n, groups]``, or None.
        minima: ``[n, groups]``, in the scales' dtype, or None.
        permutation: int64 ``[k]``: column j of the codes is for input ``permutation[j]``, so that
            groups are neighbours; None: they were (no act-order).
        group_size: 32, 64, 128, or k.
        k: inputs.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    minima: torch.Tensor | None
    permutation: torch.Tensor | None
    group_size: int
    k: int

    @classmethod
    def from_quantized(cls, w: QuantizedWeight, dtype: torch.dtype) -> PackedInt4:
        """Pack ``w`` on its device, with scales and minima rounded to ``dtype``.

        Raises:
            ValueError: codes of 8 bits, or scales that ``dtype`` cannot hold.
        """
        if w.bits != 4:
            raise ValueError(f"PackedInt4: codes must have 4 bits; got {w.bits}")
        codes, permutation = w.codes, None
        if w.g_idx is not None:
            permutation = w.g_idx.long().argsort(stable=True)
            codes = codes[:, permutation]
        scales = w.scales.to(dtype).contiguous()
        minima = None if w.minima is None else w.minima.to(dtype).contiguous()
        for name, tensor in (("scales", scales), ("minima", minima)):
            if tensor is not None and not bool(tensor.isfinite().all()):
                raise ValueError(f"PackedInt4: {name} are too large for {dtype}")
        zeros = None if w.zeros is None else w.zeros.contiguous()
        k = w.shape[1]
        return cls(pack_int4(codes), scales, zeros, minima, permutation, w.group_size, k)

    @property
    def n(self) -> int:
        """Outputs."""
        return len(self.packed)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.packed, self.scales, self.zeros, self.minima, self.permutation)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def linear(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        operation: Callable[..., torch.Tensor] = int4_linear,
    ) -> torch.Tensor:
        """``x @ weight.T + bias`` for ``x [..., k]`` in the scales' dtype; ``[..., n]``."""
        if self.permutation is not None:
            x = x[..., self.permutation]
        return operation(
            x,
            self.packed,
            self.scales,
            self.zeros,
            bias,
            group_size=self.group_size,
            minima=self.minima,
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
