"""The four linear layers of a decoder block in four and eight bits, in one graph.

The peer is cuBLAS on 16-bit weights of the same shapes. Rows go to the suite of bench_linear.py.

    pytest bench/bench_quantized_linear.py
"""

import pytest
import torch
from torch.nn.functional import linear

from harness import DEVICE, sized
from llmfast.measure.shapes import config_of, linear_sizes
from llmfast_kernels import int4_linear, int8_linear, pack_int4, pack_int8

SHAPE, DTYPE = sized("llama-3.1-8b", "qwen3-0.6b"), torch.bfloat16
TOKENS = sized([1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096], [1, 8])
FORMS = {  # four bits: the group size, and whether there are zero points
    "g128": (128, False),
    "g64": (64, False),
    "g64-zeros": (64, True),
    "g32": (32, False),
}

pytestmark = pytest.mark.impls("llmfast", "cublas")
each_tokens = pytest.mark.parametrize("tokens", TOKENS, ids=lambda n: f"{n}tokens")


def sizes():
    return linear_sizes(config_of(SHAPE)).block


def make_dense(tokens):
    """Make four inputs and four 16-bit weights."""
    xs = [torch.randn(tokens, k, device=DEVICE, dtype=DTYPE) for _, k in sizes()]
    ws = [torch.randn(n, k, device=DEVICE, dtype=DTYPE) / k**0.5 for n, k in sizes()]
    return *xs, *ws


def cublas(*tensors):
    return [linear(x, weight) for x, weight in zip(tensors[:4], tensors[4:8], strict=True)]


@each_tokens
@pytest.mark.parametrize("form", FORMS)
def bench_int4_block(bench_op, form, tokens):
    group_size, with_zeros = FORMS[form]

    def inputs():
        packed, scales, zeros = [], [], []
        for n, k in sizes():
            codes = torch.randint(0, 16, (n, k), device=DEVICE, dtype=torch.uint8)
            packed.append(pack_int4(codes))
            groups = (n, k // group_size)
            scales.append(torch.rand(groups, device=DEVICE).to(DTYPE) / k**0.5)
            zeros.append(torch.randint(0, 16, groups, device=DEVICE, dtype=torch.uint8))
        return *make_dense(tokens), *packed, *scales, *(zeros if with_zeros else ())

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
        f"shape={SHAPE} weights=int4-{form} tokens={tokens}",
        {"llmfast": int4, "cublas": cublas},
        inputs,
        bytes_moved=sum(n * k for n, k in sizes()) // 2 * (group_size + per_group) // group_size,
    )


@each_tokens
@pytest.mark.parametrize("group_size", [None, 128, 32], ids=["channel", "g128", "g32"])
def bench_int8_block(bench_op, group_size, tokens):
    def inputs():
        packed = [
            pack_int8(torch.randint(0, 256, size, device=DEVICE, dtype=torch.uint8))
            for size in sizes()
        ]
        scales = [
            torch.rand(n, k // (group_size or k), device=DEVICE).to(DTYPE) / k**0.5
            for n, k in sizes()
        ]
        return *make_dense(tokens), *packed, *scales

    def int8(*tensors):
        return [
            int8_linear(x, codes, scales, group_size=group_size or x.shape[-1])
            for x, codes, scales in zip(tensors[:4], tensors[8:12], tensors[12:], strict=True)
        ]

    bench_op(
        "linear",
        f"shape={SHAPE} weights=int8-{f'g{group_size}' if group_size else 'channel'} "
        f"tokens={tokens}",
        {"llmfast": int8, "cublas": cublas},
        inputs,
        bytes_moved=sum(n * (k + 2 * k // (group_size or k)) for n, k in sizes()),
    )
