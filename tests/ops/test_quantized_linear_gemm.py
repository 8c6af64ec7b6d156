"""The gemm main loop on Hopper, against float64."""

from functools import partial

import pytest
import torch

from guards import GuardedEmpty, guard_all
from linear_cases import (
    REFERENCE,
    assert_as_good,
    each_bits,
    each_dtype,
    each_kind,
    in_float64,
    make,
    on_hopper,
)
from llmfast_kernels.linear.reference import ACTIVATIONS
from llmfast_kernels.quantized_linear import int4_linear
from llmfast_kernels.quantized_linear.formats import FORMATS
from llmfast_kernels.quantized_linear.kernel import launch_quantized_linear
from llmfast_kernels.quantized_linear.kernels.dequantize import launch_dequantize
from llmfast_kernels.quantized_linear.launch import GEMM_STAGES, HOPPER_ROWS, Launch
from llmfast_kernels.quantized_linear.workspace import tickets

pytestmark = on_hopper
LAUNCH = {bits: partial(launch_quantized_linear, fmt=fmt) for bits, fmt in FORMATS.items()}


def gemm(tile, bits=4):
    tokens, splits = tile
    stages = GEMM_STAGES[bits][tokens]
    return Launch("gemm", tokens, 2 * HOPPER_ROWS, splits=splits, num_stages=stages)


def tiles(*given):
    """Parametrize a test by tokens of a tile and splits of its columns."""
    return pytest.mark.parametrize(
        "tile", given, ids=lambda tile: f"{tile[0]}{'-split' * (tile[1] > 1)}"
    )


each_tile = tiles((128, 1), (128, 3), (256, 1))
each_whole_tile = tiles((128, 1), (256, 1))  # with an activation columns are not split
# tokens, k, n, group size: tiles that are not full, columns that end within a chunk or a group
SHAPES = [
    (1, 640, 16, 128),
    (129, 1000, 48, 64),
    (300, 1032, 1008, 128),
    (257, 4096, 6144, 128),
    (513, 1000, 336, 1000),
    (1024, 14336, 144, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@each_tile
@each_dtype
@each_kind
@each_bits
@pytest.mark.parametrize("more", [False, True], ids=["plain", "bias and residual"])
def test_it_matches_float64(shape, tile, dtype, kind, bits, more):
    args = make(shape, dtype, "cuda", kind, more, bits=bits)
    got = LAUNCH[bits](**args, launch=gemm(tile, bits))
    assert_as_good(got, REFERENCE[bits](**args), in_float64(**args, bits=bits))
    assert not tickets(got.device, 1).any()


@each_tile
@each_dtype
@each_kind
def test_four_bits_in_groups_of_32(tile, dtype, kind):
    args = make((300, 1032, 1008, 32), dtype, "cuda", kind)
    got = LAUNCH[4](**args, launch=gemm(tile))
    assert_as_good(got, REFERENCE[4](**args), in_float64(**args))


@pytest.mark.parametrize("shape", [(300, 640, 2 * 40, 32), (257, 4096, 2 * 2000, 128)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@each_whole_tile
@each_dtype
def test_gate_and_up_meet_in_shared_memory(shape, activation, bias, tile, dtype):
    args = make(shape, dtype, "cuda")
    del args["residual"]
    if not bias:
        del args["bias"]
    got = LAUNCH[4](**args, activation=activation, launch=gemm(tile))
    assert got.shape == (shape[0], shape[2] // 2)
    reference = REFERENCE[4](**args, activation=activation)
    assert_as_good(got, reference, ACTIVATIONS[activation](in_float64(**args)))


@pytest.mark.parametrize("kind", ["symmetric", "zeros"])
@pytest.mark.parametrize("group_size", [64, 128, 640])
@each_tile
@each_dtype
@each_bits
def test_its_weights_are_the_dequantized_ones(kind, group_size, tile, dtype, bits):
    """With one column at a time, the output is the weight itself, bit for bit."""
    k, n = 640, 208
    args = make((k, k, n, group_size), dtype, "cuda", kind, more=False, bits=bits)
    args["x"] = torch.eye(k, dtype=dtype, device="cuda")
    weight = torch.empty(n, k, dtype=dtype, device="cuda")
    given = (args["packed"], args["scales"], args.get("zeros"), None, weight)
    launch_dequantize(*given, fmt=FORMATS[bits], group_size=group_size)
    assert torch.equal(LAUNCH[bits](**args, launch=gemm(tile, bits)).T, weight)


@pytest.mark.parametrize("activation", [None, "silu"])
@each_whole_tile
def test_programs_with_several_tiles_give_the_same_each_time(tile, activation):
    """The ring continues from tile to tile; few columns make tiles follow each other soonest."""
    _assert_the_same_each_time((1500, 640, 8192, 128), tile, activation)


@pytest.mark.parametrize("shape", [(200, 640, 8192, 128), (256, 14336, 1024, 64)], ids=str)
@tiles((128, 2), (128, 3), (128, 5))
def test_nothing_depends_on_which_program_arrives_last(shape, tile):
    _assert_the_same_each_time(shape, tile, None)


def _assert_the_same_each_time(shape, tile, activation):
    launch = gemm(tile)
    args = make(shape, torch.bfloat16, "cuda", more=False)
    wanted = LAUNCH[4](**args, activation=activation, launch=launch)
    reference = REFERENCE[4](**args, activation=activation)
    exact = in_float64(**args)
    assert_as_good(wanted, reference, exact if activation is None else ACTIVATIONS["silu"](exact))
    for _ in range(50):
        got = LAUNCH[4](**args, activation=activation, launch=launch)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", ["zeros", "minima"])
@each_tile
@each_bits
def test_nothing_outside_the_tensors_is_read_or_written(kind, tile, bits, monkeypatch):
    empty = GuardedEmpty()
    args = make((130, 1000, 336, 64), torch.float16, "cuda", kind, bits=bits)
    reference, exact = REFERENCE[bits](**args), in_float64(**args, bits=bits)
    args = guard_all(args, 119)
    monkeypatch.setattr(torch, "empty", empty)
    assert_as_good(LAUNCH[bits](**args, launch=gemm(tile, bits)), reference, exact)
    sizes = [reference.numel()]
    tokens, splits = tile
    if splits > 1:
        number = -(-130 // tokens) * -(-336 // (2 * HOPPER_ROWS))
        sizes.append(splits * number * 2 * HOPPER_ROWS * tokens)
    empty.assert_bands_are_whole(*sizes)


@pytest.mark.parametrize("odd", ["x", "residual", "n"])
def test_tensors_that_tma_does_not_take_run_another_main_loop(odd):
    tokens, k, n = 300, 1024, 4096 + (8 if odd == "n" else 0)
    args = make((tokens, k, n, 128), torch.float16, "cuda")
    if odd != "n":
        value = args[odd]
        other = torch.empty(value.numel() + 1, dtype=value.dtype, device="cuda")[1:]
        args[odd] = other.view_as(value).copy_(value)
    assert_as_good(int4_linear(**args), REFERENCE[4](**args), in_float64(**args))
