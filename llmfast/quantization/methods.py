"""Find codes and scales: rounding to nearest, GPTQ, AWQ.

The functions take a weight, the statistics of the layer's inputs (:mod:`.statistics`) and settings.
They know no models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import UserError
from ..weights.quantized import FLOATS, QuantizedWeight, check_bits, check_group_size
from .statistics import InputStatistics


@dataclass(frozen=True)
class Scheme:
    """The form that a weight is rounded to.

    Args:
        bits: 4 or 8.
        group_size: inputs that share a scale: 32, 64 or 128; None: all of them.
        symmetric: the zero point is the middle of the codes; else one is found for each group.
        scale_dtype: of stored scales, which are rounded to it before codes are found.

    Raises:
        ValueError: bits that are not 4 or 8, or a scale_dtype that scales cannot have.
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        check_bits("Scheme", self.bits)
        if self.scale_dtype not in FLOATS:
            raise ValueError(
                f"Scheme: scale_dtype must be float16, bfloat16 or float32; got {self.scale_dtype}"
            )

    def group(self, k: int) -> int:
        """Return the group size for a weight of ``k`` inputs.

        Raises:
            ValueError: it does not divide k.
        """
        size = k if self.group_size is None else self.group_size
        check_group_size("Scheme", size, k)
        return size


@dataclass(frozen=True)
class GptqSettings:
    """The settings of GPTQ.

    Args:
        damping: added to the Hessian's diagonal, as a share of its mean; more than 0.
        act_order: round columns with large inputs first; the others compensate for their errors.
        static_groups: with act_order, keep groups of neighbours, whose scales are found before any
            column is rounded, so that no ``g_idx`` is needed. Otherwise groups follow the order.
        block: columns whose corrections are collected before the rest of the weight is updated.

    Raises:
        ValueError: damping or block out of range.
    """

    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    block: int = 128

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"GptqSettings: damping must be more than 0; got {self.damping}")
        if self.block < 1:
            raise ValueError(f"GptqSettings: block must be at least 1; got {self.block}")


@dataclass(frozen=True)
class AwqSettings:
    """The settings of AWQ.

    Args:
        alphas: exponents of the inputs' magnitudes; 0 leaves the weight as it is.
        clips: shares of a group's range to which its weights are clipped; 1 clips none.
    """

    alphas: Sequence[float] = field(default_factory=lambda: tuple(i / 10 for i in range(10)))
    clips: Sequence[float] = field(default_factory=lambda: tuple(1 - i / 20 for i in range(10)))


