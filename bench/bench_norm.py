"""The norms against eager PyTorch and torch.compile, at the sizes of Llama-3.1-8B.

pytest bench/bench_norm.py
"""

import pytest
import torch

from harness import DEVICE, sized
from llmfast_kernels.norm import add_rms_norm, rms_norm
from llmfast_kernels.norm.reference import add_rms_norm_reference, rms_norm_reference

EPS = 1e-6
WIDTH, HEADS, HEAD_DIM = sized((4096, 32, 128), (64, 4, 16))
DTYPE = torch.bfloat16

pytestmark = pytest.mark.impls("llmfast", "eager", "torch.compile")
each_size = pytest.mark.parametrize(
    "tokens", sized([1, 64, 4096, 16384], [1, 8]), ids=lambda n: f"{n}tokens"
)


def impls(ours, reference, weight):
    """Give the three one signature; torch.compile compiles for the one shape, its best case."""
    compiled = torch.compile(reference, dynamic=False)
    by_name = {"llmfast": ours, "eager": reference, "torch.compile": compiled}
    return {
        name: lambda *inputs, f=function: f(*inputs, weight, eps=EPS)
        for name, function in by_name.items()
    }


def random(*shape):
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


@each_size
def bench_rms_norm(bench_op, tokens):
    weight = random(WIDTH)
    bench_op(
        "norm",
        f"tokens={tokens} width={WIDTH} dtype=bf16 op=rms_norm",
        impls(rms_norm, rms_norm_reference, weight),
        lambda: (random(tokens, WIDTH),),
        # reads x, writes y
        2 * tokens * WIDTH * DTYPE.itemsize + weight.nbytes,
    )


@each_size
def bench_add_rms_norm(bench_op, tokens):
    weight = random(WIDTH)
    bench_op(
        "norm",
        f"tokens={tokens} width={WIDTH} dtype=bf16 op=add_rms_norm",
        impls(add_rms_norm, add_rms_norm_reference, weight),
        lambda: (random(tokens, WIDTH), random(tokens, WIDTH)),
        # reads x and residual, writes y and the sum
        4 * tokens * WIDTH * DTYPE.itemsize + weight.nbytes,
    )


@each_size
def bench_head_norm(bench_op, tokens):
    weight = random(HEAD_DIM)
    bench_op(
        "norm",
        f"tokens={tokens} heads={HEADS} width={HEAD_DIM} dtype=bf16 op=head_norm",
        impls(rms_norm, rms_norm_reference, weight),
        lambda: (random(tokens, HEADS, HEAD_DIM),),
        # reads x, writes y
        2 * tokens * HEADS * HEAD_DIM * DTYPE.itemsize + weight.nbytes,
    )


@each_size
def bench_norm_of_a_merged_projection(bench_op, tokens):
    weight = random(WIDTH)
    bench_op(
        "norm",
        f"tokens={tokens} width={WIDTH} dtype=bf16 layout=merged op=rms_norm",
        impls(rms_norm, rms_norm_reference, weight),
        # the queries of a merged projection with 8 heads of keys and of values
        lambda: (random(tokens, WIDTH + 16 * HEAD_DIM)[:, :WIDTH],),
        2 * tokens * WIDTH * DTYPE.itemsize + weight.nbytes,
    )
