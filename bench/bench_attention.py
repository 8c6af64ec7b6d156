"""Attention against cuDNN and FlashAttention-2, as PyTorch ships them.

Prefill is causal, with 16,384 tokens in total; it counts 4 * D operations for each query and key
below the diagonal. Decode is one query over the cache; its bytes are K and V, each read once. With
a paged cache in shuffled blocks, `contiguous` and the peers compute the same on contiguous keys.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness import DEVICE, sized
from llmfast_kernels.attention import flash_attention, paged_attention

HEADS, KV_HEADS = sized((32, 8), (4, 2))
TOKENS = sized(16384, 256)  # of a prefill, all sequences together
BLOCK_SIZE = 64  # of the paged cache
DECODE = sized(  # batch, context
    [
        (1, 1024),
        (1, 8192),
        (1, 32768),
        (1, 131072),
        (8, 4096),
        (32, 2048),
        (64, 4096),
        (128, 1024),
        (256, 2048),
    ],
    [(1, 128), (3, 64)],
)


def make(batch: int, heads: int, seq: int, dim: int) -> torch.Tensor:
    """Make a tensor of [B, H, L, D] in memory, as transformers and PyTorch hold it."""
    return torch.randn(batch, heads, seq, dim, device=DEVICE, dtype=torch.bfloat16)


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return flash_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def sdpa(backend: SDPBackend, causal: bool) -> Callable[..., torch.Tensor]:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return run


def impls(causal: bool) -> dict[str, Callable[..., torch.Tensor]]:
    return {
        "llmfast": ours,
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION, causal),
        "flash2": sdpa(SDPBackend.FLASH_ATTENTION, causal),
    }


@pytest.mark.impls("llmfast", "cudnn", "flash2")
@pytest.mark.parametrize("seq", sized([512, 1024, 2048, 4096, 8192, 16384], [64, 256]))
@pytest.mark.parametrize("dim", [64, 128])
def bench_prefill(bench_op, dim, seq):
    batch = TOKENS // seq

    def make_inputs():
        k, v = make(batch, KV_HEADS, seq, dim), make(batch, KV_HEADS, seq, dim)
        return make(batch, HEADS, seq, dim), k, v

    bench_op(
        "prefill",
        f"heads={HEADS} kv_heads={KV_HEADS} dim={dim} seq={seq} batch={batch} tier=portable",
        impls(causal=True),
        make_inputs,
        flops=4 * batch * HEADS * seq * seq * dim / 2,
    )


@pytest.mark.impls("llmfast", "cudnn", "flash2")
@pytest.mark.parametrize(("batch", "context"), DECODE, ids=lambda n: str(n))
def bench_decode(bench_op, batch, context):
    dim = 128

    def make_inputs():
        k, v = make(batch, KV_HEADS, context, dim), make(batch, KV_HEADS, context, dim)
        return make(batch, HEADS, 1, dim), k, v

    bench_op(
        "attention_decode",
        f"heads={HEADS} kv_heads={KV_HEADS} dim={dim} kv=bf16 layout=contiguous "
        f"batch={batch} context={context}",
        # one query sees every key: a causal mask from the top left would leave it the first
        impls(causal=False),
        make_inputs,
        bytes_moved=2 * batch * KV_HEADS * context * dim * torch.bfloat16.itemsize,
    )


def make_paged(batch: int, queries: int, context: int, dim: int) -> tuple[torch.Tensor, ...]:
    """Make queries, contiguous keys and values, and a paged cache of as many in shuffled blocks."""
    q = make(batch, HEADS, queries, dim)
    k, v = make(batch, KV_HEADS, context, dim), make(batch, KV_HEADS, context, dim)
    blocks = batch * context // BLOCK_SIZE
    k_cache, v_cache = (
        make(blocks, KV_HEADS, BLOCK_SIZE, dim),
        make(blocks, KV_HEADS, BLOCK_SIZE, dim),
    )
    table = torch.randperm(blocks, device=DEVICE, dtype=torch.int32).view(batch, -1)
    starts = torch.arange(batch + 1, device=DEVICE, dtype=torch.int32) * queries
    lengths = torch.full((batch,), context, device=DEVICE, dtype=torch.int32)
    flat = q.transpose(1, 2).reshape(-1, HEADS, dim)
    return q, k, v, flat, k_cache, v_cache, starts, lengths, table


def paged_impls(causal: bool) -> dict[str, Callable[..., torch.Tensor]]:
    def paged(q, k, v, flat, k_cache, v_cache, starts, lengths, table):
        return paged_attention(
            flat,
            k_cache,
            v_cache,
            query_start=starts,
            context_len=lengths,
            block_table=table,
            max_query_len=q.shape[2],
        )

    def contiguous(impl):
        return lambda q, k, v, *_: impl(q, k, v)

    others = impls(causal)
    return {
        "llmfast": paged,
        "contiguous": contiguous(others["llmfast"]),
        "cudnn": contiguous(others["cudnn"]),
    }


ORDERS = {"heads-first": (0, 1, 2, 3), "tokens-first": (0, 2, 1, 3)}  # within a block


@pytest.mark.impls("llmfast")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block_size", sized([16, 32, 64, 128], [16, 64]))
@pytest.mark.parametrize(
    ("batch", "queries", "context"),
    sized([(1, 1, 8192), (64, 1, 4096), (2, 8192, 8192)], [(2, 1, 128), (2, 128, 128)]),
)
def bench_layouts(bench_op, batch, queries, context, block_size, order):
    """Time block sizes and orders of heads and tokens within a block: docs/ops/kv_cache.md."""
    dim, blocks = 128, batch * context // block_size

    def cache():
        shape = (blocks, KV_HEADS, block_size, dim)
        in_memory = [shape[axis] for axis in ORDERS[order]]
        return torch.randn(in_memory, device=DEVICE, dtype=torch.bfloat16).permute(ORDERS[order])

    def make_inputs():
        flat = torch.randn(batch * queries, HEADS, dim, device=DEVICE, dtype=torch.bfloat16)
        table = torch.randperm(blocks, device=DEVICE, dtype=torch.int32).view(batch, -1)
        starts = torch.arange(batch + 1, device=DEVICE, dtype=torch.int32) * queries
        lengths = torch.full((batch,), context, device=DEVICE, dtype=torch.int32)
        return flat, cache(), cache(), starts, lengths, table

    def paged(flat, k_cache, v_cache, starts, lengths, table):
        return paged_attention(
            flat,
            k_cache,
            v_cache,
            query_start=starts,
            context_len=lengths,
            block_table=table,
            max_query_len=queries,
        )

    heads = f"heads={HEADS} kv_heads={KV_HEADS} dim={dim}"
    layout = f"layout=paged-{block_size} order={order}"
    if queries == 1:
        case = f"{heads} kv=bf16 {layout} batch={batch} context={context}"
    else:
        case = f"{heads} seq={queries} batch={batch} tier=portable {layout}"
    bench_op(
        "attention_decode" if queries == 1 else "prefill",
        case,
        {"llmfast": paged},
        make_inputs,
        bytes_moved=2 * batch * KV_HEADS * context * dim * torch.bfloat16.itemsize,
        flops=4 * batch * HEADS * queries * context * dim / 2,
    )


@pytest.mark.impls("llmfast", "contiguous", "cudnn")
@pytest.mark.parametrize("seq", sized([2048, 8192], [128]))
def bench_paged_prefill(bench_op, seq):
    batch, dim = TOKENS // seq, 128
    bench_op(
        "prefill",
        f"heads={HEADS} kv_heads={KV_HEADS} dim={dim} seq={seq} batch={batch} tier=portable "
        f"layout=paged-{BLOCK_SIZE}",
        paged_impls(causal=True),
        lambda: make_paged(batch, seq, seq, dim),
        flops=4 * batch * HEADS * seq * seq * dim / 2,
    )


@pytest.mark.impls("llmfast", "contiguous", "cudnn")
@pytest.mark.parametrize(("batch", "context"), DECODE, ids=lambda n: str(n))
def bench_paged_decode(bench_op, batch, context):
    dim = 128
    bench_op(
        "attention_decode",
        f"heads={HEADS} kv_heads={KV_HEADS} dim={dim} kv=bf16 layout=paged-{BLOCK_SIZE} "
        f"batch={batch} context={context}",
        paged_impls(causal=False),
        lambda: make_paged(batch, 1, context, dim),
        bytes_moved=2 * batch * KV_HEADS * context * dim * torch.bfloat16.itemsize,
    )
