"""Linear layers with eight-bit weights: the contract and the choice of implementation."""

from __future__ import annotations

import torch

from .int4_op import GROUP_SIZES
from .op import check_like, check_no_grad
from .reference import int8_linear_reference

_DTYPES = (torch.float16, torch.bfloat16)
_OFF_CUDA = (*_DTYPES, torch.float32, torch.float64)


def int8_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
    minima: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply tokens with eight-bit weights, dequantized on their way to the multipliers.

        weight[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g]),  g = k // group_size
                    or scales[n, g] * codes[n, k] + minima[n, g]
        y = round(x @ weight.T + bias) + residual

    Codes less zero points are whole numbers that 16 bits hold exactly; products are summed in
    float32 and each group's sum is multiplied with its scale there. No weight is rounded.

    On CUDA, more than ``int8_kernel.MAX_TOKENS`` tokens, or several with minima, go another way:
    the weights are rounded to x's dtype in a workspace, and multiplied by cuBLAS. It is the one of
    :func:`~llmfast_kernels.int4_linear`.

    Args:
        x: ``(..., k)``, contiguous; float16 or bfloat16, and float32 or float64 off CUDA.
        codes: uint8 ``(n, k)``, contiguous.
        scales: ``(n, ceil(k / group_size))``, contiguous; of x's dtype or float16, as
            checkpoints have them.
        zeros: uint8, of scales' shape, contiguous: the codes that stand for 0. None: 128 does,
            unless there are minima.
        bias: ``(n,)``, of x's dtype, contiguous.
        group_size: columns that share a scale: 32, 64, 128, or k.
        minima: of scales' shape and dtype, contiguous: what the codes 0 stand for. Not together
            with zeros.
        residual: ``(..., n)``, of x's dtype, contiguous.

    Returns:
        A new contiguous tensor ``(..., n)`` of x's dtype. No argument is changed.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: a shape, device, memory layout or group size that breaks the contract.
        RuntimeError: an argument requires grad in grad mode; there is no backward.
    """
    op = "int8_linear"
    if x.dtype not in (_DTYPES if x.is_cuda else _OFF_CUDA):
        raise TypeError(f"{op}: x must be float16 or bfloat16; got {x.dtype} on {x.device}")
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_contiguous():
        raise ValueError(
            f"{op}: x must be contiguous with a last dimension of at least 1; "
            f"got shape {tuple(x.shape)} with strides {x.stride()}"
        )
    k = x.shape[-1]
    if group_size not in GROUP_SIZES and group_size != k:
        raise ValueError(f"{op}: group_size must be 32, 64, 128 or k = {k}; got {group_size}")
    if codes.ndim != 2 or len(codes) == 0:
        raise ValueError(f"{op}: codes must be (n, k), got shape {tuple(codes.shape)}")
    n = len(codes)
    check_like(op, "codes", codes, (n, k), x, torch.uint8)
    groups = (n, -(-k // group_size))
    scale_dtype = torch.float16 if scales.dtype == torch.float16 else x.dtype
    check_like(op, "scales", scales, groups, x, scale_dtype)
    if zeros is not None:
        check_like(op, "zeros", zeros, groups, x, torch.uint8)
    if minima is not None:
        if zeros is not None:
            raise ValueError(f"{op}: zeros and minima exclude each other; got both")
        check_like(op, "minima", minima, groups, x, scale_dtype)
    if bias is not None:
        check_like(op, "bias", bias, (n,), x)
    if residual is not None:
        check_like(op, "residual", residual, (*x.shape[:-1], n), x)
    check_no_grad(op, x, scales, minima, bias, residual)
    run = int8_linear_reference
    if x.is_cuda:
        from .int8_kernel import launch_int8_linear  # imports Triton

        run = launch_int8_linear
    return run(
        x, codes, scales, zeros, bias, group_size=group_size, minima=minima, residual=residual
    )