def round_to_nearest(weight: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round each weight ``[n, k]`` to the nearest code; scales from each group's extremes.

    Symmetric: the largest magnitude lies half a step beyond the last code. With zero points: the
    range from the smallest to the largest weight, zero included, has ``2 ** bits - 1`` steps. No
    weight is further than about half a step from its code.

    Raises:
        UserError: a weight that is not finite, or scales too large for their dtype.
        ValueError: the group size does not divide k.
    """
    w = _check_weight("nearest", weight)
    n, k = w.shape
    size = scheme.group(k)
    grouped = w.view(n, k // size, size)
    scales, zeros = _find_scales(grouped, scheme)
    codes = _round(grouped, scales[..., None], zeros[..., None], scheme.bits)
    return _pack(codes.view(n, k), scales, zeros, size, scheme)


def gptq(
    weight: torch.Tensor,
    statistics: InputStatistics,
    scheme: Scheme,
    settings: GptqSettings | None = None,
) -> QuantizedWeight:
    """Round ``weight [n, k]`` column by column; later columns compensate for each error.

    With the Hessian H = 2 X^T X of the layer's squared output error and U the upper Cholesky factor
    of its inverse, column j's error (w_j - q_j) / U_jj times row j of U is taken from the columns
    after j. The factor is computed in float64. Inputs without tokens are rounded to nearest.

    Raises:
        UserError: a weight or a statistic that is not finite, scales too large for their dtype, or
            no tokens.
        ValueError: the group size does not divide k, or statistics of another width.

    Paper: Frantar et al., GPTQ, arXiv:2210.17323, algorithm 1.
    """
    settings = settings or GptqSettings()
    w = _check_weight("gptq", weight)
    n, k = w.shape
    size = scheme.group(k)
    _check_statistics("gptq", statistics, k)
    order, factor = _order_and_factor(statistics, settings, w.device)

    group_of = (
        torch.arange(k, device=w.device) // size
    )  # the group of the column at each place of the order
    scales = w.new_zeros(n, k // size)
    zeros = w.new_zeros(n, k // size)
    static = settings.act_order and settings.static_groups
    if static:
        scales, zeros = _find_scales(w.view(n, k // size, size), scheme)
        group_of = group_of[order]

    w = w[:, order]  # a copy
    codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    for start in range(0, k, settings.block):
        end = min(start + settings.block, k)
        errors = w.new_empty(n, end - start)
        for a, b in _cut(start, end, k if static else size):
            if not static and a % size == 0:
                # this group's columns beyond the block lack its corrections so far
                ahead = w[:, a : a + size].clone()
                if a + size > end:
                    ahead[:, end - a :] -= errors[:, : a - start] @ factor[start:a, end : a + size]
                scales[:, a // size], zeros[:, a // size] = _find_scales(ahead, scheme)
            groups = group_of[a:b]
            codes[:, a:b], errors[:, a - start : b - start] = _round_columns(
                w[:, a:b], scales[:, groups], zeros[:, groups], factor[a:b, a:b], scheme.bits
            )
            w[:, b:end] -= errors[:, a - start : b - start] @ factor[a:b, b:end]
        w[:, end:] -= errors @ factor[start:end, end:]

    inverse = torch.argsort(order)
    g_idx = None
    if settings.act_order and not static and size < k:
        g_idx = group_of[inverse].to(torch.int32)
    return _pack(codes[:, inverse], scales, zeros, size, scheme, g_idx)


def _cut(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the columns from ``start`` to ``end``, cut at multiples of ``size``."""
    while start < end:
        stop = min(end, (start // size + 1) * size)
        yield start, stop
        start = stop


def _round_columns(
    w: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    factor: torch.Tensor,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and errors ``[n, m]`` of columns ``w [n, m]``; later ones compensate.

    Args:
        w, scales, zeros: float32 ``[n, m]``.
        factor: ``[m, m]``, the part of the factor for these columns.
    """
    # transposed: columns are contiguous as rows
    w, scales, zeros = (t.T.contiguous() for t in (w, scales, zeros))
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    diagonal = factor.diagonal()
    for j in range(len(w)):
        column, scale, zero = w[j], scales[j], zeros[j]
        codes[j] = _round(column, scale, zero, bits)
        torch.div(column - (codes[j] - zero) * scale, diagonal[j], out=errors[j])
        w[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return codes.T, errors.T


def _order_and_factor(
    statistics: InputStatistics, settings: GptqSettings, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the order of columns, int64 ``[k]``, and the factor in that order, float32 ``[k, k]``.

    It is computed in float64. At most two matrices of 8 k**2 bytes are held here at a time, beside
    PyTorch's own workspace for factorisation and inversion.
    """
    squares = statistics.squares.to(device)
    seen, order = squares > 0, torch.arange(len(squares), device=device)
    if settings.act_order:
        order = torch.argsort(squares, descending=True, stable=True)
    for share in _growing(settings.damping):
        hessian = statistics.gram.to(device)[order[:, None], order].double()
        diagonal, known = hessian.diagonal(), seen[order]
        diagonal[~known] = diagonal[known].mean() if bool(known.any()) else 1.0
        diagonal += share * diagonal.mean()
        lower, failed = torch.linalg.cholesky_ex(hessian)
        del hessian, diagonal
        if int(failed):
            continue
        inverse = torch.cholesky_inverse(lower)
        del lower
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        del inverse
        if not int(failed):
            return order, upper.float()
    raise UserError("gptq: the inputs' Hessian cannot be inverted, whatever the damping")


def awq_scales(
    weights: Sequence[torch.Tensor],
    statistics: InputStatistics,
    scheme: Scheme,
    settings: AwqSettings | None = None,
    *,
    shared: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the factors by which AWQ multiplies the columns of layers that share an input.

    Weights with large inputs get more of the codes: s = magnitude ** alpha, divided by the
    geometric mean of its extremes. The alpha is chosen whose rounded weights have the smallest
    squared output error on the calibration: tr(D G D^T) with the weights' errors D and the mean G
    of x x^T. The caller divides the inputs by s.

    Args:
        weights: matrices ``[n_i, k]`` of layers that share an input.
        statistics: of that input.
        scheme: the form that the weights will be rounded to.
        settings: the alphas.
        shared: int64 ``[k]``; inputs with the same number get the same factor. None: each input has
            its own.

    Returns:
        float32 ``[k]``, positive; all ones if no alpha is better than plain rounding.

    Raises:
        UserError: a weight or statistic that is not finite, or no tokens.
        ValueError: the group size does not divide k, or statistics of another width.

    Paper: Lin et al., AWQ, arXiv:2306.00978, section 3.2.
    """
    settings = settings or AwqSettings()
    checked = [_check_weight("awq", weight) for weight in weights]
    k = checked[0].shape[1]
    scheme.group(k)
    _check_statistics("awq", statistics, k)
    device = checked[0].device
    magnitude = statistics.magnitude.to(device)
    if shared is not None:
        count = torch.bincount(shared).to(magnitude)
        magnitude = (torch.zeros_like(count).index_add_(0, shared, magnitude) / count)[shared]
    gram = statistics.gram.to(device)
    w = torch.cat(checked)
    # rows are rounded independently, so the layers can be tried as one
    best, least = torch.ones(k, device=device), _output_error(w, round_to_nearest(w, scheme), gram)
    for alpha in settings.alphas:
        s = magnitude.clamp(min=1e-4) ** alpha
        s /= (s.max() * s.min()).sqrt()
        rounded = round_to_nearest(w * s, scheme).dequantize() / s
        error = _squared_error(w - rounded, gram)
        if error < least:
            best, least = s, error
    return best


def awq_round(
    weight: torch.Tensor,
    statistics: InputStatistics,
    scheme: Scheme,
    settings: AwqSettings | None = None,
    *,
    scales: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Round ``weight [n, k]`` to nearest, with each group clipped to its best range.

    Each group takes the clip with the smallest squared error of its part of the layer's output on
    the calibration.

    Args:
        weight: already multiplied by ``scales``.
        statistics: of the inputs before they are divided by ``scales``.
        scheme: the form to round to.
        settings: the clips.
        scales: the result of :func:`awq_scales`, ``[k]``; None: ones.

    Raises:
        UserError: a weight or statistic that is not finite, or no tokens.
        ValueError: the group size does not divide k, or statistics of another width.
    """
    settings = settings or AwqSettings()
    w = _check_weight("awq", weight)
    n, k = w.shape
    size = scheme.group(k)
    _check_statistics("awq", statistics, k)
    gram = statistics.gram.to(w.device)
    if scales is not None:
        gram = gram / torch.outer(scales, scales)
    # the diagonal blocks: [groups, size, size]
    gram = gram.view(k // size, size, k // size, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    groups = w.view(n, k // size, size)
    best, zeros = _find_scales(groups, scheme)
    least = _group_errors(groups, best, zeros, gram, scheme)
    for clip in settings.clips:
        tried, tried_zeros = _find_scales(groups * clip, scheme)
        error = _group_errors(groups, tried, tried_zeros, gram, scheme)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, tried, best)
        zeros = torch.where(better, tried_zeros, zeros)
    codes = _round(groups, best[..., None], zeros[..., None], scheme.bits)
    return _pack(codes.view(n, k), best, zeros, size, scheme)


def _group_errors(
    groups: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    gram: torch.Tensor,
    scheme: Scheme,
) -> torch.Tensor:
    """Return the squared error ``[n, groups]`` of each group's part of the output."""
    scales, zeros = scales[..., None], zeros[..., None]
    error = (_round(groups, scales, zeros, scheme.bits) - zeros) * scales - groups
    error = error.transpose(0, 1)  # [groups, n, size]
    return ((error @ gram) * error).sum(-1).T


def _output_error(w: torch.Tensor, q: QuantizedWeight, gram: torch.Tensor) -> float:
    return _squared_error(w - q.dequantize(), gram)


def _squared_error(error: torch.Tensor, gram: torch.Tensor) -> float:
    return float(((error @ gram) * error).sum(dtype=torch.float64))


def _find_scales(groups: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales, rounded to their dtype, and zero points of groups ``[..., size]``; float32."""
    steps = 2**scheme.bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scales = (high - low) / steps
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))  # a group of zeros
    scales = scales.clamp(min=_least(scheme.scale_dtype)).to(scheme.scale_dtype).float()
    if not bool(scales.isfinite().all()):
        raise UserError(f"weights are too large for scales of {scheme.scale_dtype}")
    if scheme.symmetric:
        return scales, torch.full_like(scales, 2 ** (scheme.bits - 1))
    return scales, (-low / scales).round().clamp(0, steps)


def _least(dtype: torch.dtype) -> float:
    """Return the smallest scale: a normal number, so that rounding it loses no bits."""
    return float(torch.finfo(dtype).tiny)


def _round(w: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    return (w / scales + zeros).round().clamp(0, 2**bits - 1)


def _pack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    group_size: int,
    scheme: Scheme,
    g_idx: torch.Tensor | None = None,
) -> QuantizedWeight:
    return QuantizedWeight(
        codes=codes.to(torch.uint8),
        bits=scheme.bits,
        group_size=group_size,
        scales=scales.to(scheme.scale_dtype),
        zeros=None if scheme.symmetric else zeros.to(torch.uint8),
        g_idx=g_idx,
    )


def _growing(damping: float) -> Iterator[float]:
    while damping <= 1:
        yield damping
        damping *= 10
    yield damping


def _check_weight(what: str, weight: torch.Tensor) -> torch.Tensor:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"{what}: weight must be a matrix [n, k] that is not empty; got {tuple(weight.shape)}"
        )
    if not bool(weight.isfinite().all()):
        raise UserError(f"{what}: the weight holds infinity or NaN")
    return weight.detach().float()


def _check_statistics(what: str, statistics: InputStatistics, k: int) -> None:
    if statistics.tokens == 0:
        raise UserError(f"{what}: no token of the calibration reached this layer")
    if len(statistics.magnitude) != k:
        raise ValueError(
            f"{what}: statistics must be of {k} inputs; got {len(statistics.magnitude)}"
        )
    if not bool(statistics.squares.isfinite().all()):
        raise UserError(f"{what}: the calibration's activations hold infinity or NaN")
