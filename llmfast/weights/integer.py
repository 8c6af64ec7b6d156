"""Packed weights of integer codes: what four and eight bits share."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from .quantized import QuantizedWeight


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """The weight ``[n, k]`` of a linear layer in integer codes, as a kernel reads them.

    Args:
        codes: ``[n, ...]``, as the format's kernel reads them.
        scales: ``[n, groups]``, in ``dtype`` or float16.
        zeros: uint8 ``[n, groups]``, or None.
        minima: ``[n, groups]``, in the scales' dtype, or None.
        permutation: int64 ``[k]``: column j of the codes belongs to input ``permutation[j]``, so
            that the inputs of a group are neighbours. None: they were neighbours (no act-order).
        group_size: 32, 64, 128, or k.
        k: inputs.
        dtype: of the layer's inputs and outputs.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    minima: torch.Tensor | None
    permutation: torch.Tensor | None
    group_size: int
    k: int
    dtype: torch.dtype

    format: ClassVar[str]
    description: ClassVar[str]

    @staticmethod
    def pack_codes(codes: torch.Tensor) -> torch.Tensor:
        """Pack uint8 codes ``[n, k]`` for the kernel."""
        raise NotImplementedError

    @classmethod
    def pack(cls, stored: QuantizedWeight, dtype: torch.dtype) -> Self:
        """Pack ``stored`` on its device, for inputs of ``dtype``.

        Scales and minima in float16, the dtype of most checkpoints, stay in it where ``dtype`` is
        bfloat16, which has fewer digits; others are rounded to ``dtype``.

        Raises:
            ValueError: scales that ``dtype`` cannot hold, or float32 inputs on a GPU.
        """
        if stored.codes.is_cuda and dtype == torch.float32:
            raise ValueError(f"{cls.__name__}: the kernel wants 16-bit inputs; got {dtype}")
        codes, permutation = stored.codes, None
        if stored.g_idx is not None:
            permutation = stored.g_idx.long().argsort(stable=True)
            codes = codes[:, permutation]
        scale_dtype = dtype
        if dtype == torch.bfloat16 and stored.scales.dtype == torch.float16:
            scale_dtype = torch.float16
        scales = stored.scales.to(scale_dtype).contiguous()
        minima = None if stored.minima is None else stored.minima.to(scale_dtype).contiguous()
        for name, tensor in (("scales", scales), ("minima", minima)):
            if tensor is not None and not bool(tensor.isfinite().all()):
                raise ValueError(f"{cls.__name__}: {name} are too large for {scale_dtype}")
        return cls(
            codes=cls.pack_codes(codes),
            scales=scales,
            zeros=None if stored.zeros is None else stored.zeros.contiguous(),
            minima=minima,
            permutation=permutation,
            group_size=stored.group_size,
            k=stored.shape[1],
            dtype=dtype,
        )

    @property
    def n(self) -> int:
        return len(self.codes)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        tensors = (self.codes, self.scales, self.zeros, self.minima, self.permutation)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def label(self) -> str:
        groups = self.scales.shape[1]
        return f"{self.format}-{'channel' if groups == 1 else f'g{self.group_size}'}"

    @property
    def form(self) -> Hashable:
        optional = (self.zeros, self.minima, self.permutation)
        return (self.format, self.group_size, *(tensor is None for tensor in optional))

    def rows(self, start: int, stop: int) -> Self:
        return replace(
            self,
            codes=self.codes[start:stop],
            scales=self.scales[start:stop],
            zeros=None if self.zeros is None else self.zeros[start:stop],
            minima=None if self.minima is None else self.minima[start:stop],
        )

    def arguments(self, x: torch.Tensor, bias: torch.Tensor | None) -> dict[str, Any]:
        """Return the arguments of the kernel's operation, by name."""
        return {
            "x": x if self.permutation is None else x[..., self.permutation],
            "packed": self.codes,
            "scales": self.scales,
            "zeros": self.zeros,
            "bias": bias,
            "group_size": self.group_size,
            "minima": self.minima,
        }

    def unpermuted(self, weight: torch.Tensor) -> torch.Tensor:
        """Return ``weight [n, k]`` with its columns in the order of the inputs, in ``dtype``."""
        if self.permutation is not None:
            weight = weight[:, self.permutation.argsort()]
        return weight.to(self.dtype)


def scale_bytes(n: int, k: int, group_size: int | None, symmetric: bool) -> int:
    """Return the bytes of 16-bit scales and 8-bit zero points."""
    return n * -(-k // (group_size or k)) * (2 if symmetric else 3)
