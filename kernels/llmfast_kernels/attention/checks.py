"""The argument checks that the operations of attention share."""

from __future__ import annotations

import math

import torch

from ..common.checks import FLOATS, check_no_grad

MAX_HEAD_DIM = 256  # on CUDA, where a program holds whole rows of queries in registers
_INTS = (torch.int32, torch.int64)


def check(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    *,
    names: tuple[str, str] = ("k", "v"),
    kv_heads_dim: int = -2,
) -> None:
    """Check the arguments that all operations have; messages call k and v by ``names``."""
    key, value = names
    if q.dtype not in FLOATS and (q.dtype != torch.float64 or q.is_cuda):
        raise TypeError(f"{op}: q must be float32, float16 or bfloat16, got {q.dtype}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            f"{op}: {key} and {value} must have q's dtype {q.dtype}, got {k.dtype}, {v.dtype}"
        )
    if k.device != q.device or v.device != q.device:
        raise ValueError(
            f"{op}: {key} and {value} must be on {q.device} as q is, got {k.device}, {v.device}"
        )
    if v.shape != k.shape:
        if v.shape[:-1] == k.shape[:-1]:
            raise NotImplementedError(
                f"{op}: {value}'s head dimension must be {key}'s, {k.shape[-1]}, got {v.shape[-1]}"
            )
        raise ValueError(
            f"{op}: {value} must have {key}'s shape {tuple(k.shape)}, got {tuple(v.shape)}"
        )
    head_dim = q.shape[-1]
    if k.shape[-1] != head_dim or head_dim == 0:
        raise ValueError(
            f"{op}: q and {key} must have one head dimension of at least 1, "
            f"got {head_dim} and {k.shape[-1]}"
        )
    if q.is_cuda and head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"{op}: the head dimension is at most {MAX_HEAD_DIM} on CUDA, got {head_dim}"
        )
    kv_heads = k.shape[kv_heads_dim]
    if kv_heads == 0 or q.shape[-2] % kv_heads:
        raise ValueError(
            f"{op}: the heads of q must be a multiple of those of {key}, "
            f"got {q.shape[-2]} and {kv_heads}"
        )
    if head_dim > 1 and not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        raise ValueError(
            f"{op}: q, {key} and {value} must have a last stride of 1, "
            f"got strides {q.stride()}, {k.stride()}, {v.stride()}"
        )
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"{op}: scale must be more than 0, got {scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap must be more than 0, got {softcap}")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window must be at least 1, got {window}")
    if sinks is not None:
        if not sinks.is_floating_point():
            raise TypeError(f"{op}: sinks must have a float dtype, got {sinks.dtype}")
        if sinks.shape != q.shape[-2:-1] or sinks.device != q.device or not sinks.is_contiguous():
            raise ValueError(
                f"{op}: sinks must be contiguous, of shape {tuple(q.shape[-2:-1])} (q's heads) "
                f"on {q.device}; got {tuple(sinks.shape)} on {sinks.device} "
                f"with strides {sinks.stride()}"
            )
    check_no_grad(op, q, k, v, sinks)


def check_ints(
    op: str,
    name: str,
    x: torch.Tensor,
    q: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...] = _INTS,
) -> None:
    """Check a contiguous tensor of integers."""
    if x.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {wanted}, got {x.dtype}")
    if x.shape != shape or x.device != q.device or not x.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous, of shape {shape} on {q.device}; "
            f"got {tuple(x.shape)} on {x.device} with strides {x.stride()}"
        )
