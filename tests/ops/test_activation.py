"""The gated activations: the reference against independent oracles, the kernel against it."""

from functools import partial
from math import pi, prod, sqrt

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from guards import GuardedEmpty, guarded
from llmfast_kernels.activation import gelu_mul, gelu_tanh_mul, kernel, reference, silu_mul
from llmfast_kernels.activation.kernel import choose_launch

OPS = {"silu_mul": silu_mul, "gelu_tanh_mul": gelu_tanh_mul, "gelu_mul": gelu_mul}
LAUNCH = {name: getattr(kernel, f"launch_{name}") for name in OPS}
REFERENCE = {name: getattr(reference, f"{name}_reference") for name in OPS}
TRANSFORMERS = {"silu_mul": "silu", "gelu_tanh_mul": "gelu_pytorch_tanh", "gelu_mul": "gelu"}
SHAPES = [(1, 1), (3, 7), (2, 3, 100), (2, 1023), (1, 1024), (3, 1031), (2, 2049), (0, 64)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["apart", "views", "merged"]

each_op = pytest.mark.parametrize("op", OPS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
needs_cuda = partial(pytest.mark.skipif, not torch.cuda.is_available())
# numpy, which runs the interpreter, warns where exp gives inf; the kernels mean it to
exp_may_overflow = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def formula(op, gate, up):
    """Compute the operation in float64, unrounded, by another formula than the reference's."""
    x = gate.double()
    if op == "silu_mul":
        act = x * torch.sigmoid(x)
    elif op == "gelu_tanh_mul":
        act = x * torch.sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x**3))
    else:
        act = x / 2 * torch.erfc(-x / sqrt(2))
    return act * up.double()


def make(shape, dtype, device="cpu"):
    gen = torch.Generator().manual_seed(0)
    gate = 2 * torch.randn(shape, generator=gen)  # twice: the tails matter
    return gate.to(device, dtype), torch.randn(shape, generator=gen).to(device, dtype)


def laid_out(layout, gate, up):
    """Make the arguments: two tensors, two views of a merged one, or the merged one."""
    if layout == "apart":
        return gate, up
    merged = torch.cat([gate, up], dim=-1)
    return merged.chunk(2, dim=-1) if layout == "views" else (merged,)


def assert_same(actual, expected, gate, up):
    """Assert two steps of the dtype, rarely: two roundings follow a float32 activation.

    In float32 the exponential errs by its argument's rounding, some 20 epsilons for the sizes made
    here. The reference's own 1 + tanh and 1 + erf cancel for negative gates and err by float32's
    epsilon times the gate, whatever the type; the share therefore counts gates above -2, where 1 +
    erf is over 0.04. Below the smallest normal number steps no longer shrink. The bound alone
    would pass a kernel that does not round the activation; the share would not.
    """
    info, single = torch.finfo(expected.dtype), torch.finfo(torch.float32).eps
    gate, up, actual, wanted = (t.double() for t in (gate, up, actual, expected))
    bound = (32 if expected.dtype == torch.float32 else 2) * info.eps * wanted.abs()
    bound += 4 * single * (gate * up).abs() + info.tiny * info.eps * (1 + up.abs())
    assert ((actual - wanted).abs() <= bound).all()  # false for NaN too
    if expected.dtype != torch.float32:
        away = (actual != wanted) & (gate > -2)
        assert away.sum() <= max(1, 0.01 * wanted.numel())


def skip_what_the_interpreter_cannot_round(device, dtype):
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates float32 to bfloat16; a GPU rounds to nearest")


@each_op
@each_layout
@each_dtype
@each_shape
def test_reference_is_what_transformers_computes(op, layout, dtype, shape):
    args = laid_out(layout, *make(shape, dtype))
    # on the same strides: PyTorch's vectorised and scalar paths differ in the last place
    gate, up = args if len(args) == 2 else args[0].chunk(2, dim=-1)
    got = REFERENCE[op](*args)
    assert got.dtype == dtype
    assert torch.equal(got, ACT2FN[TRANSFORMERS[op]](gate) * up)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reference_matches_formula_in_float64(op, dtype):
    """Assert ten epsilons, of the gate too: PyTorch's 1 + tanh and 1 + erf cancel there."""
    gate, up = make((7, 301), dtype)
    got = REFERENCE[op](gate, up)
    assert got.dtype == dtype
    expected = formula(op, gate, up)
    bound = 10 * torch.finfo(dtype).eps * (expected.abs() + (gate * up).abs())
    assert ((got.double() - expected).abs() <= bound).all()


