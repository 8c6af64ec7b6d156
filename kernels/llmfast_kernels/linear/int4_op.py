"""Linear layers with four-bit weights: the contract and the choice of implementation."""

from __future__ import annotations

import torch

from .int4_layout import CHUNK
from .op import check_like, check_no_grad
from .reference import int4_linear_reference

GROUP_SIZES = (32, 64, 128)  # or all columns
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
    minima: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply tokens with four-bit weights, dequantized on their way to the tensor cores.

        weight[n, k] = scales[n, g] * (code[n, k] - zeros[n, g]),  g = k // group_size
                    or scales[n, g] * code[n, k] + minima[n, g]
        y = round(x @ weight.T + bias) + residual

    Codes less zero points are whole numbers that 16 bits hold exactly; products are summed in
    float32 and each group's sum is multiplied with its scale there. No weight is rounded.

    On CUDA, more than ``int4_kernel.MAX_TOKENS`` tokens go another way: the weights are rounded to
    x's dtype in a workspace, and multiplied by cuBLAS. The workspace is one for each device and
    dtype, so calls on two streams must not overlap; :func:`int4_workspace_bytes` is its size.

    Args:
        x: ``(..., k)``, contiguous; float16 or bfloat16, and float32 or float64 off CUDA.
        packed: int32, what :func:`pack_int4` makes of codes ``(n, k)``.
        scales: ``(n, ceil(k / group_size))``, contiguous; of x's dtype or float16, as
            checkpoints have them.
        zeros: uint8, of scales' shape, contiguous: the codes that stand for 0. None: 8 does,
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

    Paper: Frantar et al., MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large
    Language Models, arXiv:2408.11743.
    """
    op = "int4_linear"
    if x.dtype not in _DTYPES[1:] and (x.is_cuda or x.dtype not in (*_DTYPES, torch.float64)):
        raise TypeError(f"{op}: x must be float16 or bfloat16; got {x.dtype} on {x.device}")
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_contiguous():
        raise ValueError(
            f"{op}: x must be contiguous with a last dimension of at least 1; "
            f"got shape {tuple(x.shape)} with strides {x.stride()}"
        )
    k = x.shape[-1]
    if group_size not in GROUP_SIZES and group_size != k:
        raise ValueError(f"{op}: group_size must be 32, 64, 128 or k = {k}; got {group_size}")
    if packed.ndim != 2 or len(packed) == 0:
        raise ValueError(f"{op}: packed must be (n, words), got shape {tuple(packed.shape)}")
    n = len(packed)
    check_like(op, "packed", packed, (n, -(-k // CHUNK) * CHUNK // 8), x, torch.int32)
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
    run = int4_linear_reference
    if x.is_cuda:
        from .int4_kernel import launch_int4_linear  # imports Triton

        run = launch_int4_linear
    return run(
        x, packed, scales, zeros, bias, group_size=group_size, minima=minima, residual=residual
    )
