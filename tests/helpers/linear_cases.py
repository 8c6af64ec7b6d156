"""Helpers for tests of linear layers: quantized layers, exact results, the tolerance."""

import pytest
import torch
from torch.nn.functional import linear

from llmfast_kernels.quantized_linear.formats import FORMATS
from llmfast_kernels.quantized_linear.reference import int4_linear_reference, int8_linear_reference

each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
each_kind = pytest.mark.parametrize("kind", ["symmetric", "zeros", "minima"])
each_bits = pytest.mark.parametrize("bits", [4, 8])

on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="wants a Hopper GPU",
    ),
]

REFERENCE = {4: int4_linear_reference, 8: int8_linear_reference}


def make(shape, dtype, device="cpu", kind="zeros", more=True, seed=0, bits=4):
    """Make an operation's arguments by name; its results are about 1."""
    tokens, k, n, group_size = shape
    gen = torch.Generator().manual_seed(seed)
    groups = -(-k // group_size)
    largest = 2**bits - 1
    codes = torch.randint(0, largest + 1, (n, k), generator=gen, dtype=torch.uint8)
    args = {
        "x": torch.randn(tokens, k, generator=gen).to(dtype),
        "packed": FORMATS[bits].pack(codes),
        "scales": ((torch.rand(n, groups, generator=gen) + 0.5) * 3 / largest / k**0.5).to(dtype),
    }
    if kind == "minima":
        minima = -largest / 2 * args["scales"] * (torch.rand(n, groups, generator=gen) + 0.5)
        args["minima"] = minima.to(dtype)
    if kind == "zeros":
        args["zeros"] = torch.randint(0, largest + 1, (n, groups), generator=gen, dtype=torch.uint8)
    if more:
        args["bias"] = torch.randn(n, generator=gen).to(dtype)
        args["residual"] = torch.randn(tokens, n, generator=gen).to(dtype)
    return {name: t.to(device) for name, t in args.items()} | {"group_size": group_size}


def in_float64(
    x, packed, scales, zeros=None, bias=None, *, group_size, minima=None, residual=None, bits=4
):
    weight = FORMATS[bits].dequantize(
        packed, scales, zeros, x.shape[-1], group_size, torch.float64, minima
    )
    y = linear(x.double(), weight, None if bias is None else bias.double())
    return y if residual is None else y + residual.double()


def assert_as_good(ours, reference, exact):
    """Assert the relative rule: at most twice the reference's own error, or four epsilons."""
    assert ours.dtype == reference.dtype and ours.shape == reference.shape
    error, own = ((y.double() - exact).square().mean().sqrt() for y in (ours, reference))
    floor = 4 * torch.finfo(ours.dtype).eps * exact.square().mean().sqrt()
    assert error <= max(2 * own, floor)  # false for NaN too


def skip_bfloat16_in_the_interpreter(device, dtype):
    """Skip a test whose products the interpreter cannot compute."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16 products, and truncates to bfloat16")
