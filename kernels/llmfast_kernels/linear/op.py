"""Linear layers in 16 bits: the contracts, the checks and the choice of implementation."""

from __future__ import annotations

import torch

from ..common.checks import check_float, check_like, check_no_grad
from .reference import ACTIVATIONS, dense_linear_reference, gated_linear_reference


def dense_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply tokens with a weight matrix, and add the residual stream if there is one.

        y = round(x @ weight.T + bias) + residual

    Products are summed in float32. ``round`` is the cast to ``x.dtype`` that a linear layer ends
    with. The residual is added after it, as a Hugging Face decoder layer adds it.

    Args:
        x: ``(..., in_features)``, contiguous; float32, float16 or bfloat16, and float64 off CUDA.
        weight: ``(out_features, in_features)``, contiguous, of x's dtype and on x's device.
        bias: ``(out_features,)``, contiguous, of x's dtype and on x's device.
        residual: ``(..., out_features)``, contiguous, of x's dtype and on x's device.

    Returns:
        A new contiguous tensor ``(..., out_features)``. No argument is changed.

    On CUDA, up to 128 tokens in 16 bits run the kernels that the GPU's table names, or without an
    entry a heuristic. More tokens and float32 run cuBLAS.

    Raises:
        TypeError: a dtype that is not listed above, or dtypes that differ.
        ValueError: a shape, device or memory layout that breaks the contract.
        RuntimeError: an argument requires grad in grad mode; there is no backward.
    """
    _check("dense_linear", x, weight, bias)
    if residual is not None:
        check_like("dense_linear", "residual", residual, (*x.shape[:-1], len(weight)), x)
    check_no_grad("dense_linear", x, weight, bias, residual)
    if not x.is_cuda:
        return dense_linear_reference(x, weight, bias, residual=residual)
    from .kernel import launch_dense_linear  # imports Triton, which a machine without CUDA may lack

    return launch_dense_linear(x, weight, bias, residual=residual)


def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "silu",
) -> torch.Tensor:
    """Compute the first half of a gated MLP: gate and up projection, and their gated product.

        gate, up = round(x @ weight.T + bias)
        y = round(act(gate)) * up

    It rounds where :func:`dense_linear` and an activation like ``silu_mul`` after it round.

    Args:
        x: as in :func:`dense_linear`.
        weight: ``(2 * n, in_features)``, contiguous: the gate's rows, then the rows of up.
        bias: ``(2 * n,)``, contiguous.
        activation: the gate's: ``silu``, ``gelu_tanh`` or ``gelu``.

    Returns:
        A new contiguous tensor ``(..., n)``. No argument is changed.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`dense_linear`.
        ValueError: also an odd number of rows, or an activation that is not listed above.

    Paper: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    _check("gated_linear", x, weight, bias)
    if len(weight) % 2:
        raise ValueError(
            f"gated_linear: weight holds the gate's rows and up's, so their number must be even; "
            f"got shape {tuple(weight.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"gated_linear: activation must be {', '.join(ACTIVATIONS)}; got {activation!r}"
        )
    check_no_grad("gated_linear", x, weight, bias)
    if not x.is_cuda:
        return gated_linear_reference(x, weight, bias, activation=activation)
    from .kernel import launch_gated_linear

    return launch_gated_linear(x, weight, bias, activation=activation)


def _check(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    check_float(op, "x", x)
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_contiguous():
        raise ValueError(
            f"{op}: x must be contiguous with a last dimension of at least 1; "
            f"got shape {tuple(x.shape)} with strides {x.stride()}"
        )
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or len(weight) == 0:
        raise ValueError(
            f"{op}: weight must be (out_features, {x.shape[-1]}), as x's last dimension is; "
            f"got shape {tuple(weight.shape)}"
        )
    check_like(op, "weight", weight, tuple(weight.shape), x)
    if bias is not None:
        check_like(op, "bias", bias, (len(weight),), x)
