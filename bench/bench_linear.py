"""The four linear layers of a decoder block in 16 bits against cuBLAS, in one graph.

pytest bench/bench_linear.py
"""

import pytest
import torch
from torch.nn.functional import linear

from harness import DEVICE, sized
from llmfast.measure.shapes import config_of, linear_sizes
from llmfast_kernels import dense_linear, gated_linear, silu_mul

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
SHAPE = sized("llama-3.1-8b", "smollm2-135m")
SHAPES = sized(["llama-3.1-8b", "qwen3-8b", "mistral-7b"], [SHAPE])
TOKENS = sized([1, 2, 4, 8, 16, 32, 64, 128], [1, 8])

pytestmark = pytest.mark.impls("llmfast", "cublas")
each_tokens = pytest.mark.parametrize("tokens", TOKENS, ids=lambda n: f"{n}tokens")


def sizes(shape):
    return linear_sizes(config_of(shape)).block


def make_inputs(shape, tokens, dtype):
    def randn(*size):
        return torch.randn(size, device=DEVICE, dtype=dtype)

    xs = [randn(tokens, k) for _, k in sizes(shape)]
    return *xs, *(randn(n, k) / k**0.5 for n, k in sizes(shape))


def block_of(layer):
    """Return a function that runs the four layers, each on an input of its own."""

    def run(*tensors):
        return [layer(x, weight) for x, weight in zip(tensors[:4], tensors[4:], strict=True)]

    return run


def fused(x, attended, h, middle, qkv, out, gate_up, down):
    """Run the layers with their epilogues: residual sums and the gated activation."""
    return (
        dense_linear(x, qkv),
        dense_linear(attended, out, residual=x),
        gated_linear(h, gate_up),
        dense_linear(middle, down, residual=h),
    )


def unfused(x, attended, h, middle, qkv, out, gate_up, down):
    return (
        linear(x, qkv),
        linear(attended, out).add_(x),
        silu_mul(linear(h, gate_up)),
        linear(middle, down).add_(h),
    )


@each_tokens
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("shape", SHAPES)
def bench_block(bench_op, shape, dtype, tokens):
    bench_op(
        "linear",
        f"shape={shape} weights={NAMES[dtype]} tokens={tokens}",
        {"llmfast": block_of(dense_linear), "cublas": block_of(linear)},
        lambda: make_inputs(shape, tokens, dtype),
        bytes_moved=sum(n * k for n, k in sizes(shape)) * dtype.itemsize,
    )


@each_tokens
def bench_block_with_epilogues(bench_op, tokens):
    shape, dtype = SHAPE, torch.bfloat16
    bench_op(
        "linear",
        f"shape={shape} weights=bf16 tokens={tokens} with=epilogues",
        {"llmfast": fused, "cublas": unfused},
        lambda: make_inputs(shape, tokens, dtype),
        bytes_moved=sum(n * k for n, k in sizes(shape)) * dtype.itemsize,
    )
