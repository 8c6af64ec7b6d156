"""Linear layers with eight-bit weights: the contract and the choice of implementation."""

from __future__ import annotations

import torch

from ..common.checks import check_like
from .contract import check_input, check_parts
from .int8_layout import UNIT
from .reference import int8_linear_reference


def int8_linear(
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
    """Multiply tokens with eight-bit weights, dequantized on their way to the multipliers.

        weight[n, k] = scales[n, g] * (code[n, k] - zeros[n, g]),  g = k // group_size
                    or scales[n, g] * code[n, k] + minima[n, g]
        y = round(x @ weight.T + bias) + residual

    Codes less zero points are whole numbers that 16 bits hold exactly; products are summed in
    float32 and each group's sum is multiplied with its scale there. No weight is rounded.

    On CUDA, more than ``int8_kernel.MAX_TOKENS`` tokens, or several with minima, go another way:
    the weights are rounded to x's dtype in a workspace, and multiplied by cuBLAS. It is the one of
    :func:`~llmfast_kernels.int4_linear`.

    Args:
        x: ``(..., k)``, contiguous; float16 or bfloat16, and float32 or float64 off CUDA.
        packed: uint8, what :func:`pack_int8` makes of codes ``(n, k)``.
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
    k = check_input(op, x, group_size)
    if packed.ndim != 2 or len(packed) == 0:
        raise ValueError(f"{op}: packed must be (n, places), got shape {tuple(packed.shape)}")
    n = len(packed)
    check_like(op, "packed", packed, (n, -(-k // UNIT) * UNIT), x, torch.uint8)
    check_parts(op, x, n, group_size, scales, zeros, minima, bias, residual)
    run = int8_linear_reference
    if x.is_cuda:
        from .int8_kernel import launch_int8_linear  # imports Triton

        run = launch_int8_linear
    return run(
        x, packed, scales, zeros, bias, group_size=group_size, minima=minima, residual=residual
    )
