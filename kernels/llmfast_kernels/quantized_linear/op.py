"""Linear layers with quantized weights: the contracts and the choice of implementation."""

from __future__ import annotations

import torch

from .checks import check_quantized_linear
from .formats import INT4, INT8
from .reference import quantized_linear_reference


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
    activation: str | None = None,
) -> torch.Tensor:
    """Multiply tokens with four-bit weights, dequantized on their way to the tensor cores.

        weight[n, k] = scales[n, g] * (code[n, k] - zeros[n, g]),  g = k // group_size
                    or scales[n, g] * code[n, k] + minima[n, g]
        y = round(x @ weight.T + bias) + residual

    With an activation the weight holds the gate's rows and then the rows of up:

        gate, up = round(x @ weight.T + bias)
        y = round(act(gate)) * up

    Codes minus zero points are integers that 16 bits hold exactly. Products are summed in float32,
    and each group's sum is multiplied by its scale there. For more than 64 tokens the weights may
    be rounded to x's dtype before the multiplication instead.

    On CUDA, more than 256 tokens may be multiplied by cuBLAS with weights that a kernel
    dequantizes into a workspace; on Hopper few layers are. :func:`workspace_bytes` returns the
    workspace's size.

    Packed weights, scales, zeros and minima must not be written by the kernel launched just before
    this one: with programmatic dependent launch they are read before that kernel has ended.

    Args:
        x: ``(..., k)``, contiguous; float16 or bfloat16, and float32 or float64 off CUDA.
        packed: int32, what :func:`pack_int4` makes of codes ``(n, k)``.
        scales: ``(n, ceil(k / group_size))``, contiguous; of x's dtype or float16, as
            checkpoints have them.
        zeros: uint8, of scales' shape, contiguous: the codes of weight 0. None: 8, unless there
            are minima.
        bias: ``(n,)``, of x's dtype, contiguous.
        group_size: columns that share a scale: 32, 64, 128, or k.
        minima: of scales' shape and dtype, contiguous: the weights of code 0. Not together with
            zeros.
        residual: ``(..., n)``, of x's dtype, contiguous. Not together with an activation.
        activation: None, or the activation of the gate in a gated MLP: ``silu``, ``gelu_tanh`` or
            ``gelu``.

    Returns:
        A new contiguous tensor ``(..., n)`` of x's dtype, ``(..., n / 2)`` with an activation. No
        argument is changed.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: a shape, device, memory layout, group size or activation that breaks the
            contract.
        RuntimeError: an argument requires grad in grad mode; there is no backward.

    Paper: Frantar et al., MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large
    Language Models, arXiv:2408.11743.
    """
    check_quantized_linear(
        "int4_linear", INT4, x, packed, scales, zeros, minima, bias, residual,
        group_size=group_size, activation=activation,
    )  # fmt: skip
    run = quantized_linear_reference
    if x.is_cuda:
        from .kernel import launch_quantized_linear  # imports Triton

        run = launch_quantized_linear
    return run(
        x, packed, scales, zeros, bias,
        fmt=INT4, group_size=group_size, minima=minima, residual=residual, activation=activation,
    )  # fmt: skip


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

    Codes minus zero points are integers that 16 bits hold exactly. Products are summed in float32,
    and each group's sum is multiplied by its scale there: no weight is rounded.

    On CUDA, more than 128 tokens, or more than one with minima, may be multiplied by cuBLAS with
    weights that are dequantized into a workspace, rounded to x's dtype. It is the workspace of
    :func:`~llmfast_kernels.int4_linear`, whose rule about weights that were just written holds
    here too.

    Args:
        x: ``(..., k)``, contiguous; float16 or bfloat16, and float32 or float64 off CUDA.
        packed: uint8, what :func:`pack_int8` makes of codes ``(n, k)``.
        scales: ``(n, ceil(k / group_size))``, contiguous; of x's dtype or float16, as
            checkpoints have them.
        zeros: uint8, of scales' shape, contiguous: the codes of weight 0. None: 128, unless there
            are minima.
        bias: ``(n,)``, of x's dtype, contiguous.
        group_size: columns that share a scale: 32, 64, 128, or k.
        minima: of scales' shape and dtype, contiguous: the weights of code 0. Not together with
            zeros.
        residual: ``(..., n)``, of x's dtype, contiguous.

    Returns:
        A new contiguous tensor ``(..., n)`` of x's dtype. No argument is changed.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: a shape, device, memory layout or group size that breaks the contract.
        RuntimeError: an argument requires grad in grad mode; there is no backward.
    """
    check_quantized_linear(
        "int8_linear", INT8, x, packed, scales, zeros, minima, bias, residual,
        group_size=group_size,
    )  # fmt: skip
    run = quantized_linear_reference
    if x.is_cuda:
        from .kernel import launch_quantized_linear

        run = launch_quantized_linear
    return run(
        x, packed, scales, zeros, bias,
        fmt=INT8, group_size=group_size, minima=minima, residual=residual,
    )  # fmt: skip
