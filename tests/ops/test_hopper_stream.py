"""Quantized weights as a stream that all programs of a Hopper GPU share evenly."""

import pytest
import torch

from guards import GuardedEmpty, guard_all
from llmfast_kernels.linear import int4_linear
from llmfast_kernels.linear.hopper_launch import ROWS, STREAM, HopperLaunch
from llmfast_kernels.linear.int4_kernel import launch_int4_linear
from llmfast_kernels.linear.int8_kernel import launch_int8_linear
from llmfast_kernels.linear.reference import ACTIVATIONS
from llmfast_kernels.linear.workspace import tickets
from quantized_cases import (
    PACK,
    REFERENCE,
    assert_as_good,
    each_bits,
    each_dtype,
    in_float64,
    make,
    on_hopper,
)

pytestmark = on_hopper
LAUNCH = {4: launch_int4_linear, 8: launch_int8_linear}
each_launch = pytest.mark.parametrize(
    "launch",
    [HopperLaunch("stream", tokens) for tokens in STREAM[4]],
    ids=lambda launch: launch.tokens,
)
each_kind = pytest.mark.parametrize("kind", ["symmetric", "zeros"])
# tokens of eight, k, n, group size: rows and columns that end within a unit; one unit for some
# programs or for all, columns shared by two programs, by seven, by many
SHAPES = [
    (1, 128, 5, 128),
    (3, 200, 70, 64),
    (8, 1000, 1000, 1000),
    (5, 4096, 6144, 128),
    (7, 4096, 28672, 64),
    (2, 14336, 4096, 128),
    (6, 14336, 260, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@each_launch
@each_dtype
@each_kind
@each_bits
@pytest.mark.parametrize("more", [False, True], ids=["plain", "bias and residual"])
def test_it_matches_float64(shape, launch, dtype, kind, bits, more):
    eighths, *layer = shape
    args = make((eighths * launch.tokens // 8, *layer), dtype, "cuda", kind, more, bits=bits)
    got = LAUNCH[bits](**args, _launch=launch)
    assert_as_good(got, REFERENCE[bits](**args), in_float64(**args, bits=bits))
    assert not tickets(got.device).any()
    for _ in range(10):  # nothing depends on who comes last
        assert torch.equal(LAUNCH[bits](**args, _launch=launch), got)


@pytest.mark.parametrize("shape", [(3, 200, 2 * 37, 64), (8, 4096, 28672, 128)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@each_launch
@each_dtype
def test_gate_and_up_in_one_launch(shape, activation, bias, launch, dtype):
    args = make(shape, dtype, "cuda")
    del args["residual"]
    if not bias:
        del args["bias"]
    got = launch_int4_linear(**args, activation=activation, _launch=launch)
    assert got.shape == (shape[0], shape[2] // 2)
    reference = REFERENCE[4](**args, activation=activation)
    assert_as_good(got, reference, ACTIVATIONS[activation](in_float64(**args)))


@each_dtype
@each_bits
def test_every_code_and_zero_point_is_exact(bits, dtype):
    """One column at a time, a scale of 1: the weight itself comes out."""
    k, codes = 8, torch.arange(2**bits, dtype=torch.uint8)
    args = {
        "packed": PACK[bits](codes[:, None].repeat(1, k)).cuda(),
        "zeros": codes.flip(0)[:, None].contiguous().cuda(),
        "scales": torch.ones(len(codes), 1, device="cuda", dtype=dtype),
        "x": torch.eye(k, device="cuda", dtype=dtype),
        "group_size": k,
    }
    got = LAUNCH[bits](**args, _launch=HopperLaunch("stream", 8))
    wanted = codes.double() - codes.flip(0).double()
    assert torch.equal(got.cpu().double(), wanted.repeat(k, 1))


@each_launch
@each_bits
def test_nothing_outside_the_tensors_is_read_or_written(launch, bits, monkeypatch):
    empty = GuardedEmpty()
    args = make((3, 1000, 333, 64), torch.float16, "cuda", "zeros", bits=bits)
    reference, exact = REFERENCE[bits](**args), in_float64(**args, bits=bits)
    args = guard_all(args, 119)
    units = -(-333 // ROWS) * 4  # each has a program of its own
    monkeypatch.setattr(torch, "empty", empty)
    assert_as_good(LAUNCH[bits](**args, _launch=launch), reference, exact)
    empty.assert_bands_are_whole(reference.numel(), units * 2 * ROWS * launch.tokens)


@pytest.mark.parametrize("tokens", [8, 100, 256, 1024])
def test_a_chain_of_layers_is_captured_in_a_graph(tokens):
    """Each reads what the one before has written, while its own weights are on their way. In tiles,
    too, whose columns are split or not."""
    layers = [
        make((tokens, 4096, 4096, 128), torch.bfloat16, "cuda", more=False, seed=seed)
        for seed in range(6)
    ]

    def chain(x, apart=False):
        for layer in layers:
            x = int4_linear(**layer | {"x": x})
            if apart:
                torch.cuda.synchronize()
        return x

    x = layers[0]["x"]
    chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(x)
    for seed in range(20):
        x.copy_(make((tokens, 4096, 16, 128), torch.bfloat16, "cuda", seed=100 + seed)["x"])
        wanted = chain(x, apart=True)
        graph.replay()
        assert torch.equal(got, wanted)
        assert torch.equal(chain(x), wanted)
