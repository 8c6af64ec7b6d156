"""Gated activations: the contract, the argument checks and the choice of implementation."""

from __future__ import annotations

import torch

from ..common.checks import check_float, check_no_grad, has_row_stride
from .reference import gelu_mul_reference, gelu_tanh_mul_reference, silu_mul_reference


def silu_mul(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """Scale ``up`` by the SiLU of ``gate``, in one pass over memory: the middle of SwiGLU.

        y = round(gate / (1 + exp(-gate))) * up

    The activation is computed in float32 and cast to ``gate.dtype`` before the product, as in a
    Hugging Face MLP.

    Args:
        gate: ``(..., n)``; float32, float16 or bfloat16, and float64 off CUDA, where float64 is
            kept throughout. The last dimension is contiguous and the rows are equally far apart,
            as in a slice of a merged tensor's columns. Without ``up``, ``(..., 2 * n)``: the
            gate's columns first, then up's.
        up: ``(..., n)``; of gate's shape, dtype and device, laid out by the same rule, with
            its own stride between rows.

    Returns:
        A new contiguous tensor ``(..., n)`` of gate's dtype. No argument is changed.

    Raises:
        TypeError: a dtype that is not listed above, or up's dtype differs from gate's.
        ValueError: a shape, device or memory layout that breaks the contract.
        RuntimeError: an argument requires grad in grad mode; there is no backward.

    Paper: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202, eq. 5.
    """
    _check("silu_mul", gate, up)
    if not gate.is_cuda:
        return silu_mul_reference(gate, up)
    from .kernel import launch_silu_mul  # imports Triton, which a machine without CUDA may lack

    return launch_silu_mul(gate, up)


def gelu_tanh_mul(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """Scale ``up`` by the GELU of ``gate``, in its tanh form: the middle of GeGLU, as in Gemma.

        y = round(gate / 2 * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate**3)))) * up

    Rounding, arguments, result and errors are as in :func:`silu_mul`.

    Paper: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv:1606.08415, section 2.
    """
    _check("gelu_tanh_mul", gate, up)
    if not gate.is_cuda:
        return gelu_tanh_mul_reference(gate, up)
    from .kernel import launch_gelu_tanh_mul

    return launch_gelu_tanh_mul(gate, up)


def gelu_mul(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """Scale ``up`` by the GELU of ``gate``, in its exact form.

        y = round(gate / 2 * (1 + erf(gate / sqrt(2)))) * up

    Rounding, arguments, result and errors are as in :func:`silu_mul`.

    Paper: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv:1606.08415, section 2.
    """
    _check("gelu_mul", gate, up)
    if not gate.is_cuda:
        return gelu_mul_reference(gate, up)
    from .kernel import launch_gelu_mul

    return launch_gelu_mul(gate, up)


def _check(op: str, gate: torch.Tensor, up: torch.Tensor | None) -> None:
    check_float(op, "gate", gate)
    if gate.ndim == 0 or gate.shape[-1] == 0:
        raise ValueError(
            f"{op}: gate needs a last dimension of at least 1, got shape {tuple(gate.shape)}"
        )
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                f"{op}: without up, gate holds both halves in its last dimension, which must be "
                f"even; got shape {tuple(gate.shape)}"
            )
    else:
        if up.dtype != gate.dtype:
            raise TypeError(f"{op}: up must have gate's dtype {gate.dtype}, got {up.dtype}")
        if up.shape != gate.shape or up.device != gate.device:
            raise ValueError(
                f"{op}: up must be {tuple(gate.shape)} on {gate.device} as gate is; "
                f"got {tuple(up.shape)} on {up.device}"
            )
        _check_layout(op, "up", up)
    _check_layout(op, "gate", gate)
    check_no_grad(op, gate, up)


def _check_layout(op: str, name: str, tensor: torch.Tensor) -> None:
    if has_row_stride(tensor):
        return
    raise ValueError(
        f"{op}: {name} must have a contiguous last dimension and rows that are equally far apart; "
        f"got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
    )
