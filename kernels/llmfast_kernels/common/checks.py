"""Argument checks that several families share. Messages name operation, argument, wanted, got."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_float(op: str, name: str, x: torch.Tensor) -> None:
    """Raise unless ``x`` has a dtype that the kernels take, or float64 off CUDA."""
    if x.dtype not in FLOATS and (x.is_cuda or x.dtype != torch.float64):
        accepted = "float32, float16 or bfloat16" + ("" if x.is_cuda else ", or float64 off CUDA")
        raise TypeError(f"{op}: {name} must be {accepted}; got {x.dtype} on {x.device}")


def check_like(
    op: str,
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    x: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise unless a tensor is contiguous, of ``shape``, on x's device and of x's or ``dtype``."""
    if tensor.dtype != (dtype or x.dtype):
        wanted = f"be {dtype}" if dtype not in (None, x.dtype) else f"have x's dtype {x.dtype}"
        raise TypeError(f"{op}: {name} must {wanted}, got {tensor.dtype}")
    check_layout(op, name, tensor, shape, x.device)


def check_layout(
    op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raise unless a tensor is contiguous, of ``shape`` and on ``device``."""
    if tuple(tensor.shape) != shape or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be {shape}, contiguous, on {device}; got {tuple(tensor.shape)} "
            f"with strides {tensor.stride()} on {tensor.device}"
        )


def check_no_grad(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise if one of the tensors requires a gradient: there is no backward."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{op}: no backward; call under torch.no_grad()")


def has_row_stride(x: torch.Tensor) -> bool:
    """Return True if rows of ``x`` are contiguous and one stride leads from each to the next."""
    if x.is_contiguous():
        return True
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return False
    try:
        x.view(-1, x.shape[-1])
    except RuntimeError:  # two strides, or more
        return False
    return True


def row_stride(x: torch.Tensor) -> int:
    """Return the elements from one row to the next, for tensors with :func:`has_row_stride`."""
    width = x.shape[-1]
    return width if x.is_contiguous() else x.view(-1, width).stride(0)
