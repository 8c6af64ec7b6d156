"""rope against PyTorch, eager and compiled, at the heads of Llama-3.1-8B and Qwen3-8B.

apply_rope beside transformers' own function, rope_write_kv beside the operations in a row.

pytest bench/bench_rope.py
"""

import pytest
import torch
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rope
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rope

from llmfast_kernels.norm.reference import rms_norm_reference
from llmfast_kernels.rope import apply_rope, rope_write_kv
from llmfast_kernels.rope.reference import apply_rope_reference

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
HALF = HEAD_DIM // 2
DTYPE = torch.bfloat16
BLOCK_SIZE = 64
DECODE = 64  # up to so many tokens each is of another sequence, in a block of its own

each_size = pytest.mark.parametrize("tokens", [1, 64, 4096, 16384], ids=lambda n: f"{n}tokens")


def random(*shape):
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def impls(tokens, layer, interleaved):
    """The three under one signature. The layer is given its rows of the tables, as in a model,
    which gathers them once for all layers; ours gathers them itself."""
    angles = torch.rand(tokens, HALF, device="cuda")
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
    positions = torch.arange(tokens, device="cuda")
    layer_cos, layer_sin = (torch.cat((t, t), -1)[None] for t in (cos, sin))

    def transformers_layer(q, k):  # [1, heads, tokens, head_dim], a view of the projection
        q, k = (t[None].transpose(1, 2) for t in (q, k))
        return layer(q, k, layer_cos, layer_sin)

    return {
        "llmfast": lambda q, k: apply_rope(q, k, cos, sin, positions, interleaved=interleaved),
        "eager": transformers_layer,
        "torch.compile": torch.compile(transformers_layer, dynamic=False),
    }


def bytes_moved(tokens):
    """Reads q and k, writes both; reads a row of cos and of sin and a position for each token."""
    elements = 2 * (HEADS + KV_HEADS) * HEAD_DIM + 2 * HALF
    return tokens * (elements * DTYPE.itemsize + torch.int64.itemsize)


@each_size
def bench_rope(bench_op, tokens):
    bench_op(
        "rope",
        f"tokens={tokens} heads={HEADS} kv_heads={KV_HEADS} dim={HEAD_DIM} dtype=bf16",
        impls(tokens, llama_rope, interleaved=False),
        lambda: (random(tokens, HEADS, HEAD_DIM), random(tokens, KV_HEADS, HEAD_DIM)),
        bytes_moved(tokens),
    )


@each_size
def bench_rope_of_a_merged_projection(bench_op, tokens):
    def views():
        qkv = random(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM)
        return qkv[:, :HEADS], qkv[:, HEADS : HEADS + KV_HEADS]

    bench_op(
        "rope",
        f"tokens={tokens} heads={HEADS} kv_heads={KV_HEADS} dim={HEAD_DIM} dtype=bf16 "
        "layout=merged",
        impls(tokens, llama_rope, interleaved=False),
        views,
        bytes_moved(tokens),
    )


@each_size
def bench_rope_interleaved(bench_op, tokens):
    bench_op(
        "rope",
        f"tokens={tokens} heads={HEADS} kv_heads={KV_HEADS} dim={HEAD_DIM} dtype=bf16 "
        "pairs=interleaved",
        impls(tokens, glm_rope, interleaved=True),
        lambda: (random(tokens, HEADS, HEAD_DIM), random(tokens, KV_HEADS, HEAD_DIM)),
        bytes_moved(tokens),
    )


def make_slots(tokens):
    """All slots of shuffled blocks, as in a prefill; one slot of each block, as in decoding."""
    if tokens <= DECODE:
        offsets = torch.randint(BLOCK_SIZE, (tokens,), device="cuda")
        return torch.randperm(tokens, device="cuda") * BLOCK_SIZE + offsets
    blocks = torch.randperm(tokens // BLOCK_SIZE, device="cuda")[:, None] * BLOCK_SIZE
    return (blocks + torch.arange(BLOCK_SIZE, device="cuda")).flatten()


@each_size
@pytest.mark.parametrize("norm", [False, True], ids=["", "head_norm"])
def bench_rope_write_kv(bench_op, tokens, norm):
    angles = torch.rand(tokens, HALF, device="cuda")
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
    positions = torch.arange(tokens, device="cuda")
    q_norm, k_norm = (random(HEAD_DIM), random(HEAD_DIM)) if norm else (None, None)

    def ours(q, k, v, k_cache, v_cache, slots):
        weights = {"q_norm": q_norm, "k_norm": k_norm, "eps": 1e-6}
        return rope_write_kv(q, k, v, cos, sin, positions, k_cache, v_cache, slots, **weights)

    def in_a_row(q, k, v, k_cache, v_cache, slots):
        if norm:
            q = rms_norm_reference(q, q_norm, eps=1e-6)
            k = rms_norm_reference(k, k_norm, eps=1e-6)
        q, k = apply_rope_reference(q, k, cos, sin, positions)
        # write_kv's reference without its search for skipped tokens, which no CUDA graph can hold
        blocks, offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        k_cache[blocks, :, offsets] = k
        v_cache[blocks, :, offsets] = v
        return q

    def make_inputs():
        qkv = random(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM)
        views = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)  # as in a model
        n_blocks = tokens if tokens <= DECODE else tokens // BLOCK_SIZE
        shape = (n_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        caches = [torch.zeros(shape, device="cuda", dtype=DTYPE) for _ in range(2)]
        return *views, *caches, make_slots(tokens)

    # reads q, k and v and writes them; reads a row of cos and of sin, a position and a slot
    elements = 2 * (HEADS + 2 * KV_HEADS) * HEAD_DIM + 2 * HALF
    bench_op(
        "rope",
        f"tokens={tokens} heads={HEADS} kv_heads={KV_HEADS} dim={HEAD_DIM} dtype=bf16 "
        f"op=rope_write_kv{' norm=head' if norm else ''}",
        {
            "llmfast": ours,
            "eager": in_a_row,
            "torch.compile": torch.compile(in_a_row, dynamic=False),
        },
        make_inputs,
        tokens * (elements * DTYPE.itemsize + 2 * torch.int64.itemsize),
    )
