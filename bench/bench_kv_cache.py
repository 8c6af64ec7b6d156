"""write_kv against PyTorch's indexed assignment, eager and compiled, for Llama-3.1-8B.

pytest bench/bench_kv_cache.py
"""

import pytest
import torch

from harness import DEVICE, sized
from llmfast_kernels.kv_cache import write_kv

HEADS, KV_HEADS, DIM = sized((32, 8, 128), (4, 2, 16))
DTYPE = torch.bfloat16
DECODE = 64  # up to this many tokens, each belongs to another sequence and has its own block


def index_put(k, v, k_cache, v_cache, slots):
    """Run the reference without its search for skipped tokens, which CUDA graphs cannot capture."""
    block_size = k_cache.shape[2]
    blocks, offsets = slots // block_size, slots % block_size
    k_cache[blocks, :, offsets] = k
    v_cache[blocks, :, offsets] = v


def make_slots(tokens, block_size):
    """Return all slots of shuffled blocks, as in prefill, or one slot per block, as in decoding."""
    if tokens <= DECODE:
        offsets = torch.randint(block_size, (tokens,), device=DEVICE)
        return torch.randperm(tokens, device=DEVICE) * block_size + offsets
    blocks = torch.randperm(tokens // block_size, device=DEVICE)[:, None] * block_size
    return (blocks + torch.arange(block_size, device=DEVICE)).flatten()


@pytest.mark.impls("llmfast", "eager", "torch.compile")
@pytest.mark.parametrize("block_size", [16, 64], ids=lambda n: f"block{n}")
@pytest.mark.parametrize(
    "tokens", sized([1, 64, 4096, 16384], [1, 8, 128]), ids=lambda n: f"{n}tokens"
)
def bench_write_kv(bench_op, tokens, block_size):
    def make_inputs():
        width = HEADS + 2 * KV_HEADS
        qkv = torch.randn(tokens, width, DIM, device=DEVICE, dtype=DTYPE)
        _, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)  # views, as in a model
        slots = make_slots(tokens, block_size)
        n_blocks = tokens if tokens <= DECODE else tokens // block_size
        shape = (n_blocks, KV_HEADS, block_size, DIM)
        caches = [torch.zeros(shape, device=DEVICE, dtype=DTYPE) for _ in range(2)]
        return k, v, *caches, slots

    bench_op(
        "kv_cache",
        f"tokens={tokens} kv_heads={KV_HEADS} dim={DIM} block_size={block_size} dtype=bf16 "
        "op=write_kv",
        {
            "llmfast": write_kv,
            "eager": index_put,
            "torch.compile": torch.compile(index_put, dynamic=False),
        },
        make_inputs,
        # reads k and v, writes both, and reads the slots
        4 * tokens * KV_HEADS * DIM * DTYPE.itemsize + tokens * 8,
    )
