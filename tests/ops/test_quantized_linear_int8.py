"""Linear layers with eight-bit weights: the kernels for any GPU, against float64."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import linear_cases
from guards import BAND, GuardedEmpty, guard_all, guarded
from linear_cases import (
    assert_as_good,
    each_dtype,
    each_kind,
    skip_bfloat16_in_the_interpreter,
)
from llmfast_kernels.common.device import INTERPRETER
from llmfast_kernels.linear.launch import block_m
from llmfast_kernels.quantized_linear import (
    int8_linear,
    pack_int8,
    unpack_int8,
    workspace_bytes,
)
from llmfast_kernels.quantized_linear.formats import INT8
from llmfast_kernels.quantized_linear.kernel import launch_quantized_linear
from llmfast_kernels.quantized_linear.kernels.dequantize import launch_dequantize
from llmfast_kernels.quantized_linear.launch import Launch, max_tokens
from llmfast_kernels.quantized_linear.reference import int8_linear_reference

# tokens, k, n, group size: odd rows, k on either side of a block, groups cut short, all columns
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

launch_int8_linear = partial(launch_quantized_linear, fmt=INT8)
MAX_TOKENS = max_tokens(8, False, INTERPRETER)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
make = partial(linear_cases.make, bits=8)
in_float64 = partial(linear_cases.in_float64, bits=8)


def small(args):
    """Return a launch of several steps and programs even at small shapes, where there is one."""
    if len(args["x"]) > 1 and "minima" in args:
        return None  # the workspace
    group = 128 if args["scales"].shape[1] == 1 else args["group_size"]
    if len(args["x"]) == 1:
        return Launch("gemv", 1, 4, 128, num_warps=2)
    return Launch("tiles", block_m(len(args["x"])), 16, group, num_warps=2, num_stages=2)


@pytest.mark.parametrize("kind", ["symmetric", "zeros", "minima"])
def test_reference_is_the_formula(kind):
    args = make((2, 72, 3, 32), torch.float64, kind=kind)
    got = int8_linear_reference(**args)
    codes = unpack_int8(args["packed"], 72)
    for t in range(2):
        for row in range(3):
            total = args["bias"][row] + args["residual"][t, row]
            for column in range(72):
                g = column // 32
                zero = {"symmetric": 128, "minima": 0}.get(kind)
                zero = int(args["zeros"][row, g]) if zero is None else zero
                weight = args["scales"][row, g] * (int(codes[row, column]) - zero)
                if kind == "minima":
                    weight = weight + args["minima"][row, g]
                total = total + weight * args["x"][t, column]
            torch.testing.assert_close(got[t, row], total)


@each_shape
@each_dtype
@each_kind
@pytest.mark.parametrize("more", [False, True], ids=["plain", "bias and residual"])
def test_kernel_matches_float64(shape, dtype, kind, more, device):
    skip_bfloat16_in_the_interpreter(device, dtype)
    args = make(shape, dtype, device, kind, more)
    got = launch_int8_linear(**args, launch=small(args))
    assert got.is_contiguous()
    assert_as_good(got, int8_linear_reference(**args), in_float64(**args))


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
)
def test_kernel_matches_at_any_shape(device, tokens, k, n, group_size, kind):
    args = make((tokens, k, n, group_size or k), torch.float16, device, kind)
    got = launch_int8_linear(**args)
    assert_as_good(got, int8_linear_reference(**args), in_float64(**args))


@pytest.mark.parametrize("tokens", [1, 2])
@each_dtype
def test_every_code_and_zero_point_is_exact(tokens, dtype, device):
    """With one column at a time and a scale of 1, the output is the weight itself."""
    skip_bfloat16_in_the_interpreter(device, dtype)
    args = {
        "packed": pack_int8(torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 2)).to(device),
        "scales": torch.ones(256, 1, device=device, dtype=dtype),
        "zeros": torch.arange(256, dtype=torch.uint8).flip(0)[:, None].contiguous().to(device),
        "x": torch.eye(2, device=device, dtype=dtype)[:tokens],
        "group_size": 2,
    }
    wanted = (2 * torch.arange(256) - 255).double()
    assert all(torch.equal(y.cpu().double(), wanted) for y in launch_int8_linear(**args))


@pytest.mark.parametrize(("tokens", "kind"), [(1, "zeros"), (3, "zeros"), (1, "minima")])
def test_nothing_outside_the_tensors_is_read_or_written(tokens, kind, device, monkeypatch):
    empty = GuardedEmpty()
    args = make((tokens, 200, 33, 64), torch.float16, device, kind)
    reference, exact = int8_linear_reference(**args), in_float64(**args)
    args = guard_all(args, 255)
    monkeypatch.setattr(torch, "empty", empty)
    got = launch_int8_linear(**args, launch=small(args))
    assert_as_good(got, reference, exact)
    empty.assert_bands_are_whole(reference.numel())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 31, 64, 100, 128, 129, 1000])
@each_kind
@each_dtype
def test_the_operation_at_a_model_s_shapes(tokens, kind, dtype):
    shapes = ((4096, 6144, 128), (14336, 4096, 64), (576, 1536, 32), (4096, 64, 4096))
    for k, n, group_size in shapes:
        args = make((tokens, k, n, group_size), dtype, "cuda", kind)
        assert_as_good(int8_linear(**args), int8_linear_reference(**args), in_float64(**args))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3])
def test_more_codes_than_an_int32_counts(tokens):
    k, n = 32768, 65600
    args = make((tokens, k, 16, k), torch.float16, "cuda", "zeros", more=False)
    wanted = int8_linear_reference(**args)
    for name in ("packed", "scales", "zeros"):
        args[name] = args[name].repeat(n // 16, 1)
    got = int8_linear(**args)
    assert torch.equal(got, got[:, :16].repeat(1, n // 16))
    assert_as_good(got[:, -16:], wanted, wanted.double())


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
    got = int8_linear(**args)
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
    launch_dequantize(*given, fmt=INT8, group_size=group_size)
    wanted = INT8.dequantize(packed, scales, zeros, k, group_size, torch.float32, minima)
    assert torch.equal(weight, wanted.to(dtype))
    assert (buffer[:BAND] == 7.0).all() and (buffer[-BAND:] == 7.0).all()


@each_kind
@pytest.mark.parametrize("more", [False, True], ids=["plain", "bias and residual"])
def test_many_tokens_go_through_the_workspace(kind, more, device, no_workspaces):
    args = make((MAX_TOKENS + 1, 200, 33, 64), torch.float16, device, kind, more)
    before = {name: t.clone() for name, t in args.items() if isinstance(t, torch.Tensor)}
    many = launch_int8_linear(**args)
    exact = in_float64(**args)
    assert_as_good(many, int8_linear_reference(**args), exact)
    assert all(torch.equal(args[name], t) for name, t in before.items())
    assert workspace_bytes() == 2 * 200 * 33
    short = {name: args[name][:MAX_TOKENS] for name in ("x", "residual") if name in args}
    few = launch_int8_linear(**args | short)
    assert_as_good(few, many[:MAX_TOKENS], exact[:MAX_TOKENS])  # the tiers agree
    assert_as_good(many[:MAX_TOKENS], few, exact[:MAX_TOKENS])


def test_a_launch_that_cannot_do_it_is_refused():
    args = make((2, 64, 32, 64), torch.float16, kind="minima")
    with pytest.raises(ValueError, match="tiles take no minima and no activation"):
        launch_int8_linear(**args, launch=Launch("tiles", 16, 16, 64))
    args = make((1, 64, 32, 64), torch.float16, more=False)
    with pytest.raises(ValueError, match="gemv takes no activation"):
        launch_int8_linear(**args, activation="silu", launch=Launch("gemv", 1, 4, 128))
