"""Linear layers with four-bit weights: the kernels for any GPU, against float64."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guards import BAND, GuardedEmpty, guard_all, guarded
from linear_cases import (
    assert_as_good,
    each_dtype,
    each_kind,
    in_float64,
    make,
    skip_bfloat16_in_the_interpreter,
)
from llmfast_kernels.common.device import INTERPRETER
from llmfast_kernels.linear.reference import ACTIVATIONS
from llmfast_kernels.quantized_linear import int4_linear, pack_int4, unpack_int4
from llmfast_kernels.quantized_linear.formats import CHUNK, INT4
from llmfast_kernels.quantized_linear.kernel import launch_quantized_linear
from llmfast_kernels.quantized_linear.kernels.dequantize import launch_dequantize
from llmfast_kernels.quantized_linear.launch import GEMV_COLUMNS, Launch, max_tokens
from llmfast_kernels.quantized_linear.reference import int4_linear_reference

launch_int4_linear = partial(launch_quantized_linear, fmt=INT4)
MAX_TOKENS = max_tokens(4, False, INTERPRETER)
TILES = Launch("tiles", 32, 16, CHUNK, num_warps=2, num_stages=2)
SCALED_TILES = Launch("scaled_tiles", 32, 16, CHUNK, num_warps=2, num_stages=2)
GEMV = Launch("gemv", 1, 8, GEMV_COLUMNS, num_warps=2)
# tokens, k, n, group size: odd rows, k on either side of a chunk, groups cut short, all columns
SHAPES = [
    (1, 128, 16, 128),
    (1, 576, 5, 64),
    (3, 256, 33, 32),
    (2, 200, 20, 128),
    (5, 72, 17, 32),
    (1, 320, 16, 320),
    (17, 96, 31, 96),
    (1, 1, 1, 32),
]

on_cuda = torch.cuda.is_available()
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
each_tile = pytest.mark.parametrize("launch", [TILES, SCALED_TILES], ids=lambda launch: launch.tier)


@each_shape
@each_kind
def test_reference_is_the_formula(shape, kind):
    args = make(shape, torch.float64, kind=kind)
    codes = unpack_int4(args["packed"], shape[1])
    got = int4_linear_reference(**args)
    group_size = args["group_size"]
    for t in range(min(shape[0], 2)):
        for row in range(min(shape[2], 3)):
            total = args["bias"][row] + args["residual"][t, row]
            for column in range(shape[1]):
                g = column // group_size
                zero = {"symmetric": 8, "minima": 0}.get(kind)
                zero = int(args["zeros"][row, g]) if zero is None else zero
                weight = args["scales"][row, g] * (int(codes[row, column]) - zero)
                if kind == "minima":
                    weight = weight + args["minima"][row, g]
                total = total + weight * args["x"][t, column]
            torch.testing.assert_close(got[t, row], total)


@each_shape
@each_dtype
@each_kind
@each_tile
@pytest.mark.parametrize("more", [False, True], ids=["plain", "bias and residual"])
def test_kernel_matches_float64(shape, dtype, kind, launch, more, device):
    skip_bfloat16_in_the_interpreter(device, dtype)
    args = make(shape, dtype, device, kind, more)
    got = launch_int4_linear(**args, launch=launch)
    assert got.is_contiguous()
    assert_as_good(got, int4_linear_reference(**args), in_float64(**args))


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # no example changes a fixture
)
@given(
    tokens=st.integers(1, 20),
    k=st.integers(1, 300),
    n=st.integers(1, 40),
    group_size=st.sampled_from([32, 64, 128, 0]),
    kind=st.sampled_from(["symmetric", "zeros", "minima"]),
    launch=st.sampled_from([TILES, SCALED_TILES]),
)
def test_kernel_matches_at_any_shape(device, tokens, k, n, group_size, kind, launch):
    args = make((tokens, k, n, group_size or k), torch.float16, device, kind)
    got = launch_int4_linear(**args, launch=launch)
    assert_as_good(got, int4_linear_reference(**args), in_float64(**args))


# tokens, k, n, group size, splits: the last one has fewer columns, or none; tiles are not full
SPLITS = [(3, 600, 33, 64, 2), (40, 512, 20, 128, 3), (1, 384, 16, 384, 3), (2, 200, 17, 32, 4)]


@pytest.mark.parametrize("shape", SPLITS, ids=lambda s: "x".join(map(str, s)))
@each_kind
def test_split_columns_are_added_up_in_order(shape, kind, device):
    *shape, splits = shape
    args = make(shape, torch.float16, device, kind)
    launch = replace(TILES, splits=splits)
    got = launch_int4_linear(**args, launch=launch)
    assert_as_good(got, int4_linear_reference(**args), in_float64(**args))
    # the tickets are zero again, and nothing depends on which program arrives last
    assert all(
        torch.equal(launch_int4_linear(**args, launch=launch), got)
        for _ in range(10 if on_cuda else 1)
    )


GATED = {
    "tiles": (TILES, (3, 200, 2 * 33, 64)),
    "split": (replace(TILES, splits=3), (17, 512, 2 * 20, 128)),
    "scaled_tiles": (SCALED_TILES, (40, 200, 2 * 9, 32)),
    "gemv": (GEMV, (1, GEMV_COLUMNS * 2, 2 * 19, 128)),
}


@pytest.mark.parametrize("case", GATED.values(), ids=GATED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@each_dtype
def test_gate_and_up_in_one_launch(case, activation, bias, dtype, device):
    skip_bfloat16_in_the_interpreter(device, dtype)
    launch, shape = case
    args = make(shape, dtype, device)
    del args["residual"]
    if not bias:
        del args["bias"]
    got = launch_int4_linear(**args, activation=activation, launch=launch)
    assert got.shape == (shape[0], shape[2] // 2) and got.is_contiguous()
    reference = int4_linear_reference(**args, activation=activation)
    assert_as_good(got, reference, ACTIVATIONS[activation](in_float64(**args)))


def test_gate_and_up_of_many_tokens(device, no_workspaces):
    args = make((MAX_TOKENS + 1, 128, 40, 64), torch.float16, device, more=False)
    got = launch_int4_linear(**args, activation="silu")
    reference = int4_linear_reference(**args, activation="silu")
    assert_as_good(got, reference, ACTIVATIONS["silu"](in_float64(**args)))


@pytest.mark.parametrize("group_size", [32, 64, 128, GEMV_COLUMNS * 2])
@each_dtype
@each_kind
@pytest.mark.parametrize("more", [False, True], ids=["plain", "bias and residual"])
def test_lanes_match_float64(group_size, dtype, kind, more, device):
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16")
    args = make((1, GEMV_COLUMNS * 2, 19, group_size), dtype, device, kind, more)
    got = launch_int4_linear(**args, launch=GEMV)
    assert_as_good(got, int4_linear_reference(**args), in_float64(**args))


@each_dtype
@each_tile
def test_every_code_and_zero_point_is_exact(launch, dtype, device):
    """With one column at a time and a scale of 1, the output is the weight itself."""
    skip_bfloat16_in_the_interpreter(device, dtype)
    codes = torch.arange(16, dtype=torch.uint8).repeat(16, 1)
    args = {
        "packed": pack_int4(codes).to(device),
        "scales": torch.ones(16, 1, device=device, dtype=dtype),
        "zeros": torch.arange(16, dtype=torch.uint8)[:, None].to(device),
        "x": torch.eye(16, device=device, dtype=dtype),
        "group_size": 16,
    }
    got = launch_int4_linear(**args, launch=launch)
    wanted = codes.T.double() - torch.arange(16)[None, :]
    assert torch.equal(got.cpu().double(), wanted)


@pytest.mark.parametrize("kind", ["symmetric", "zeros"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 200])
@each_dtype
def test_scaled_weights_are_the_dequantized_ones(group_size, kind, dtype, device):
    """With one column at a time, the output is the weight itself, bit for bit."""
    skip_bfloat16_in_the_interpreter(device, dtype)
    k, n = 200, 19
    args = make((k, k, n, group_size), dtype, device, kind, more=False)
    args["x"] = torch.eye(k, dtype=dtype, device=device)
    weight = torch.empty(n, k, dtype=dtype, device=device)
    given = (args["packed"], args["scales"], args.get("zeros"), None, weight)
    launch_dequantize(*given, fmt=INT4, group_size=group_size)
    assert torch.equal(launch_int4_linear(**args, launch=SCALED_TILES).T, weight)


@pytest.mark.parametrize("kind", ["zeros", "minima"])
@each_tile
def test_nothing_outside_the_tensors_is_read_or_written(launch, kind, device, monkeypatch):
    empty = GuardedEmpty()
    args = make((3, 200, 33, 64), torch.float16, device, kind)
    reference, exact = int4_linear_reference(**args), in_float64(**args)
    args = guard_all(args, 119)
    monkeypatch.setattr(torch, "empty", empty)
    assert_as_good(launch_int4_linear(**args, launch=launch), reference, exact)
    empty.assert_bands_are_whole(reference.numel())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 31, 64, 100, 128, 256, 257, 1000])
@each_kind
@each_dtype
def test_the_operation_at_a_model_s_shapes(tokens, kind, dtype):
    shapes = (
        (4096, 6144, 128),
        (14336, 4096, 64),
        (576, 1536, 32),
        (4096, 64, 4096),
        (4096, 28672, 128),
        (1024, 16384, 32),
    )
    for k, n, group_size in shapes:
        args = make((tokens, k, n, group_size), dtype, "cuda", kind)
        assert_as_good(int4_linear(**args), int4_linear_reference(**args), in_float64(**args))
        args = make((tokens, k, n, group_size), dtype, "cuda", kind, more=False)
        got, exact = int4_linear(**args, activation="silu"), in_float64(**args)
        reference = int4_linear_reference(**args, activation="silu")
        assert_as_good(got, reference, ACTIVATIONS["silu"](exact))


@pytest.mark.parametrize(
    ("dtype", "device_type"), [(torch.float64, "cpu"), (torch.bfloat16, "cuda")], ids=str
)
@pytest.mark.parametrize("tokens", [1, 5, 300])
@each_kind
def test_scales_may_be_float16(dtype, device_type, tokens, kind):
    """Checkpoints have float16 scales; a model in another dtype does not round them."""
    if device_type == "cuda" and not torch.cuda.is_available():
        pytest.skip("wants a CUDA GPU")
    args = make((tokens, 256, 40, 64), torch.float16, device_type, kind)
    exact = in_float64(**args)
    args = {
        name: t.to(dtype) if name in ("x", "bias", "residual") else t for name, t in args.items()
    }
    got = int4_linear(**args)
    assert got.dtype == dtype
    error = (got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error <= (1e-12 if dtype == torch.float64 else 2**-7)


# ------------------------------------------------------------------------------------ many tokens


@each_shape
@each_dtype
@each_kind
def test_weights_are_dequantized_with_one_rounding(shape, dtype, kind, device):
    """Bit for bit: a scale times a code is exact in float32, so it is rounded once."""
    skip_bfloat16_in_the_interpreter(device, dtype)
    args = make(shape, dtype, device, kind)
    _, k, n, group_size = shape
    packed, scales, zeros, minima = (
        args.get(name) for name in ("packed", "scales", "zeros", "minima")
    )
    weight, buffer = guarded(torch.full((n, k), float("nan"), dtype=dtype, device=device), 7.0)
    given = (packed, scales, zeros, minima, weight)
    launch_dequantize(*given, fmt=INT4, group_size=group_size)
    wanted = INT4.dequantize(packed, scales, zeros, k, group_size, torch.float32, minima)
    assert torch.equal(weight, wanted.to(dtype))
    assert (buffer[:BAND] == 7.0).all() and (buffer[-BAND:] == 7.0).all()


@each_dtype
@each_kind
@pytest.mark.parametrize("more", [False, True], ids=["plain", "bias and residual"])
def test_many_tokens(dtype, kind, more, device, no_workspaces):
    skip_bfloat16_in_the_interpreter(device, dtype)
    args = make((MAX_TOKENS + 1, 200, 33, 64), dtype, device, kind, more)
    args["x"] = args["x"].view(-1, 1, 200)
    if more:
        args["residual"] = args["residual"].view(-1, 1, 33)
    before = {name: t.clone() for name, t in args.items() if isinstance(t, torch.Tensor)}
    got = launch_int4_linear(**args)
    assert got.shape == (MAX_TOKENS + 1, 1, 33) and got.is_contiguous()
    assert_as_good(got, int4_linear_reference(**args), in_float64(**args))
    assert all(torch.equal(args[name], t) for name, t in before.items())


def test_the_tiers_agree_at_their_border(device):
    args = make((MAX_TOKENS + 1, 128, 40, 64), torch.float16, device, more=False)
    many = launch_int4_linear(**args)
    few = launch_int4_linear(**args | {"x": args["x"][:MAX_TOKENS].contiguous()})
    exact = in_float64(**args)[:MAX_TOKENS]
    assert_as_good(few, many[:MAX_TOKENS], exact)
    assert_as_good(many[:MAX_TOKENS], few, exact)
