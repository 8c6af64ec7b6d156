"""The four linear layers of a decoder block against cuBLAS, in one graph.

pytest bench/bench_linear.py
"""

import pytest
import torch
from torch.nn.functional import linear

from llmfast.measure.shapes import config_of, linear_sizes
from llmfast_kernels import (
    dense_linear,
    gated_linear,
    int4_linear,
    int8_linear,
    pack_int4,
    pack_int8,
    silu_mul,
)

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128]
MANY_TOKENS = [256, 1024, 4096]  # of prompts; 16-bit layers are cuBLAS's there


def parametrize_tokens(tokens):
    return pytest.mark.parametrize("tokens", tokens, ids=lambda n: f"{n}tokens")


each_tokens = parametrize_tokens(TOKENS)
also_many_tokens = parametrize_tokens(TOKENS + MANY_TOKENS)


def sizes(shape):
    return linear_sizes(config_of(shape)).block


def make_inputs(shape, tokens, dtype):
    def randn(*size):
        return torch.randn(size, device="cuda", dtype=dtype)

    xs = [randn(tokens, k) for _, k in sizes(shape)]
    return *xs, *(randn(n, k) / k**0.5 for n, k in sizes(shape))


def block_of(layer):
    """The layers alone, each on an input of its own."""

    def run(*tensors):
        return [layer(x, weight) for x, weight in zip(tensors[:4], tensors[4:], strict=True)]

    return run


def fused(x, attended, h, middle, qkv, out, gate_up, down):
    """With what follows in a block: the residual's sums and the gated activation."""
    return (
        dense_linear(x, qkv),
        dense_linear(attended, out, residual=x),
        gated_linear(h, gate_up),
        dense_linear(middle, down, residual=h),
    )


def apart(x, attended, h, middle, qkv, out, gate_up, down):
    return (
        linear(x, qkv),
        linear(attended, out).add_(x),
        silu_mul(linear(h, gate_up)),
        linear(middle, down).add_(h),
    )


@each_tokens
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen3-8b", "mistral-7b"])
def bench_block(bench_op, shape, dtype, tokens):
    bench_op(
        "linear",
        f"shape={shape} weights={NAMES[dtype]} tokens={tokens}",
        {"llmfast": block_of(dense_linear), "cublas": block_of(linear)},
        lambda: make_inputs(shape, tokens, dtype),
        bytes_moved=sum(n * k for n, k in sizes(shape)) * dtype.itemsize,
    )


FORMS = {  # of four bits: the group size, and whether there are zero points
    "g128": (128, False),
    "g64": (64, False),
    "g64-zeros": (64, True),
    "g32": (32, False),
}


@also_many_tokens
@pytest.mark.parametrize("form", FORMS)
def bench_int4_block(bench_op, form, tokens):
    """Beside cuBLAS on 16-bit weights of the same shapes."""
    shape, dtype = "llama-3.1-8b", torch.bfloat16
    block, (group_size, with_zeros) = sizes(shape), FORMS[form]

    def inputs():
        dense = make_inputs(shape, tokens, dtype)
        packed, scales, zeros = [], [], []
        for n, k in block:
            codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
            packed.append(pack_int4(codes))
            groups = (n, k // group_size)
            scales.append(torch.rand(groups, device="cuda").to(dtype) / k**0.5)
            zeros.append(torch.randint(0, 16, groups, device="cuda", dtype=torch.uint8))
        return *dense, *packed, *scales, *(zeros if with_zeros else ())

    def int4(*tensors):
        xs, packed, scales = tensors[:4], tensors[8:12], tensors[12:16]
        zeros = tensors[16:] or [None] * 4
        return [
            int4_linear(*layer, group_size=group_size)
            for layer in zip(xs, packed, scales, zeros, strict=True)
        ]

    per_group = 6 if with_zeros else 4  # half bytes
    bench_op(
        "linear",
        f"shape={shape} weights=int4-{form} tokens={tokens}",
        {"llmfast": int4, "cublas": lambda *tensors: block_of(linear)(*tensors[:8])},
        inputs,
        bytes_moved=sum(n * k for n, k in block) // 2 * (group_size + per_group) // group_size,
    )


@each_tokens
def bench_block_with_epilogues(bench_op, tokens):
    shape, dtype = "llama-3.1-8b", torch.bfloat16
    bench_op(
        "linear",
        f"shape={shape} weights=bf16 tokens={tokens} with=epilogues",
        {"llmfast": fused, "cublas": apart},
        lambda: make_inputs(shape, tokens, dtype),
        bytes_moved=sum(n * k for n, k in sizes(shape)) * dtype.itemsize,
    )


@also_many_tokens
@pytest.mark.parametrize("group_size", [None, 128, 32], ids=["channel", "g128", "g32"])
def bench_int8_block(bench_op, group_size, tokens):
    """Beside cuBLAS on 16-bit weights of the same shapes."""
    shape, dtype = "llama-3.1-8b", torch.bfloat16
    block = sizes(shape)

    def inputs():
        codes = [
            pack_int8(torch.randint(0, 256, b, device="cuda", dtype=torch.uint8)) for b in block
        ]
        scales = [
            torch.rand(n, k // (group_size or k), device="cuda").to(dtype) / k**0.5
            for n, k in block
        ]
        return *make_inputs(shape, tokens, dtype), *codes, *scales

    def int8(*tensors):
        return [
            int8_linear(x, codes, scales, group_size=group_size or x.shape[-1])
            for x, codes, scales in zip(tensors[:4], tensors[8:12], tensors[12:], strict=True)
        ]

    bench_op(
        "linear",
        f"shape={shape} weights=int8-{f'g{group_size}' if group_size else 'channel'} "
        f"tokens={tokens}",
        {"llmfast": int8, "cublas": lambda *tensors: block_of(linear)(*tensors[:8])},
        inputs,
        bytes_moved=sum(n * (k + 2 * k // (group_size or k)) for n, k in block),
    )
