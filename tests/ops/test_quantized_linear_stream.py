"""The stream main loop on Hopper, against float64."""

from functools import partial

import pytest
import torch

from guards import GuardedEmpty, guard_all
from linear_cases import (
    REFERENCE,
    assert_as_good,
    each_bits,
    each_dtype,
    in_float64,
    make,
    on_hopper,
)
from llmfast_kernels.common.device import INTERPRETER
from llmfast_kernels.linear.reference import ACTIVATIONS
from llmfast_kernels.quantized_linear import int4_linear, tables
from llmfast_kernels.quantized_linear.formats import FORMATS
from llmfast_kernels.quantized_linear.kernel import launch_quantized_linear
from llmfast_kernels.quantized_linear.launch import HOPPER_ROWS, stream_launch
from llmfast_kernels.quantized_linear.workspace import tickets

pytestmark = on_hopper
LAUNCH = {bits: partial(launch_quantized_linear, fmt=fmt) for bits, fmt in FORMATS.items()}


CONSTANTS = tables.CONSTANTS.of(INTERPRETER)  # an H100's


def stream(tokens, bits=4):
    return stream_launch(bits, tokens, CONSTANTS)


each_width = pytest.mark.parametrize("width", CONSTANTS.stream[4])  # tokens of a program
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
@each_width
@each_dtype
@each_kind
@each_bits
@pytest.mark.parametrize("more", [False, True], ids=["plain", "bias and residual"])
def test_it_matches_float64(shape, width, dtype, kind, bits, more):
    eighths, *layer = shape
    args = make((eighths * width // 8, *layer), dtype, "cuda", kind, more, bits=bits)
    launch = stream(width, bits)
    got = LAUNCH[bits](**args, launch=launch)
    assert_as_good(got, REFERENCE[bits](**args), in_float64(**args, bits=bits))
    assert not tickets(got.device, 1).any()
    for _ in range(10):  # nothing depends on which program arrives last
        assert torch.equal(LAUNCH[bits](**args, launch=launch), got)


@pytest.mark.parametrize("shape", [(3, 200, 2 * 37, 64), (8, 4096, 28672, 128)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@each_width
@each_dtype
def test_gate_and_up_in_one_launch(shape, activation, bias, width, dtype):
    args = make(shape, dtype, "cuda")
    del args["residual"]
    if not bias:
        del args["bias"]
    got = LAUNCH[4](**args, activation=activation, launch=stream(width))
    assert got.shape == (shape[0], shape[2] // 2)
    reference = REFERENCE[4](**args, activation=activation)
    assert_as_good(got, reference, ACTIVATIONS[activation](in_float64(**args)))


@each_dtype
@each_bits
def test_every_code_and_zero_point_is_exact(bits, dtype):
    """With one column at a time and a scale of 1, the output is the weight itself."""
    k, codes = 8, torch.arange(2**bits, dtype=torch.uint8)
    args = {
        "packed": FORMATS[bits].pack(codes[:, None].repeat(1, k)).cuda(),
        "zeros": codes.flip(0)[:, None].contiguous().cuda(),
        "scales": torch.ones(len(codes), 1, device="cuda", dtype=dtype),
        "x": torch.eye(k, device="cuda", dtype=dtype),
        "group_size": k,
    }
    got = LAUNCH[bits](**args, launch=stream(8, bits))
    wanted = codes.double() - codes.flip(0).double()
    assert torch.equal(got.cpu().double(), wanted.repeat(k, 1))


@each_width
@each_bits
def test_nothing_outside_the_tensors_is_read_or_written(width, bits, monkeypatch):
    empty = GuardedEmpty()
    args = make((3, 1000, 333, 64), torch.float16, "cuda", "zeros", bits=bits)
    reference, exact = REFERENCE[bits](**args), in_float64(**args, bits=bits)
    args = guard_all(args, 119)
    units = -(-333 // HOPPER_ROWS) * 4  # each has a program of its own
    monkeypatch.setattr(torch, "empty", empty)
    assert_as_good(LAUNCH[bits](**args, launch=stream(width, bits)), reference, exact)
    empty.assert_bands_are_whole(reference.numel(), units * 2 * HOPPER_ROWS * width)


@pytest.mark.parametrize("tokens", [8, 100, 256, 1024])
def test_a_chain_of_layers_is_captured_in_a_graph(tokens):
    """Each layer reads the previous one's outputs while its own weights are being loaded.

    The numbers of tokens also cover gemm, with columns split and not split.
    """
    layers = [
        make((tokens, 4096, 4096, 128), torch.bfloat16, "cuda", more=False, seed=seed)
        for seed in range(6)
    ]

    def chain(x, synchronize=False):
        for layer in layers:
            x = int4_linear(**layer | {"x": x})
            if synchronize:
                torch.cuda.synchronize()
        return x

    x = layers[0]["x"]
    chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(x)
    for seed in range(20):
        x.copy_(make((tokens, 4096, 16, 128), torch.bfloat16, "cuda", seed=100 + seed)["x"])
        wanted = chain(x, synchronize=True)
        graph.replay()
        assert torch.equal(got, wanted)
        assert torch.equal(chain(x), wanted)
