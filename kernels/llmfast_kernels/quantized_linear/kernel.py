"""Launch linear layers with quantized weights. Arguments are checked by op.py; here they are good.

:func:`.launch.plan` chooses the main loop. Each main loop is a file of ``kernels/``.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ..common.device import device_of
from ..linear.kernel import GATED
from .call import Call
from .formats import Format
from .kernels.dequantize import launch_dequantize
from .kernels.gemv import launch_gemv
from .kernels.scaled_tiles import launch_scaled_tiles
from .kernels.tiles import launch_tiles
from .launch import Launch, plan
from .workspace import workspace


def launch_quantized_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    fmt: Format,
    group_size: int,
    minima: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    launch: Launch | None = None,
) -> torch.Tensor:
    """Run :func:`~.op.int4_linear` or :func:`~.op.int8_linear`, whose arguments these are.

    Args:
        fmt: the packed format.
        launch: how; None: what :func:`.launch.plan` chooses.
    """
    k, groups = x.shape[-1], scales.shape[1]
    call = Call(
        x, packed, scales, zeros, minima, bias, residual, fmt,
        tokens=x.numel() // k, n=len(packed), k=k, groups=groups,
        group=group_size if groups > 1 else 0, activation=activation,
    )  # fmt: skip
    if call.tokens == 0:
        return call.output()
    if launch is None:
        launch = plan(call.problem, device_of(x))
    if launch.tier == "workspace":
        return _multiply_dequantized(call, group_size)
    y = call.output()
    if launch.tier == "stream":
        from .kernels.hopper.stream import launch_stream  # Gluon, for these GPUs alone

        launch_stream(call, y, launch)
    elif launch.tier == "gemm":
        from .kernels.hopper.gemm import launch_gemm

        launch_gemm(call, y, launch)
    else:
        _TIERS[launch.tier](call, y, launch)
    return y


_TIERS = {"gemv": launch_gemv, "tiles": launch_tiles, "scaled_tiles": launch_scaled_tiles}


def _multiply_dequantized(call: Call, group_size: int) -> torch.Tensor:
    """Write the weights to the workspace, and let cuBLAS multiply."""
    x, residual = call.x, call.residual
    weight = workspace(x.device, x.dtype, call.n * call.k).view(call.n, call.k)
    launch_dequantize(
        call.packed, call.scales, call.zeros, call.minima, weight,
        fmt=call.fmt, group_size=group_size,
    )  # fmt: skip
    y = functional.linear(x, weight, call.bias)
    if call.activation is not None:
        return GATED[call.activation](y)
    return y if residual is None else y.add_(residual)
