"""Four-bit weights as a stream that all programs of a Hopper GPU share evenly."""

import pytest
import torch

from guards import GuardedEmpty, guarded
from int4_cases import assert_as_good, each_dtype, in_float64, make
from llmfast_kernels.linear import int4_linear, pack_int4
from llmfast_kernels.linear.int4_kernel import launch_int4_linear
from llmfast_kernels.linear.int4_launch import STREAM, Int4Launch
from llmfast_kernels.linear.reference import ACTIVATIONS, int4_linear_reference
from llmfast_kernels.linear.workspace import tickets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="wants a Hopper GPU",
    ),
]
LAUNCHES = [
    Int4Launch("stream", tokens, rows, 1, 4, stages) for tokens, (rows, stages, _) in STREAM.items()
]
each_launch = pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: launch.block_m)
each_kind = pytest.mark.parametrize("kind", ["symmetric", "zeros"])
# tokens, k, n, group size: rows and columns that end within a unit; one unit for some programs or
# for all, columns shared by two programs, by seven, by sixty
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
@pytest.mark.parametrize("more", [False, True], ids=["plain", "bias and residual"])
def test_it_matches_float64(shape, launch, dtype, kind, more):
    tokens, *layer = shape
    args = make((tokens * launch.block_m // 8 or 1, *layer), dtype, "cuda", kind, more)
    got = launch_int4_linear(**args, _launch=launch)
    assert_as_good(got, int4_linear_reference(**args), in_float64(**args))
    assert not tickets(got.device).any()
    for _ in range(10):  # nothing depends on who comes last
        assert torch.equal(launch_int4_linear(**args, _launch=launch), got)


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
    reference = int4_linear_reference(**args, activation=activation)
    assert_as_good(got, reference, ACTIVATIONS[activation](in_float64(**args)))


@each_launch
@each_dtype
def test_every_code_and_zero_point_is_exact(launch, dtype):
    """One column at a time, a scale of 1: the weight itself comes out."""
    k = launch.block_m
    codes = torch.arange(k, dtype=torch.uint8).repeat(16, 1) % 16
    zeros = torch.arange(16, dtype=torch.uint8)[:, None]
    args = make((k, k, 16, k), dtype, "cuda", more=False)
    args |= {
        "packed": pack_int4(codes).cuda(),
        "zeros": zeros.cuda(),
        "scales": torch.ones(16, 1, device="cuda", dtype=dtype),
        "x": torch.eye(k, device="cuda", dtype=dtype),
    }
    got = launch_int4_linear(**args, _launch=launch)
    assert torch.equal(got.cpu().double(), codes.T.double() - zeros.double().T)


@each_launch
def test_nothing_outside_the_tensors_is_read_or_written(launch, monkeypatch):
    empty = GuardedEmpty()
    args = make((3, 1000, 333, 64), torch.float16, "cuda", "zeros")
    reference, exact = int4_linear_reference(**args), in_float64(**args)
    for name, value in args.items():
        if isinstance(value, torch.Tensor):
            band = float("nan") if value.is_floating_point() else 119
            args[name] = guarded(value, band)[0]
    units = -(-333 // launch.block_n) * 4  # each has a program of its own
    monkeypatch.setattr(torch, "empty", empty)
    assert_as_good(launch_int4_linear(**args, _launch=launch), reference, exact)
    empty.assert_bands_are_whole(reference.numel(), units * 2 * launch.block_n * launch.block_m)


def test_a_chain_of_layers_is_captured_in_a_graph():
    """Each reads what the one before has written, while its own weights are on their way."""
    layers = [
        make((8, 4096, 4096, 128), torch.bfloat16, "cuda", more=False, seed=seed)
        for seed in range(6)
    ]

    def chain(x):
        for layer in layers:
            x = int4_linear(**layer | {"x": x})
        return x

    x = layers[0]["x"]
    chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(x)
    for seed in range(20):
        x.copy_(make((8, 4096, 16, 128), torch.bfloat16, "cuda", seed=100 + seed)["x"])
        wanted = chain(x)
        graph.replay()
        assert torch.equal(got, wanted)
        torch.cuda.synchronize()
        apart = x
        for layer in layers:
            apart = int4_linear(**layer | {"x": apart})
            torch.cuda.synchronize()
        assert torch.equal(got, apart)
