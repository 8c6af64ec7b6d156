"""Run every kernel once or twice on odd shapes, for compute-sanitizer (``make gpu-test``).

This is a script, not a test: the sanitizer slows kernels a hundredfold, so cases are few and small.
With PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor is an allocation of its own, so the sanitizer
sees reads past its end. Arguments name dtypes; without arguments all three run.
"""

from __future__ import annotations

import functools
import itertools
import sys

import torch

import llmfast_kernels as ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def norms(dtype: torch.dtype) -> None:
    for rows, cols, unit_offset in itertools.product((1, 5), (67, 128, 4097), (False, True)):
        x, weight = randn(rows, cols, dtype=dtype), randn(cols, dtype=dtype)
        ops.rms_norm(x, weight, eps=1e-6, unit_offset=unit_offset)
        ops.add_rms_norm(x, randn(rows, cols, dtype=dtype), weight, eps=1e-6)


def activations(dtype: torch.dtype) -> None:
    for rows, cols in itertools.product((1, 5), (67, 1536)):
        for op in (ops.silu_mul, ops.gelu_tanh_mul, ops.gelu_mul):
            op(randn(rows, cols, dtype=dtype), randn(rows, cols, dtype=dtype))
            op(randn(rows, 2 * cols, dtype=dtype))


def int4_linears(dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        return
    for tokens, k, group_size in itertools.product((1, 17, 129), (200, 256), (32, 128)):
        codes = torch.randint(0, 16, (67, k), dtype=torch.uint8, device="cuda")
        groups = (67, -(-k // group_size))
        ops.int4_linear(
            randn(tokens, k, dtype=dtype),
            ops.pack_int4(codes),
            randn(*groups, dtype=dtype),
            torch.randint(0, 16, groups, dtype=torch.uint8, device="cuda"),
            group_size=group_size,
            residual=randn(tokens, 67, dtype=dtype),
        )
        ops.int4_linear(
            randn(tokens, k, dtype=dtype),
            ops.pack_int4(codes),
            randn(*groups, dtype=dtype),
            group_size=group_size,
            minima=randn(*groups, dtype=dtype),
        )
        ops.int4_linear(
            randn(tokens, k, dtype=dtype),
            ops.pack_int4(codes[:66]),
            randn(66, groups[1], dtype=dtype),
            group_size=group_size,
            activation="silu",
        )
    # enough rows that hundreds of tokens have tiles of their own, the last one not full; and
    # on Hopper tiles of one program, and of several that split their columns
    for tokens, k, n in ((129, 200, 6145), (129, 680, 208), (70, 4104, 208)):
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
        x, scales = randn(tokens, k, dtype=dtype), randn(n, -(-k // 64), dtype=dtype)
        ops.int4_linear(x, ops.pack_int4(codes), scales, group_size=64)


def int8_linears(dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        return
    for tokens, k, group_size in itertools.product((1, 17, 129), (200, 256), (32, 128, 0)):
        group_size = group_size or k
        codes = torch.randint(0, 256, (67, k), dtype=torch.uint8, device="cuda")
        packed = ops.pack_int8(codes)
        groups = (67, -(-k // group_size))
        x, scales = randn(tokens, k, dtype=dtype), randn(*groups, dtype=dtype)
        zeros = torch.randint(0, 256, groups, dtype=torch.uint8, device="cuda")
        residual = randn(tokens, 67, dtype=dtype)
        ops.int8_linear(x, packed, scales, zeros, group_size=group_size, residual=residual)
        ops.int8_linear(x, packed, scales, group_size=group_size, minima=scales)


def linears(dtype: torch.dtype) -> None:
    for tokens, k, n in itertools.product((1, 3, 17), (67, 576), (33, 1536)):
        x, bias = randn(tokens, k, dtype=dtype), randn(2 * n, dtype=dtype)
        weight = randn(2 * n, k, dtype=dtype)
        ops.dense_linear(x, weight, bias, residual=randn(tokens, 2 * n, dtype=dtype))
        ops.dense_linear(x, weight)
        ops.gated_linear(x, weight, bias, activation="gelu_tanh")
        ops.gated_linear(x, weight)


def steps(dtype: torch.dtype) -> None:
    for rows in (1, 3, 130):
        context = torch.arange(rows, device="cuda", dtype=torch.int32) % 33
        first_row = torch.zeros(rows, device="cuda", dtype=torch.int64)
        table = torch.zeros(rows, 3, device="cuda", dtype=torch.int32)
        _, _, context_len = ops.begin_step(context, first_row, table, block_size=16)
        for seen in (None, torch.zeros(rows, 11, device="cuda", dtype=torch.bool)):
            ops.end_step(
                first_row,
                torch.zeros_like(context),
                context_len,
                torch.tensor([5, -1, 7], device="cuda"),
                torch.tensor(3, device="cuda"),
                tokens=torch.empty_like(first_row),
                host_tokens=torch.empty_like(first_row),
                context=context,
                generated=torch.zeros_like(context),
                seen=seen,
            )


def attentions(dtype: torch.dtype) -> None:
    lengths = ((1, 333), (3, 67), (131, 259), (5, 3))
    for (queries, keys), head_dim in itertools.product(lengths, (64, 80)):
        q = randn(2, queries, 6, head_dim, dtype=dtype)
        k, v = (randn(2, keys, 2, head_dim, dtype=dtype) for _ in range(2))
        ops.flash_attention(q, k, v)
        ops.flash_attention(
            q,
            k,
            v,
            window=9,
            softcap=20.0,
            sinks=randn(6, dtype=dtype),
            key_start=torch.tensor([0, 2], device="cuda", dtype=torch.int32),
            key_end=torch.tensor([keys, keys - 1], device="cuda", dtype=torch.int32),
            query_offset=torch.tensor([keys - queries], device="cuda"),
            return_lse=True,
        )
    ends = torch.tensor([0, 3, 3, 70], device="cuda", dtype=torch.int32)
    q = randn(70, 6, 64, dtype=dtype)
    k, v = (randn(70, 2, 64, dtype=dtype) for _ in range(2))
    ops.flash_attention_varlen(
        q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=67, max_seqlen_k=67
    )


def paged_attentions(dtype: torch.dtype) -> None:
    cases = ((1, 333, 64, 16), (5, 67, 80, 64), (131, 259, 64, 64), (131, 259, 80, 16))
    for queries, context, head_dim, block_size in cases:
        count = -(-context // block_size)
        caches = [randn(2 * count, 2, block_size, head_dim, dtype=dtype) for _ in range(2)]
        table = torch.full((3, count), -1, device="cuda", dtype=torch.int32)
        table[::2] = torch.randperm(2 * count, device="cuda").view(2, count)
        starts = [0, queries, queries + 1, queries + 2]
        q, sinks = randn(starts[-1], 6, head_dim, dtype=dtype), randn(6, dtype=dtype)
        attend = functools.partial(
            ops.paged_attention,
            q,
            *caches,
            query_start=torch.tensor(starts, device="cuda", dtype=torch.int32),
            context_len=torch.tensor([context, 0, context - 3], device="cuda", dtype=torch.int32),
            block_table=table,
            max_query_len=queries,
        )
        attend()
        attend(window=9, softcap=20.0, sinks=sinks, return_lse=True)
        attend(max_prompts=2, return_lse=True)
        if queries <= 64:
            attend(tree_mask=torch.ones(len(q), queries, device="cuda", dtype=torch.bool).tril())


def ropes(dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 30, 7, 7, 2], device="cuda")
    for interleaved, rotary_dim in itertools.product((False, True), (64, 48)):
        cos, sin = (randn(31, rotary_dim // 2, dtype=dtype) for _ in range(2))
        qkv = randn(5, 10, 64, dtype=dtype)
        ops.apply_rope(qkv[:, :6], qkv[:, 6:8], cos, sin, positions, interleaved=interleaved)


def cache_writes(dtype: torch.dtype) -> None:
    for head_dim, block_size in ((64, 16), (80, 32)):
        caches = [randn(3, 2, block_size, head_dim, dtype=dtype) for _ in range(2)]
        slots = torch.tensor([0, 3 * block_size - 1, -1, 7, block_size], device="cuda")
        qkv = randn(5, 10, head_dim, dtype=dtype)
        ops.write_kv(qkv[:, 6:8], qkv[:, 8:], *caches, slots)


def rope_writes(dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 30, 7, 7, 2], device="cuda")
    cases = ((64, 64, True), (80, 32, True), (80, 80, False), (67, 0, True))
    for head_dim, rotary_dim, norm in cases:
        cos, sin = (randn(31, rotary_dim // 2, dtype=dtype) for _ in range(2))
        rotation = (cos, sin, positions) if rotary_dim else (None, None, None)
        weights = [randn(head_dim, dtype=dtype) if norm else None for _ in range(2)]
        caches = [randn(3, 2, 16, head_dim, dtype=dtype) for _ in range(2)]
        slots = torch.tensor([0, 47, -1, 7, 16], device="cuda")
        qkv = randn(5, 10 * head_dim, dtype=dtype)
        q, k, v = qkv.view(5, 10, head_dim).split([6, 2, 2], 1)
        for interleaved in (False, True):
            ops.rope_write_kv(
                *(q, k, v, *rotation, *caches, slots),
                interleaved=interleaved,
                q_norm=weights[0],
                k_norm=weights[1],
                eps=1e-6,
            )
        ops.rms_norm(qkv[:, :head_dim], randn(head_dim, dtype=dtype), eps=1e-6)  # strided rows


def samplings(dtype: torch.dtype) -> None:
    for batch, vocab in ((1, 7), (3, 5003)):
        logits = randn(batch, vocab, dtype=dtype)
        rows = {
            name: torch.full((batch,), value, device="cuda")
            for name, value in (("temperature", 0.7), ("top_p", 0.9), ("min_p", 0.01))
        }
        index = torch.arange(batch, device="cuda")
        ops.sample_tokens(logits, logprobs=3)
        # all tokens are equally likely, so the lists of candidates are long
        ops.sample_tokens(logits / 9, **rows, seeds=index, positions=index)
        ops.sample_tokens(logits, **rows, top_k=index + 5, seeds=index, positions=index, logprobs=0)


def main(names: list[str]) -> None:
    torch.manual_seed(0)
    for dtype in [getattr(torch, name) for name in names] or DTYPES:
        norms(dtype)
        activations(dtype)
        linears(dtype)
        int4_linears(dtype)
        int8_linears(dtype)
        steps(dtype)
        attentions(dtype)
        paged_attentions(dtype)
        ropes(dtype)
        cache_writes(dtype)
        rope_writes(dtype)
        samplings(dtype)
        torch.cuda.synchronize()
        print(f"{dtype}: every kernel ran", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
