"""Launching attention. op.py and paged_op.py check the arguments; here they are trusted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..common.device import device_of
from ..common.launch import CachedLauncher
from ..common.streams import PerStream
from .kernels.arguments import Heads, Output, Scoring, Sequences
from .kernels.decode import (
    DecodeLaunch,
    _decode_kernel,
    _merge_kernel,
    choose_decode_launch,
    max_rows,
)
from .kernels.loop import LOG2_E
from .kernels.prefill import PrefillLaunch, _prefill_kernel, choose_prefill_launch

Launch = PrefillLaunch | DecodeLaunch
Launches = tuple[DecodeLaunch, PrefillLaunch]  # of sequences with one query, and with more
_prefill = CachedLauncher(_prefill_kernel)
_decode, _merge = (CachedLauncher(k, pdl=True) for k in (_decode_kernel, _merge_kernel))
_side_streams = PerStream(lambda device: torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


class _Call(NamedTuple):
    """One call of attention, as its kernels take it."""

    q: Heads
    k: Heads
    v: Heads
    out: Output
    sequences: Sequences
    n_kv_heads: int
    block_size: int | None  # tokens in a block of the paged cache
    batch: int
    n_queries: int  # the most of any sequence
    n_keys: int
    causal: bool
    scale: float | None
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    query_offset: int = 0
    max_prompts: int | None = None  # sequences with several queries; None: n_queries tells


def launch_flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    key_start: torch.Tensor | None = None,
    key_end: torch.Tensor | None = None,
    query_offset: int | torch.Tensor | None = None,
    return_lse: bool = False,
    launch: Launch | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    batch, n_queries, n_heads, _ = q.shape
    n_keys = k.shape[1]
    offsets: torch.Tensor | None = None
    if isinstance(query_offset, torch.Tensor):
        offsets, query_offset = query_offset, 0
    elif query_offset is None:
        query_offset = n_keys - n_queries
    call = _Call(
        q=Heads(q, *q.stride()[:3]),
        k=Heads(k, *k.stride()[:3]),
        v=Heads(v, *v.stride()[:3]),
        out=_empty_output(q, (batch, n_heads, n_queries) if return_lse else None),
        sequences=Sequences(key_start_ptr=key_start, key_end_ptr=key_end, offset_ptr=offsets),
        n_kv_heads=k.shape[2],
        block_size=None,
        batch=batch,
        n_queries=n_queries,
        n_keys=n_keys,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        query_offset=query_offset,
    )
    _run(call, launch)
    return _result(call.out)


def launch_flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    launch: Launch | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    call = _Call(
        q=Heads(q, 0, *q.stride()[:2]),
        k=Heads(k, 0, *k.stride()[:2]),
        v=Heads(v, 0, *v.stride()[:2]),
        out=_empty_output(q, (q.shape[1], q.shape[0]) if return_lse else None),
        sequences=Sequences(cu_seqlens_q, cu_seqlens_k),
        n_kv_heads=k.shape[1],
        block_size=None,
        batch=cu_seqlens_q.shape[0] - 1,
        n_queries=max_seqlen_q,
        n_keys=max_seqlen_k,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    _run(call, launch)
    return _result(call.out)


def launch_paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    block_table: torch.Tensor,
    max_query_len: int,
    max_context_len: int | None = None,
    max_prompts: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    return_lse: bool = False,
    launch: Launch | Launches | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    batch, max_blocks = block_table.shape
    _, n_kv_heads, block_size, _ = k_cache.shape
    n_keys = max_blocks * block_size
    if max_context_len is not None:
        n_keys = min(n_keys, max_context_len)
    call = _Call(
        q=Heads(q, 0, *q.stride()[:2]),
        k=_cached_heads(k_cache),
        v=_cached_heads(v_cache),
        out=_empty_output(q, (q.shape[1], q.shape[0]) if return_lse else None),
        sequences=Sequences(
            cu_q_ptr=query_start,
            context_len_ptr=context_len,
            block_table_ptr=block_table,
            tree_mask_ptr=tree_mask,
        ),
        n_kv_heads=n_kv_heads,
        block_size=block_size,
        batch=batch,
        n_queries=max_query_len,
        n_keys=n_keys,
        causal=tree_mask is None,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    if isinstance(launch, tuple):
        one_query, several = launch
        _run(call._replace(n_queries=1, max_prompts=max_prompts), one_query)
        _run(call._replace(max_prompts=max_prompts), several)
    elif launch is not None or max_prompts is None or not _differ(q, n_kv_heads, max_query_len):
        _run(call, launch)
    else:
        with _side_stream(q.device):
            _run(call._replace(n_queries=1, max_prompts=max_prompts), None)
        _run(call._replace(max_prompts=max_prompts), None)
        _join_side_stream(q.device)
    return _result(call.out)


def _cached_heads(cache: torch.Tensor) -> Heads:
    """Return ``[num_blocks, Hkv, block_size, D]`` with the strides of flash_attention's order."""
    stride_block, stride_head, stride_offset, _ = cache.stride()
    return Heads(cache, stride_block, stride_offset, stride_head)


