"""The neutral form of quantized weights: integer codes, scales, zero points or minima."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class QuantizedWeight:
    """The weight ``[n, k]`` of a linear layer (n outputs, k inputs) in unsigned codes.

        w[i, j] = scales[i, g] * (codes[i, j] - zeros[i, g])       symmetric, or zero points
        w[i, j] = scales[i, g] * codes[i, j] + minima[i, g]        float minima

    Input j is in group g: ``g_idx[j]`` if there is a ``g_idx``, else ``j // group_size``. A weight
    is symmetric if ``zeros`` and ``minima`` are None; its zero point is ``2 ** (bits - 1)``.

    Args:
        codes: uint8 ``[n, k]``, each less than ``2 ** bits``.
        bits: 4 or 8.
        group_size: inputs that share a scale: 32, 64, 128, or k (one scale for each output).
        scales: float16, bfloat16 or float32 ``[n, k / group_size]``, finite; may be negative.
        zeros: uint8 ``[n, k / group_size]``, each less than ``2 ** bits``; or None.
        minima: of the scales' shape and dtype, finite; or None. Not together with zeros.
        g_idx: int32 ``[k]``, the group of each input, with group_size inputs in every group; None:
            groups are neighbours. GPTQ's act-order makes it.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: bits, group size, a shape, a value or a device that breaks the contract.
    """

    codes: torch.Tensor
    bits: int
    group_size: int
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    minima: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, k)``: outputs and inputs of the layer."""
        n, k = self.codes.shape
        return n, k

    @property
    def groups(self) -> int:
        """The number of groups of an output."""
        return self.scales.shape[1]

    @property
    def symmetric(self) -> bool:
        return self.zeros is None and self.minima is None

    @property
    def format(self) -> str:
        """The key of the packed form in :data:`.registry.FORMATS`."""
        return f"int{self.bits}"

    @property
    def label(self) -> str:
        """The form as results name it: ``int4-g32``, ``int8-channel``."""
        return f"{self.format}-{'channel' if self.groups == 1 else f'g{self.group_size}'}"

    def zero_points(self) -> torch.Tensor:
        """Return ``zeros``, or the middle of the codes if there are none: uint8 ``[n, groups]``."""
        if self.zeros is not None:
            return self.zeros
        return torch.full_like(self.scales, 2 ** (self.bits - 1), dtype=torch.uint8)

    def group_of_input(self) -> torch.Tensor:
        """Return the group of each input, int64 ``[k]``, on the codes' device."""
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(self.shape[1], device=self.codes.device) // self.group_size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight ``[n, k]``, computed in float32 (float64 for float64), rounded once.

        Raises:
            TypeError: dtype is not a floating type.
        """
        if not dtype.is_floating_point:
            raise TypeError(f"dequantize: dtype must be a floating type; got {dtype}")
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        group = self.group_of_input()
        w = self.codes.to(compute)
        scales = self.scales.to(compute)[:, group]
        if self.minima is not None:
            return w.mul_(scales).add_(self.minima.to(compute)[:, group]).to(dtype)
        if self.zeros is not None:
            w -= self.zeros.to(compute)[:, group]
        else:
            w -= 2 ** (self.bits - 1)
        return w.mul_(scales).to(dtype)

    def rows(self, index: torch.Tensor) -> QuantizedWeight:
        """Return the outputs ``index`` (int64), in that order, as a weight of its own."""

        def pick(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[index]

        return QuantizedWeight(
            codes=self.codes[index],
            bits=self.bits,
            group_size=self.group_size,
            scales=self.scales[index],
            zeros=pick(self.zeros),
            minima=pick(self.minima),
            g_idx=None if self.g_idx is None else self.g_idx.clone(),
        )

    def concatenate(self, others: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Return one weight with the outputs of this one, then those of ``others``.

        Symmetric weights get zero points where others have them.

        Raises:
            ValueError: other inputs, bits, groups or act-order, or minima in some only.
        """
        for other in others:
            if not self._is_like(other):
                raise ValueError("layers with one input have weights of different forms")
        if not others:
            return self
        weights = [self, *others]
        zeros = None
        if any(w.zeros is not None for w in weights):
            zeros = torch.cat([w.zero_points() for w in weights])
        minima = [w.minima for w in weights if w.minima is not None]
        return replace(
            self,
            codes=torch.cat([w.codes for w in weights]),
            scales=torch.cat([w.scales for w in weights]),
            zeros=zeros,
            minima=torch.cat(minima) if minima else None,
        )

    def _is_like(self, other: QuantizedWeight) -> bool:
        if not isinstance(other, QuantizedWeight):
            return False
        same_order = (self.g_idx is None) == (other.g_idx is None) and (
            self.g_idx is None or other.g_idx is None or torch.equal(self.g_idx, other.g_idx)
        )
        return (
            (self.shape[1], self.bits, self.group_size)
            == (other.shape[1], other.bits, other.group_size)
            and (self.minima is None) == (other.minima is None)
            and self.scales.dtype == other.scales.dtype
            and same_order
        )

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Return the same weight on ``device``."""

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return QuantizedWeight(
            codes=self.codes.to(device),
            bits=self.bits,
            group_size=self.group_size,
            scales=self.scales.to(device),
            zeros=move(self.zeros),
            minima=move(self.minima),
            g_idx=move(self.g_idx),
        )


@dataclass(frozen=True)
class Quantized:
    """The quantized weights of a model, and new values of other parameters.

    Args:
        weights: quantized weights by the names of their linear layers.
        folded: new values of other parameters, by name: norms and biases that AWQ has scaled.
        fallbacks: linear layers for which the method could not do all of its work, each with the
            reason.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    folded: dict[str, torch.Tensor] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)

    def add(self, prefix: str, layer: Quantized) -> None:
        """Add the result of the decoder layer ``prefix``; its names are relative to that layer."""
        self.weights.update({f"{prefix}.{name}": w for name, w in layer.weights.items()})
        self.folded.update({f"{prefix}.{name}": value for name, value in layer.folded.items()})
        self.fallbacks.update({f"{prefix}.{name}": why for name, why in layer.fallbacks.items()})