@each_op
@each_layout
@each_dtype
@each_shape
def test_kernel_matches_reference(op, layout, dtype, shape, device):
    skip_what_the_interpreter_cannot_round(device, dtype)
    gate, up = make(shape, dtype, device)
    got = LAUNCH[op](*laid_out(layout, gate, up))
    assert got.shape == shape and got.is_contiguous()
    assert_same(got, REFERENCE[op](gate, up), gate, up)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # no example changes a fixture
)
@given(
    n_rows=st.integers(0, 20),
    n_cols=st.integers(1, 1500),
    op=st.sampled_from(list(OPS)),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_kernel_matches_reference_at_any_size(device, n_rows, n_cols, op, layout, dtype):
    gate, up = make((n_rows, n_cols), dtype, device)
    got = LAUNCH[op](*laid_out(layout, gate, up))
    assert_same(got, REFERENCE[op](gate, up), gate, up)


@exp_may_overflow
@each_op
@each_dtype
def test_kernel_errs_at_most_twice_as_much_as_pytorch(op, dtype, device):
    """Against float64, over the range where the activation is neither 0 nor the gate itself.

    In float32 four epsilons are allowed too: a GPU's fast division alone errs by up to two.
    """
    skip_what_the_interpreter_cannot_round(device, dtype)
    gate = torch.linspace(-12, 12, 4096, device=device).to(dtype)
    up = torch.ones_like(gate)
    exact = formula(op, gate, up)
    ours, theirs = (
        (f(gate, up).double() - exact).square().mean().sqrt() for f in (LAUNCH[op], REFERENCE[op])
    )
    floor = 4 * torch.finfo(dtype).eps * exact.square().mean().sqrt()
    assert 0 < ours <= (max(2 * theirs, floor) if dtype == torch.float32 else 2 * theirs)


@exp_may_overflow
@each_op
@each_dtype
def test_far_from_zero_nothing_becomes_nan(op, dtype, device):
    """exp passes float32's range at 88.7, the cube in gelu_tanh_mul at 7e12."""
    skip_what_the_interpreter_cannot_round(device, dtype)
    far = [20.0, 87.0, 89.0, 1000.0, 60000.0] + ([] if dtype == torch.float16 else [1e15, 1e30])
    gate = torch.tensor([0.0, -0.0, *far, *(-x for x in far)], device=device).to(dtype)
    up = torch.ones_like(gate)
    got = LAUNCH[op](gate, up)
    assert got.isfinite().all()
    # the formula is exact to float32 here; a GPU may flush a quotient below 2**-119 to 0
    wanted = formula(op, gate, up)
    rtol = 128 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 0.01
    torch.testing.assert_close(
        got.double(), wanted, rtol=rtol, atol=torch.finfo(dtype).tiny + 1e-35
    )


@each_op
@each_layout
def test_nothing_outside_the_tensors_is_read_or_written(op, layout, device, monkeypatch):
    empty = GuardedEmpty()
    shape = (3, 1031)
    gate, up = make(shape, torch.float16, device)
    expected = REFERENCE[op](gate, up)
    nan = float("nan")  # a stray read makes NaN
    if layout == "apart":
        args = tuple(guarded(t, nan)[0] for t in (gate, up))
    else:
        args = (guarded(torch.cat([gate, up], dim=-1), nan)[0],)
        args = args[0].chunk(2, dim=-1) if layout == "views" else args
    monkeypatch.setattr(torch, "empty", empty)
    got = LAUNCH[op](*args)

    assert_same(got, expected, gate, up)
    empty.assert_bands_are_whole(prod(shape))


@needs_cuda(reason="13 GiB and a GPU's speed: offsets past 2**31 elements")
@pytest.mark.parametrize("layout", ["views", "merged"])
def test_offsets_pass_2_to_the_31(layout):
    n_cols = 14336
    n_rows = 2**31 // n_cols + 5
    merged = torch.ones(n_rows, 2 * n_cols, device="cuda", dtype=torch.bfloat16)
    # rows on both sides of the 2**31st element of what is read and of what is written
    middle = n_rows // 2
    picked = torch.tensor([0, middle - 3, middle, n_rows - 6, n_rows - 1], device="cuda")
    gate, up = make((len(picked), n_cols), torch.bfloat16, "cuda")
    merged[picked] = torch.cat([gate, up], dim=-1)
    y = silu_mul(merged) if layout == "merged" else silu_mul(*merged.chunk(2, dim=-1))
    assert_same(y[picked], REFERENCE["silu_mul"](gate, up), gate, up)


@each_op
@each_layout
def test_arguments_are_left_unchanged(op, layout, device):
    args = laid_out(layout, *make((3, 64), torch.float16, device))
    before = [a.clone() for a in args]
    LAUNCH[op](*args)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


@each_op
@each_layout
def test_op_gives_what_its_implementation_gives(op, layout, device):
    args = laid_out(layout, *make((3, 64), torch.float16, device))
    impl = LAUNCH[op] if device.type == "cuda" else REFERENCE[op]
    assert torch.equal(OPS[op](*args), impl(*args))


def test_rows_may_lie_apart_in_different_ways(device):
    """Each tensor has its own row stride; leading dimensions of size 1 have any stride."""
    gate, up = make((4, 1, 50), torch.float16, device)
    wide = torch.full((4, 90), 9.0, dtype=gate.dtype, device=device)
    wide[:, 3:53] = gate[:, 0]
    strided = wide[:, None, 3:53]
    assert not strided.is_contiguous()
    assert_same(kernel.launch_silu_mul(strided, up), silu_mul(gate, up), gate, up)
    assert torch.equal(reference.silu_mul_reference(strided, up), silu_mul(strided, up))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launch_is_on_the_tensors_device():
    gate, up = make((3, 64), torch.bfloat16, "cuda:1")
    with torch.cuda.device(0):
        got = silu_mul(gate, up)
    assert_same(got, REFERENCE["silu_mul"](gate, up), gate, up)


@each_op
@pytest.mark.parametrize(
    ("gate", "up", "error", "says"),
    [
        (torch.ones(2, 4, dtype=torch.int32), None, TypeError, "gate must be .*torch.int32"),
        (torch.ones(2, 4), torch.ones(2, 4).half(), TypeError, "up .*32, got torch.float16"),
        (torch.ones(2, 3), None, ValueError, r"even; got shape \(2, 3\)"),
        (torch.ones(2, 0), None, ValueError, "at least 1"),
        (torch.ones(()), None, ValueError, r"at least 1, got shape \(\)"),
        (torch.ones(2, 4), torch.ones(2, 5), ValueError, r"up must be \(2, 4\).*got \(2, 5\)"),
        (torch.ones(2, 4), torch.ones(4), ValueError, r"up must be \(2, 4\).*got \(4,\)"),
        (torch.ones(2, 4), torch.ones(2, 4, device="meta"), ValueError, "on cpu.* on meta"),
        (torch.ones(4, 2).t(), torch.ones(2, 4), ValueError, r"gate .*strides \(1, 2\)"),
        (torch.ones(2, 4), torch.ones(4, 2).t(), ValueError, r"up .*strides \(1, 2\)"),
        (torch.ones(2, 9, 4)[:, :3], None, ValueError, r"gate .*apart; .*strides \(36, 4, 1\)"),
        (torch.ones(2, 4, requires_grad=True), None, RuntimeError, "no backward; call under"),
        (torch.ones(4), torch.ones(4, requires_grad=True), RuntimeError, "torch.no_grad"),
    ],
)
def test_bad_arguments_are_named(op, gate, up, error, says):
    with pytest.raises(error, match=f"^{op}: .*{says}"):
        OPS[op](gate, up)


@each_op
def test_what_requires_grad_is_taken_under_no_grad(op):
    gate = torch.ones(2, 4, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(OPS[op](gate, gate), REFERENCE[op](gate, gate))


@each_op
@needs_cuda(reason="CUDA launchers alone refuse float64")
def test_float64_is_refused_on_cuda(op):
    gate = torch.ones(2, 4, device="cuda", dtype=torch.float64)
    with pytest.raises(TypeError, match=f"{op}: gate must be float32.*torch.float64 on cuda"):
        OPS[op](gate)


@pytest.mark.parametrize("n_cols", [1, 7, 256, 257, 1023, 1024, 1025, 14336])
def test_launch_at_its_edges(n_cols):
    launch = choose_launch(n_cols)
    assert launch.block_n & (launch.block_n - 1) == 0  # tl.arange takes powers of 2
    assert launch.block_n <= kernel.MAX_TILE
    assert launch.block_n >= n_cols or launch.block_n == kernel.MAX_TILE
    assert launch.block_n < 2 * n_cols  # no tile is more than half empty
    assert launch.num_warps in (1, 2, 4, 8)
    assert launch.block_n <= 8 * 32 * launch.num_warps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_rows_than_the_grid_s_second_axis_takes(layout, device, monkeypatch):
    monkeypatch.setattr(kernel, "_MAX_GRID_Y", 2)
    gate, up = make((3, 1031), torch.float16, device)
    args = laid_out(layout, gate, up)
    assert_same(LAUNCH["silu_mul"](*args), REFERENCE["silu_mul"](*args), gate, up)