def _empty_output(q: torch.Tensor, lse_shape: tuple[int, ...] | None) -> Output:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if lse_shape is None:
        return Output(out, None)
    return Output(out, torch.empty(lse_shape, dtype=torch.float32, device=q.device))


def _result(out: Output) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    return out.ptr if out.lse_ptr is None else (out.ptr, out.lse_ptr)


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Launch on a side stream, concurrent with all launches until :func:`_join_side_stream`.

    Single queries wait for memory and prompts for the tensor cores. When the last programs of a
    prompt leave SMs idle, programs of the single queries take them.
    """
    if device.type != "cuda":
        yield
        return
    stream = _side_streams.of(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def _join_side_stream(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_side_streams.of(device))


def _differ(q: torch.Tensor, n_kv_heads: int, n_queries: int) -> bool:
    """Return True if the decode kernel takes one query and the prefill kernel n_queries."""
    group = q.shape[-2] // max(n_kv_heads, 1)
    return group <= max_rows(q.element_size()) < n_queries * group


def _run(call: _Call, launch: Launch | None) -> None:
    """Run the kernels that ``launch`` belongs to; if it is None, choose it."""
    q, sequences, n_kv_heads = call.q.ptr, call.sequences, call.n_kv_heads
    n_heads, head_dim = q.shape[-2:]
    scale, softcap = call.scale, call.softcap
    if scale is None:
        scale = head_dim**-0.5
    if softcap is None:
        scale *= LOG2_E
    else:
        scale, softcap = scale / softcap, softcap * LOG2_E
    if launch is None:
        launch = choose_launch(q, n_kv_heads, call.batch, call.n_queries, call.n_keys, call.window)
    lse, offsets = call.out.lse_ptr, sequences.offset_ptr
    table, tree_mask = sequences.block_table_ptr, sequences.tree_mask_ptr
    groups = (call.q, call.k, call.v, call.out, sequences, Scoring(scale, softcap, call.sinks))
    strides = (
        0 if lse is None else lse.stride(-2),
        0 if offsets is None or offsets.numel() == 1 else 1,
        0 if table is None else table.stride(0),
        0 if tree_mask is None else tree_mask.stride(0),
    )
    shape = (n_heads // n_kv_heads, head_dim, call.block_size, launch.block_m, launch.block_n)
    sizes = (call.n_queries, call.n_keys, call.query_offset)
    if isinstance(launch, PrefillLaunch):
        if call.max_prompts is None:
            n_blocks = -(-call.n_queries // launch.block_m) * call.batch
        else:  # each prompt's last block may be filled in part
            n_blocks = (len(q) + call.max_prompts * (launch.block_m - 1)) // launch.block_m
        _prefill(
            (n_blocks * n_heads,),
            (
                *(*groups, *strides, n_heads, call.batch, *sizes, call.window),
                *(call.causal, launch.heads_first, call.max_prompts is not None, *shape),
            ),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        return

    splits = launch.num_splits
    n_partials = call.batch * splits * call.n_queries * n_heads
    if splits > 1:
        size = n_partials * (head_dim + 1)
        partials = torch.empty(size, dtype=torch.float32, device=q.device)
        groups = (*groups[:3], Output(partials, None), *groups[4:])
    one_query = call.n_queries == 1 and tree_mask is None
    _decode(
        (call.batch * splits * n_kv_heads,),
        (
            *(*groups, *strides, n_kv_heads, *sizes, splits, call.window),
            *(call.causal, splits > 1, one_query, call.max_prompts is not None, *shape),
        ),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    if splits > 1:
        # two sizes only, so that a growing context compiles nothing new
        block_s = 16 if splits <= 16 else 64
        _merge(
            (call.batch * call.n_queries * n_heads,),
            (
                *(call.out, Sequences(cu_q_ptr=sequences.cu_q_ptr), partials, strides[0]),
                *(n_kv_heads, call.n_queries, splits, n_partials),
                *(n_heads // n_kv_heads, head_dim, block_s),
            ),
            num_warps=4,
        )


def choose_launch(
    q: torch.Tensor,
    n_kv_heads: int,
    batch: int,
    n_queries: int,
    n_keys: int,
    window: int | None,
) -> Launch:
    """Choose the kernel and its launch for up to ``n_queries`` queries per sequence."""
    device = device_of(q)
    head_dim, element_size = q.shape[-1], q.element_size()
    rows = n_queries * (q.shape[-2] // n_kv_heads)
    if rows > max_rows(element_size):
        return choose_prefill_launch(
            n_queries=n_queries, head_dim=head_dim, element_size=element_size, device=device
        )
    if window is not None:
        n_keys = min(n_keys, window + n_queries - 1)
    return choose_decode_launch(
        sequences=batch * n_kv_heads,
        rows=rows,
        key_blocks=-(-n_keys // 64),
        head_dim=head_dim,
        element_size=element_size,
        device=device,
    )