def check_bits(what: str, bits: int) -> None:
    """Raise ValueError unless codes may have ``bits`` bits."""
    if bits not in BITS:
        raise ValueError(f"{what}: bits must be 4 or 8; got {bits}")


def check_group_size(what: str, group_size: int, k: int) -> None:
    """Raise ValueError unless groups of ``group_size`` divide ``k`` inputs."""
    if group_size not in GROUP_SIZES and group_size != k:
        raise ValueError(
            f"{what}: group_size must be 32, 64, 128 or all {k} inputs; got {group_size}"
        )
    if k % group_size:
        raise ValueError(f"{what}: group_size {group_size} does not divide the {k} inputs")


def _check(w: QuantizedWeight) -> None:
    what = "QuantizedWeight"
    check_bits(what, w.bits)
    if w.scales is None:
        raise ValueError(f"{what}: scales are missing")
    if w.codes.dtype != torch.uint8:
        raise TypeError(f"{what}: codes must be uint8; got {w.codes.dtype}")
    if w.codes.ndim != 2 or 0 in w.codes.shape:
        raise ValueError(
            f"{what}: codes must be a matrix [n, k] that is not empty; got {_size(w.codes)}"
        )
    n, k = w.codes.shape
    check_group_size(what, w.group_size, k)
    if w.scales.dtype not in FLOATS:
        raise TypeError(
            f"{what}: scales must be float16, bfloat16 or float32; got {w.scales.dtype}"
        )
    if w.zeros is not None and w.minima is not None:
        raise ValueError(f"{what}: zeros and minima exclude each other; got both")
    if w.zeros is not None and w.zeros.dtype != torch.uint8:
        raise TypeError(f"{what}: zeros must be uint8; got {w.zeros.dtype}")
    if w.minima is not None and w.minima.dtype != w.scales.dtype:
        raise TypeError(
            f"{what}: minima must have the scales' dtype {w.scales.dtype}; got {w.minima.dtype}"
        )
    wanted = (n, k // w.group_size)
    for name, tensor in (("scales", w.scales), ("zeros", w.zeros), ("minima", w.minima)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"{what}: {name} must have shape {wanted}, [n, k / group_size]; got {_size(tensor)}"
            )
        if tensor.device != w.codes.device:
            raise ValueError(
                f"{what}: {name} must be on the codes' device {w.codes.device}; got {tensor.device}"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{what}: {name} must be finite; got infinity or NaN")
    for name, tensor in (("codes", w.codes), ("zeros", w.zeros)):
        if tensor is not None and int(tensor.max()) >= 2**w.bits:
            raise ValueError(
                f"{what}: {name} of {w.bits} bits must be less than {2**w.bits}; got"
                f" {int(tensor.max())}"
            )
    if w.g_idx is not None:
        _check_g_idx(w.g_idx, w.group_size, k, w.codes.device)


def _check_g_idx(g_idx: torch.Tensor, group_size: int, k: int, device: torch.device) -> None:
    what = "QuantizedWeight"
    if g_idx.dtype != torch.int32:
        raise TypeError(f"{what}: g_idx must be int32; got {g_idx.dtype}")
    if tuple(g_idx.shape) != (k,):
        raise ValueError(f"{what}: g_idx must have shape ({k},); got {_size(g_idx)}")
    if g_idx.device != device:
        raise ValueError(f"{what}: g_idx must be on the codes' device {device}; got {g_idx.device}")
    groups = k // group_size
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise ValueError(f"{what}: g_idx must be from 0 to {groups - 1}; got {low} to {high}")
    if bool((torch.bincount(g_idx.long(), minlength=groups) != group_size).any()):
        raise ValueError(f"{what}: g_idx must put {group_size} inputs into each of {groups} groups")


def _size(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
