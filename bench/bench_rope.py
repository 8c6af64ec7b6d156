"""RoPE against PyTorch, eager and compiled, at the heads of Llama-3.1-8B and Qwen3-8B.

apply_rope beside transformers' own function, rope_write_kv beside separate operations.

pytest bench/bench_rope.py
"""

import pytest
import torch
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rope
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rope

from harness import DEVICE, sized
from llmfast_kernels.norm.reference import rms_norm_reference
from llmfast_kernels.rope import apply_rope, rope_write_kv
from llmfast_kernels.rope.reference import apply_rope_reference

HEADS, KV_HEADS, HEAD_DIM = sized((32, 8, 128), (4, 2, 16))
HALF = HEAD_DIM // 2
DTYPE = torch.bfloat16
BLOCK_SIZE = sized(64, 16)
DECODE = 64  # up to this many tokens, each belongs to another sequence and has its own block

pytestmark = pytest.mark.impls("llmfast", "eager", "torch.compile")
each_size = pytest.mark.parametrize(
    "tokens", sized([1, 64, 4096, 16384], [1, 8, 128]), ids=lambda n: f"{n}tokens"
)


def random(*shape):
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def impls(tokens, layer, interleaved):
    """Give the three one signature.

    transformers' function gets gathered rows of the tables, as in a model, which gathers them once
    for all layers. Ours gathers them itself.
    """
    angles = torch.rand(tokens, HALF, device=DEVICE)
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
    positions = torch.arange(tokens, device=DEVICE)
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
    """Count q and k read and written; per token a row of cos, a row of sin and a position."""
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
    """Return all slots of shuffled blocks, as in prefill, or one slot per block, as in decoding."""
    if tokens <= DECODE:
        offsets = torch.randint(BLOCK_SIZE, (tokens,), device=DEVICE)
        return torch.randperm(tokens, device=DEVICE) * BLOCK_SIZE + offsets
    blocks = torch.randperm(tokens // BLOCK_SIZE, device=DEVICE)[:, None] * BLOCK_SIZE
    return (blocks + torch.arange(BLOCK_SIZE, device=DEVICE)).flatten()


@each_size
@pytest.mark.parametrize("norm", [False, True], ids=["", "head_norm"])
def bench_rope_write_kv(bench_op, tokens, norm):
    angles = torch.rand(tokens, HALF, device=DEVICE)
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
    positions = torch.arange(tokens, device=DEVICE)
    q_norm, k_norm = (random(HEAD_DIM), random(HEAD_DIM)) if norm else (None, None)

    def ours(q, k, v, k_cache, v_cache, slots):
        weights = {"q_norm": q_norm, "k_norm": k_norm, "eps": 1e-6}
        return rope_write_kv(q, k, v, cos, sin, positions, k_cache, v_cache, slots, **weights)

    def separate(q, k, v, k_cache, v_cache, slots):
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
        caches = [torch.zeros(shape, device=DEVICE, dtype=DTYPE) for _ in range(2)]
        return *views, *caches, make_slots(tokens)

    # reads q, k and v and writes them; reads a row of cos and of sin, a position and a slot
    elements = 2 * (HEADS + 2 * KV_HEADS) * HEAD_DIM + 2 * HALF
    bench_op(
        "rope",
        f"tokens={tokens} heads={HEADS} kv_heads={KV_HEADS} dim={HEAD_DIM} dtype=bf16 "
        f"op=rope_write_kv{' norm=head' if norm else ''}",
        {
            "llmfast": ours,
            "eager": separate,
            "torch.compile": torch.compile(separate, dynamic=False),
        },
        make_inputs,
        tokens * (elements * DTYPE.itemsize + 2 * torch.int64.itemsize),
    )
