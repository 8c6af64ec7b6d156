"""Layers with four-bit weights for tests, and what they must come out at."""

import pytest
import torch
from torch.nn.functional import linear

from llmfast_kernels.linear import pack_int4
from llmfast_kernels.linear.int4_layout import dequantize_int4

each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
each_kind = pytest.mark.parametrize("kind", ["symmetric", "zeros", "minima"])


def make(shape, dtype, device="cpu", kind="zeros", more=True, seed=0):
    """The operation's arguments by name; results are about 1."""
    tokens, k, n, group_size = shape
    gen = torch.Generator().manual_seed(seed)
    groups = -(-k // group_size)
    args = {
        "x": torch.randn(tokens, k, generator=gen).to(dtype),
        "packed": pack_int4(torch.randint(0, 16, (n, k), generator=gen, dtype=torch.uint8)),
        "scales": ((torch.rand(n, groups, generator=gen) + 0.5) / 5 / k**0.5).to(dtype),
    }
    if kind == "minima":
        args["minima"] = (-7.5 * args["scales"] * (torch.rand(n, groups, generator=gen) + 0.5)).to(
            dtype
        )
    if kind == "zeros":
        args["zeros"] = torch.randint(0, 16, (n, groups), generator=gen, dtype=torch.uint8)
    if more:
        args["bias"] = torch.randn(n, generator=gen).to(dtype)
        args["residual"] = torch.randn(tokens, n, generator=gen).to(dtype)
    return {name: t.to(device) for name, t in args.items()} | {"group_size": group_size}


def in_float64(x, packed, scales, zeros=None, bias=None, *, group_size, minima=None, residual=None):
    weight = dequantize_int4(packed, scales, zeros, x.shape[-1], group_size, torch.float64, minima)
    y = linear(x.double(), weight, None if bias is None else bias.double())
    return y if residual is None else y + residual.double()


def assert_as_good(ours, reference, exact):
    """The relative rule: at most twice the reference's own error, or four epsilons."""
    assert ours.dtype == reference.dtype and ours.shape == reference.shape
    error, own = ((y.double() - exact).square().mean().sqrt() for y in (ours, reference))
    floor = 4 * torch.finfo(ours.dtype).eps * exact.square().mean().sqrt()
    assert error <= max(2 * own, floor)  # false for NaN too
