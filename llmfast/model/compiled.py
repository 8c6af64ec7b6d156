"""The operations as custom ops for torch.compile: opaque, of known shape, without graph breaks.

Outside torch.compile the functions of llmfast_kernels are called directly, because the dispatcher
adds about ten microseconds of Python to each call.
"""

from __future__ import annotations

import torch
from torch.library import custom_op

import llmfast_kernels

Tensor = torch.Tensor


@custom_op("llmfast::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    return llmfast_kernels.rms_norm(x, weight, eps=eps, unit_offset=unit_offset)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    return torch.empty_like(x)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool = False) -> Tensor:
    y: Tensor = _rms_norm(x, weight, eps, unit_offset)
    return y


@custom_op("llmfast::gated", mutates_args=())
def _gated(operation: str, gate: Tensor, up: Tensor | None) -> Tensor:
    result: Tensor = getattr(llmfast_kernels, operation)(gate, up)
    return result


@_gated.register_fake
def _(operation: str, gate: Tensor, up: Tensor | None) -> Tensor:
    width = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    return gate.new_empty((*gate.shape[:-1], width))


def silu_mul(gate: Tensor, up: Tensor | None = None) -> Tensor:
    y: Tensor = _gated("silu_mul", gate, up)
    return y


def gelu_tanh_mul(gate: Tensor, up: Tensor | None = None) -> Tensor:
    y: Tensor = _gated("gelu_tanh_mul", gate, up)
    return y


def gelu_mul(gate: Tensor, up: Tensor | None = None) -> Tensor:
    y: Tensor = _gated("gelu_mul", gate, up)
    return y


@custom_op("llmfast::flash_attention", mutates_args=())
def _flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    offset: int | None,
    offsets: Tensor | None,  # in place of offset
) -> Tensor:
    output = llmfast_kernels.flash_attention(
        q,
        k,
        v,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        key_start=key_start,
        key_end=key_end,
        query_offset=offset if offsets is None else offsets,
    )
    assert isinstance(output, Tensor)  # no log-sum-exp was requested
    return output


@_flash_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    offset: int | None,
    offsets: Tensor | None,
) -> Tensor:
    return q.new_empty(q.shape)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    query_offset: int | Tensor | None = None,
) -> Tensor:
    """Compute causal attention; see :func:`llmfast_kernels.flash_attention`."""
    offset, offsets = query_offset, None
    if isinstance(query_offset, Tensor):
        offset, offsets = None, query_offset
    output: Tensor = _flash_attention(
        q, k, v, scale, window, softcap, sinks, key_start, key_end, offset, offsets
    )
    return output
