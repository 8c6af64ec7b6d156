"""Linear layers with four-bit weights: the contract and the choice of implementation."""

from __future__ import annotations

import torch

from ..common.checks import check_like
from .contract import check_gated, check_input, check_parts
from .int4_layout import CHUNK
from .reference import int4_linear_reference


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
                    or, with an activation, of a gate's rows and then up's:
        gate, up = round(x @ weight.T + bias)
        y = round(act(gate)) * up

    Codes less zero points are whole numbers that 16 bits hold exactly; products are summed in
    float32 and each group's sum is multiplied with its scale there. For more than 64 tokens the
    weights may be rounded to x's dtype instead, before they are multiplied.

    On CUDA, more than ``int4_launch.MAX_TOKENS`` tokens may go through a workspace, into which the
    weights are dequantized for cuBLAS; on Hopper few layers do. The workspace is one for each
    device and dtype, so calls on two streams must not overlap; :func:`workspace_bytes` is its size.

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
        residual: ``(..., n)``, of x's dtype, contiguous. Not together with an activation.
        activation: None, or that of the gate in a gated MLP: ``silu``, ``gelu_tanh`` or ``gelu``.

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
    op = "int4_linear"
    k = check_input(op, x, group_size)
    if packed.ndim != 2 or len(packed) == 0:
        raise ValueError(f"{op}: packed must be (n, words), got shape {tuple(packed.shape)}")
    n = len(packed)
    check_like(op, "packed", packed, (n, -(-k // CHUNK) * CHUNK // 8), x, torch.int32)
    check_parts(op, x, n, group_size, scales, zeros, minima, bias, residual)
    if activation is not None:
        check_gated(op, n, residual, activation)
    run = int4_linear_reference
    if x.is_cuda:
        from .int4_kernel import launch_int4_linear  # imports Triton

        run = launch_int4_linear
    return run(
        x, packed, scales, zeros, bias,
        group_size=group_size, minima=minima, residual=residual, activation=activation,
    )  # fmt: skip
