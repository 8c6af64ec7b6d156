"""The launch of attention. Arguments are checked by op.py; here they are taken as good."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..common.device import device_of
from ..common.launch import CachedLauncher
from .decode import DecodeLaunch, _decode_kernel, _merge_kernel, choose_decode_launch, max_rows
from .loop import LOG2_E, pad_head_dim
from .prefill import PrefillLaunch, _prefill_kernel, choose_prefill_launch

Launch = PrefillLaunch | DecodeLaunch
Launches = tuple[DecodeLaunch, PrefillLaunch]  # of sequences with one query, and with more
_prefill = CachedLauncher(_prefill_kernel)
_decode, _merge = (CachedLauncher(k, pdl=True) for k in (_decode_kernel, _merge_kernel))


class _Paged(NamedTuple):
    """What there is with a paged cache only."""

    block_table: torch.Tensor | None = None
    context_len: torch.Tensor | None = None
    tree_mask: torch.Tensor | None = None


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
    _launch: Launch | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    batch, n_queries, n_heads, head_dim = q.shape
    n_keys = k.shape[1]
    offset_tensor: torch.Tensor | None = None
    stride_offset = 0
    if isinstance(query_offset, torch.Tensor):
        offset_tensor, query_offset = query_offset, 0
        stride_offset = 1 if offset_tensor.numel() > 1 else 0
    elif query_offset is None:
        query_offset = n_keys - n_queries
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = None
    if return_lse:
        lse = torch.empty((batch, n_heads, n_queries), dtype=torch.float32, device=q.device)
    _run(
        q, k, v, out, lse, sinks, key_start, key_end, offset_tensor, None, None, _Paged(),
        (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        (n_queries * n_heads * head_dim, n_heads * n_queries, n_queries),
        stride_offset, batch, n_queries, n_keys, query_offset, causal, scale, window, softcap,
        _launch,
    )  # fmt: skip
    return out if lse is None else (out, lse)


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
    _launch: Launch | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = None
    if return_lse:
        lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    _run(
        q, k, v, out, lse, sinks, None, None, None, cu_seqlens_q, cu_seqlens_k, _Paged(),
        (0, *q.stride()[:2], 0, *k.stride()[:2], 0, *v.stride()[:2]),
        (0, 0, q.shape[0]),
        0, cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k, 0, causal, scale, window,
        softcap, _launch,
    )  # fmt: skip
    return out if lse is None else (out, lse)


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
    _launch: Launch | Launches | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    batch, max_blocks = block_table.shape
    n_keys = max_blocks * k_cache.shape[2]
    if max_context_len is not None:
        n_keys = min(n_keys, max_context_len)
    k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)  # heads where flash_attention has them
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = None
    if return_lse:
        lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)

    def run(n_queries: int, launch: Launch | None, max_prompts: int | None) -> None:
        _run(
            q, k, v, out, lse, sinks, None, None, None, query_start, None,
            _Paged(block_table, context_len, tree_mask),
            (0, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3]),
            (0, 0, q.shape[0]),
            0, batch, n_queries, n_keys, 0, tree_mask is None, scale, window, softcap, launch,
            max_prompts,
        )  # fmt: skip

    if isinstance(_launch, tuple):
        single, several = _launch
        run(1, single, max_prompts)
        run(max_query_len, several, max_prompts)
    elif _launch is not None or max_prompts is None or not _apart(q, k, max_query_len):
        run(max_query_len, _launch, None)
    else:
        with _beside(q):
            run(1, None, max_prompts)
        run(max_query_len, None, max_prompts)
        _join(q)
    return out if lse is None else (out, lse)


@functools.cache
def _side_stream(stream: int, device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _beside(q: torch.Tensor) -> Iterator[None]:
    """What is launched within runs beside what comes after it, up to :func:`_join`.

    Single queries wait for memory and prompts for the tensor cores, and when the last programs of
    a prompt leave multiprocessors idle those of the others take them.
    """
    if not q.is_cuda:
        yield
        return
    stream = torch.cuda.current_stream(q.device)
    side = _side_stream(stream.cuda_stream, q.device)
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        yield


def _join(q: torch.Tensor) -> None:
    if q.is_cuda:
        stream = torch.cuda.current_stream(q.device)
        stream.wait_stream(_side_stream(stream.cuda_stream, q.device))


def _apart(q: torch.Tensor, k: torch.Tensor, n_queries: int) -> bool:
    """Whether one query is the decode kernel's and ``n_queries`` are the prefill kernel's."""
    group = q.shape[-2] // max(k.shape[-2], 1)
    return group <= max_rows(q.element_size()) < n_queries * group


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    key_start: torch.Tensor | None,
    key_end: torch.Tensor | None,
    offset_tensor: torch.Tensor | None,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    paged: _Paged,  # with a table k and v are [num_blocks, block_size, Hkv, D]
    strides_in: tuple[int, ...],  # of q, k, v: batch, row, head
    strides_out: tuple[int, int, int],  # out's batch, lse's batch and head
    stride_offset: int,
    batch: int,
    n_queries: int,
    n_keys: int,
    query_offset: int,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    launch: Launch | None,
    max_prompts: int | None = None,  # sequences with more than one query; None: n_queries says it
) -> None:
    n_heads, head_dim = q.shape[-2:]
    n_kv_heads = k.shape[-2]
    group = n_heads // n_kv_heads
    if scale is None:
        scale = head_dim**-0.5
    if softcap is None:
        scale *= LOG2_E
    else:
        scale, softcap = scale / softcap, softcap * LOG2_E
    block_table, _, tree_mask = paged
    block_size = None if block_table is None else k.shape[1]
    if launch is None:
        launch = _choose(q, batch, n_queries, n_keys, n_kv_heads, group, window)
    optional = (sinks, key_start, key_end, offset_tensor, cu_q, cu_k, *paged)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    stride_table = 0 if block_table is None else block_table.stride(0)
    stride_tree = 0 if tree_mask is None else tree_mask.stride(0)
    strides = (*strides_in, *strides_out, stride_offset, stride_table, stride_tree)
    block_d = pad_head_dim(head_dim)
    sizes: tuple[float | None, ...]
    constexprs: tuple[int | None, ...]
    mixed = max_prompts is not None
    shape = (group, head_dim, block_size, launch.block_m, launch.block_n, block_d)
    if isinstance(launch, PrefillLaunch):
        if max_prompts is None:
            n_blocks = -(-n_queries // launch.block_m) * batch
        else:  # each prompt's last block may be filled in part
            n_blocks = (len(q) + max_prompts * (launch.block_m - 1)) // launch.block_m
        grid = n_blocks * n_heads
        sizes = (n_heads, batch, n_queries, n_keys, query_offset, scale, window, softcap)
        constexprs = (causal, launch.heads_first, mixed, *shape)
        _prefill(
            (grid,),
            (q, k, v, out, lse, *optional, *strides, *sizes, *constexprs),
            **options,
        )
        return

    splits = launch.num_splits
    n_partials = batch * splits * n_queries * n_heads
    target = out
    if splits > 1:
        size = n_partials * (head_dim + 1)
        target = torch.empty(size, dtype=torch.float32, device=q.device)
    sizes = (n_kv_heads, n_queries, n_keys, query_offset, splits, scale, window, softcap)
    constexprs = (causal, splits > 1, n_queries == 1 and tree_mask is None, mixed, *shape)
    _decode(
        (batch * splits * n_kv_heads,),
        (q, k, v, target, lse, *optional, *strides, *sizes, *constexprs),
        **options,
    )
    if splits > 1:
        # two sizes only, so that a growing context compiles nothing new
        sizes = (n_kv_heads, n_queries, splits, n_partials)
        constexprs = (group, head_dim, 16 if splits <= 16 else 64, block_d)
        _merge(
            (batch * n_queries * n_heads,),
            (target, out, lse, cu_q, *strides_out, *sizes, *constexprs),
            num_warps=4,
        )


def _choose(
    q: torch.Tensor,
    batch: int,
    n_queries: int,
    n_keys: int,
    n_kv_heads: int,
    group: int,
    window: int | None,
) -> Launch:
    device = device_of(q)
    head_dim, element_size = q.shape[-1], q.element_size()
    if n_queries * group > max_rows(element_size):
        return choose_prefill_launch(
            n_queries=n_queries,
            head_dim=head_dim,
            element_size=element_size,
            shared_memory=device.shared_memory,
        )
    if window is not None:
        n_keys = min(n_keys, window + n_queries - 1)
    return choose_decode_launch(
        sequences=batch * n_kv_heads,
        rows=n_queries * group,
        key_blocks=-(-n_keys // 64),
        head_dim=head_dim,
        element_size=element_size,
        sm_count=device.sm_count,
        shared_memory=device.shared_memory,
    )
