"""Quantized weights for many tokens on Hopper, where parts of a program run beside each other."""

import pytest
import torch

from guards import GuardedEmpty, guard_all
from llmfast_kernels.linear import int4_linear
from llmfast_kernels.linear.hopper_launch import ROWS, HopperLaunch
from llmfast_kernels.linear.int4_kernel import launch_dequantize_int4, launch_int4_linear
from llmfast_kernels.linear.int8_kernel import launch_dequantize_int8, launch_int8_linear
from llmfast_kernels.linear.reference import ACTIVATIONS
from llmfast_kernels.linear.workspace import tickets
from quantized_cases import (
    REFERENCE,
    assert_as_good,
    each_bits,
    each_dtype,
    each_kind,
    in_float64,
    make,
    on_hopper,
)

pytestmark = on_hopper
LAUNCH = {4: launch_int4_linear, 8: launch_int8_linear}
DEQUANTIZE = {4: launch_dequantize_int4, 8: launch_dequantize_int8}


def launches(*given):
    return pytest.mark.parametrize(
        "launch",
        [HopperLaunch("tiles", tokens, splits) for tokens, splits in given],
        ids=lambda launch: f"{launch.tokens}{'-split' * (launch.splits > 1)}",
    )


each_launch = launches((128, 1), (128, 3), (256, 1))
each_whole_launch = launches((128, 1), (256, 1))  # with an activation columns are not split
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
@each_launch
@each_dtype
@each_kind
@each_bits
@pytest.mark.parametrize("more", [False, True], ids=["plain", "bias and residual"])
def test_it_matches_float64(shape, launch, dtype, kind, bits, more):
    args = make(shape, dtype, "cuda", kind, more, bits=bits)
    got = LAUNCH[bits](**args, _launch=launch)
    assert_as_good(got, REFERENCE[bits](**args), in_float64(**args, bits=bits))
    assert not tickets(got.device).any()


@each_launch
@each_dtype
@each_kind
def test_four_bits_in_groups_of_32(launch, dtype, kind):
    args = make((300, 1032, 1008, 32), dtype, "cuda", kind)
    got = launch_int4_linear(**args, _launch=launch)
    assert_as_good(got, REFERENCE[4](**args), in_float64(**args))


@pytest.mark.parametrize("shape", [(300, 640, 2 * 40, 32), (257, 4096, 2 * 2000, 128)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@each_whole_launch
@each_dtype
def test_gate_and_up_meet_in_shared_memory(shape, activation, bias, launch, dtype):
    args = make(shape, dtype, "cuda")
    del args["residual"]
    if not bias:
        del args["bias"]
    got = launch_int4_linear(**args, activation=activation, _launch=launch)
    assert got.shape == (shape[0], shape[2] // 2)
    reference = REFERENCE[4](**args, activation=activation)
    assert_as_good(got, reference, ACTIVATIONS[activation](in_float64(**args)))


@pytest.mark.parametrize("kind", ["symmetric", "zeros"])
@pytest.mark.parametrize("group_size", [64, 128, 640])
@each_launch
@each_dtype
@each_bits
def test_its_weights_are_the_dequantized_ones(kind, group_size, launch, dtype, bits):
    """To the bit: one column at a time the weight itself comes out."""
    k, n = 640, 208
    args = make((k, k, n, group_size), dtype, "cuda", kind, more=False, bits=bits)
    args["x"] = torch.eye(k, dtype=dtype, device="cuda")
    weight = torch.empty(n, k, dtype=dtype, device="cuda")
    given = (args["packed"], args["scales"], args.get("zeros"), None, weight)
    DEQUANTIZE[bits](*given, group_size=group_size)
    assert torch.equal(LAUNCH[bits](**args, _launch=launch).T, weight)


@pytest.mark.parametrize("activation", [None, "silu"])
@each_whole_launch
def test_programs_with_several_tiles_give_the_same_each_time(launch, activation):
    """The ring of stages goes on from tile to tile; the fewest columns make them follow soonest."""
    _assert_the_same_each_time((1500, 640, 8192, 128), launch, activation)


@pytest.mark.parametrize("shape", [(200, 640, 8192, 128), (256, 14336, 1024, 64)], ids=str)
@launches((128, 2), (128, 3), (128, 5))
def test_nothing_depends_on_who_comes_last(shape, launch):
    _assert_the_same_each_time(shape, launch, None)


def _assert_the_same_each_time(shape, launch, activation):
    args = make(shape, torch.bfloat16, "cuda", more=False)
    wanted = launch_int4_linear(**args, activation=activation, _launch=launch)
    reference = REFERENCE[4](**args, activation=activation)
    exact = in_float64(**args)
    assert_as_good(wanted, reference, exact if activation is None else ACTIVATIONS["silu"](exact))
    for _ in range(50):
        got = launch_int4_linear(**args, activation=activation, _launch=launch)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", ["zeros", "minima"])
@each_launch
@each_bits
def test_nothing_outside_the_tensors_is_read_or_written(kind, launch, bits, monkeypatch):
    empty = GuardedEmpty()
    args = make((130, 1000, 336, 64), torch.float16, "cuda", kind, bits=bits)
    reference, exact = REFERENCE[bits](**args), in_float64(**args, bits=bits)
    args = guard_all(args, 119)
    monkeypatch.setattr(torch, "empty", empty)
    assert_as_good(LAUNCH[bits](**args, _launch=launch), reference, exact)
    sizes = [reference.numel()]
    if launch.splits > 1:
        tiles = -(-130 // launch.tokens) * -(-336 // (2 * ROWS))
        sizes.append(launch.splits * tiles * 2 * ROWS * launch.tokens)
    empty.assert_bands_are_whole(*sizes)


@pytest.mark.parametrize("odd", ["x", "residual", "n"])
def test_what_tma_does_not_take_goes_another_way(odd):
    tokens, k, n = 300, 1024, 4096 + (8 if odd == "n" else 0)
    args = make((tokens, k, n, 128), torch.float16, "cuda")
    if odd != "n":
        value = args[odd]
        other = torch.empty(value.numel() + 1, dtype=value.dtype, device="cuda")[1:]
        args[odd] = other.view_as(value).copy_(value)
    assert_as_good(int4_linear(**args), REFERENCE[4](**args), in_float64(**args))
