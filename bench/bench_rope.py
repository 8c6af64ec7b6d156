"""rope against transformers' own function, eager and compiled, at the heads of Llama-3.1-8B.

pytest bench/bench_rope.py
"""

import pytest
import torch
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rope
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rope

from llmfast_kernels.rope import apply_rope

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
HALF = HEAD_DIM // 2
DTYPE = torch.bfloat16

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
