"""Linear layers with four-bit weights: the layout, and the kernel against float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guards import BAND, GuardedEmpty, guard_all, guarded
from llmfast_kernels.linear import (
    free_workspaces,
    int4_launch,
    int4_linear,
    pack_int4,
    unpack_int4,
    workspace_bytes,
)
from llmfast_kernels.linear.hopper_launch import choose_hopper_launch
from llmfast_kernels.linear.int4_kernel import launch_dequantize_int4, launch_int4_linear
from llmfast_kernels.linear.int4_launch import (
    GEMV_COLUMNS,
    MAX_TOKENS,
    Int4Launch,
    choose_int4_launch,
    stage_bytes,
)
from llmfast_kernels.linear.int4_layout import CHUNK, dequantize_int4
from llmfast_kernels.linear.reference import ACTIVATIONS, int4_linear_reference
from quantized_cases import assert_as_good, each_dtype, each_kind, in_float64, make

SMALL = Int4Launch("tiles", 32, 16, 1, 2, 2)
MANY = Int4Launch("many", 32, 16, 1, 2, 2)
GEMV = Int4Launch("gemv", 1, 8, 1, 2, 1)
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
each_tile = pytest.mark.parametrize("launch", [SMALL, MANY], ids=lambda launch: launch.tier)


def skip_bfloat16_in_the_interpreter(device, dtype):
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16 products, and truncates to bfloat16")


# --------------------------------------------------------------------------------------- layout


def test_where_a_code_lies():
    """As the module's docstring says: column 32 p + 2 c + h in word c, from bit 16 h + 4 p on."""
    for column in (0, 1, 2, 31, 32, 33, 63, 96, 127, 128, 200):
        codes = torch.zeros(2, 256, dtype=torch.uint8)
        codes[1, column] = 15
        packed = pack_int4(codes)
        assert packed.dtype == torch.int32 and packed.shape == (2, 32)
        chunk, rest = divmod(column, CHUNK)
        pair, rest = divmod(rest, 32)
        word, half = divmod(rest, 2)
        wanted = torch.zeros(2, 32, dtype=torch.int64)
        bits = 15 << (16 * half + 4 * pair)
        wanted[1, 16 * chunk + word] = bits - 2**32 if bits >= 2**31 else bits
        assert torch.equal(packed.long(), wanted)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(n=st.integers(1, 9), k=st.integers(1, 300), seed=st.integers(0, 99))
def test_pack_and_unpack_are_inverse(n, k, seed):
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=gen, dtype=torch.uint8)
    packed = pack_int4(codes)
    assert packed.is_contiguous() and packed.shape == (n, -(-k // CHUNK) * 16)
    assert torch.equal(unpack_int4(packed, k), codes)


def test_bad_codes_are_named():
    with pytest.raises(TypeError, match=r"^pack_int4: codes must be torch.uint8, got torch.int32"):
        pack_int4(torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^pack_int4: .*below 16; .*\(2, 3\) with a 16"):
        pack_int4(torch.full((2, 3), 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"^pack_int4: .*\(3,\)"):
        pack_int4(torch.zeros(3, dtype=torch.uint8))


# --------------------------------------------------------------------------------------- kernel


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
    got = launch_int4_linear(**args, _launch=launch)
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
    launch=st.sampled_from([SMALL, MANY]),
)
def test_kernel_matches_at_any_shape(device, tokens, k, n, group_size, kind, launch):
    args = make((tokens, k, n, group_size or k), torch.float16, device, kind)
    got = launch_int4_linear(**args, _launch=launch)
    assert_as_good(got, int4_linear_reference(**args), in_float64(**args))


# tokens, k, n, group size, splits: the last one has fewer columns, or none; tiles are not full
SPLITS = [(3, 600, 33, 64, 2), (40, 512, 20, 128, 3), (1, 384, 16, 384, 3), (2, 200, 17, 32, 4)]


@pytest.mark.parametrize("shape", SPLITS, ids=lambda s: "x".join(map(str, s)))
@each_kind
def test_split_columns_are_added_up_in_order(shape, kind, device):
    *shape, splits = shape
    args = make(shape, torch.float16, device, kind)
    launch = Int4Launch("tiles", 32, 16, splits, 2, 2)
    got = launch_int4_linear(**args, _launch=launch)
    assert_as_good(got, int4_linear_reference(**args), in_float64(**args))
    # the tickets are as they were, and nothing depends on who comes last
    assert all(
        torch.equal(launch_int4_linear(**args, _launch=launch), got)
        for _ in range(10 if on_cuda else 1)
    )


GATED = {
    "tiles": (SMALL, (3, 200, 2 * 33, 64)),
    "split": (Int4Launch("tiles", 32, 16, 3, 2, 2), (17, 512, 2 * 20, 128)),
    "many": (MANY, (40, 200, 2 * 9, 32)),
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
    got = launch_int4_linear(**args, activation=activation, _launch=launch)
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
    got = launch_int4_linear(**args, _launch=GEMV)
    assert_as_good(got, int4_linear_reference(**args), in_float64(**args))


@each_dtype
@each_tile
def test_every_code_and_zero_point_is_exact(launch, dtype, device):
    """One column at a time, a scale of 1: the weight itself comes out."""
    skip_bfloat16_in_the_interpreter(device, dtype)
    codes = torch.arange(16, dtype=torch.uint8).repeat(16, 1)
    args = {
        "packed": pack_int4(codes).to(device),
        "scales": torch.ones(16, 1, device=device, dtype=dtype),
        "zeros": torch.arange(16, dtype=torch.uint8)[:, None].to(device),
        "x": torch.eye(16, device=device, dtype=dtype),
        "group_size": 16,
    }
    got = launch_int4_linear(**args, _launch=launch)
    wanted = codes.T.double() - torch.arange(16)[None, :]
    assert torch.equal(got.cpu().double(), wanted)


@pytest.mark.parametrize("kind", ["symmetric", "zeros"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 200])
@each_dtype
def test_scaled_weights_are_the_dequantized_ones(group_size, kind, dtype, device):
    """To the bit: one column at a time the weight itself comes out."""
    skip_bfloat16_in_the_interpreter(device, dtype)
    k, n = 200, 19
    args = make((k, k, n, group_size), dtype, device, kind, more=False)
    args["x"] = torch.eye(k, dtype=dtype, device=device)
    weight = torch.empty(n, k, dtype=dtype, device=device)
    given = (args["packed"], args["scales"], args.get("zeros"), None, weight)
    launch_dequantize_int4(*given, group_size=group_size)
    assert torch.equal(launch_int4_linear(**args, _launch=MANY).T, weight)


@pytest.mark.parametrize("kind", ["zeros", "minima"])
@each_tile
def test_nothing_outside_the_tensors_is_read_or_written(launch, kind, device, monkeypatch):
    empty = GuardedEmpty()
    args = make((3, 200, 33, 64), torch.float16, device, kind)
    reference, exact = int4_linear_reference(**args), in_float64(**args)
    args = guard_all(args, 119)
    monkeypatch.setattr(torch, "empty", empty)
    assert_as_good(launch_int4_linear(**args, _launch=launch), reference, exact)
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
    """As checkpoints have them: a model in another dtype does not round them."""
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


def test_op_runs_its_implementation(device):
    args = make((3, 128, 40, 64), torch.float16, device)
    run = launch_int4_linear if device.type == "cuda" else int4_linear_reference
    assert torch.equal(int4_linear(**args), run(**args))
    args = make((6, 128, 40, 64), torch.float16, device, more=False)
    args["x"] = args["x"].view(2, 3, 128)
    assert int4_linear(**args).shape == (2, 3, 40)


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 33, 64, 65, MAX_TOKENS])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 384), (4096, 14336), (28672, 4096), (10**6, 64)])
def test_launches_fit_every_gpu(n, k, tokens):
    for shared_memory in (99 * 1024, 227 * 1024):
        launch = choose_int4_launch(n, k, tokens, shared_memory=shared_memory)
        if launch.tier == "gemv":
            assert tokens == 1 and k % GEMV_COLUMNS == 0 and n >= 16384
            continue
        stage = stage_bytes(launch.block_m, launch.block_n)
        assert stage * launch.num_stages <= shared_memory
        assert launch.block_m >= min(tokens, 128)
        assert launch.splits == 1 or k // CHUNK // launch.splits >= 3


def test_what_an_h100_launches():
    def choose(n, k, tokens, **options):
        launch = choose_int4_launch(n, k, tokens, shared_memory=227 * 1024, **options)
        return launch.tier, launch.block_m, launch.block_n, launch.splits

    assert choose(28672, 4096, 1) == ("gemv", 1, 8, 1)
    assert choose(4096, 14336, 1) == ("tiles", 8, 64, 8)
    assert choose(6144, 4096, 16) == ("tiles", 16, 64, 4)
    assert choose(28672, 4096, 64) == ("tiles", 64, 128, 1)
    assert choose(28672, 4096, 65) == ("many", 128, 128, 1)
    assert choose(6144, 4096, 256) == ("many", 128, 64, 1)
    assert choose(4096, 4096, 256) == ("many", 128, 64, 1)
    assert choose(4096, 4096, 128) == ("tiles", 128, 128, 4)  # too few programs
    assert choose(4096, 14336, 256) == ("tiles", 128, 128, 2)  # too many columns
    assert choose(4096, 4096, 256, same_dtype=False) == ("tiles", 128, 128, 2)


def test_what_hopper_s_own_kernels_take():
    def choose(n, k, tokens, bits=4, streams=False, tiles=True, gated=False):
        launch = choose_hopper_launch(n, k, tokens, bits, streams=streams, tiles=tiles, gated=gated)
        return launch and (launch.tier, launch.tokens, launch.splits)

    assert choose(28672, 4096, 64) is None
    for bits in (4, 8):
        assert choose(6144, 4096, 65, bits) == ("tiles", 128, 2)  # else too few tiles
        assert choose(6144, 4096, 65, bits, gated=True) == ("tiles", 128, 1)
        assert choose(4096, 14336, 128, bits) == ("tiles", 128, 4)
        assert choose(4096, 14336, 129, bits) == ("tiles", 128, 2)
    assert choose(4096, 640, 128) == ("tiles", 128, 1)  # few columns
    assert choose(28672, 4096, 129) == choose(28672, 4096, 256) == ("tiles", 256, 1)
    assert choose(6144, 4096, 256) == ("tiles", 128, 1)
    assert choose(4096, 14336, 512) == ("tiles", 128, 1)
    assert choose(6144, 4096, 1024) == ("tiles", 128, 1)  # fewer waves of programs
    assert choose(4096, 4096, 1024) == choose(6144, 4096, 4096) == ("tiles", 256, 1)
    assert choose(1024, 2048, 512) is None  # few programs, little to dequantize
    assert choose(4096, 4096, 1024, tiles=False) is None
    assert choose(4096, 512, 1024) is None  # fewer columns than stages
    assert choose(28672, 4096, 1, 4, True) == ("stream", 8, 1)
    assert choose(28672, 4096, 1, 8, True) is None
    for bits in (4, 8):
        assert choose(28672, 4096, 2, bits, True) == choose(64, 64, 8, bits, True)
        assert choose(64, 64, 8, bits, True) == ("stream", 8, 1)
        assert choose(4096, 14336, 9, bits, True) == ("stream", 16, 1)
        assert choose(4096, 4096, 33, bits, True) == ("stream", 64, 1)
        assert choose(128256, 4096, 2, bits, True) is None  # more tiles than tickets


def test_an_input_at_an_odd_address_takes_the_other_tier(device, monkeypatch):
    """Lanes read two inputs at once."""
    args = make((1, GEMV_COLUMNS, 19, 128), torch.float16, device, more=False)
    odd = torch.empty(GEMV_COLUMNS + 1, dtype=torch.float16, device=device)[1:].view(1, -1)
    args["x"] = odd.copy_(args["x"])
    monkeypatch.setattr(int4_launch, "_LANES_ROWS", 1)
    choose_int4_launch.cache_clear()
    try:
        assert choose_int4_launch(19, GEMV_COLUMNS, 1, shared_memory=2**17).tier == "gemv"
        got = launch_int4_linear(**args)
    finally:
        choose_int4_launch.cache_clear()
    assert_as_good(got, int4_linear_reference(**args), in_float64(**args))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.ones(3, 128).int()}, TypeError, "x must be float16 or bfloat16"),
        ({"x": torch.ones(3, 130).half()}, ValueError, r"packed must be \(40, 32\)"),
        ({"x": torch.ones(128, 3).half().t()}, ValueError, r"x must be contiguous.*\(1, 3\)"),
        ({"group_size": 48}, ValueError, "group_size must be 32, 64, 128 or k = 128; got 48"),
        ({"packed": torch.ones(40, 16)}, TypeError, "packed must be torch.int32"),
        ({"packed": torch.ones(40).int()}, ValueError, r"packed must be \(n, words\)"),
        ({"scales": torch.ones(40, 3).half()}, ValueError, r"scales must be \(40, 2\).*\(40, 3\)"),
        ({"scales": torch.ones(40, 2)}, TypeError, "scales must have x's dtype torch.float16"),
        ({"zeros": torch.ones(40, 2)}, TypeError, "zeros must be torch.uint8"),
        ({"minima": torch.ones(40, 2).half()}, ValueError, "zeros and minima exclude each other"),
        (
            {"zeros": None, "minima": torch.ones(40, 3).half()},
            ValueError,
            r"minima must be \(40, 2\)",
        ),
        ({"zeros": None, "minima": torch.ones(40, 2)}, TypeError, "minima must have x's dtype"),
        ({"bias": torch.ones(39).half()}, ValueError, r"bias must be \(40,\)"),
        ({"residual": torch.ones(40).half()}, ValueError, r"residual must be \(3, 40\)"),
        ({"activation": "relu"}, ValueError, "activation must be silu, .*; got 'relu'"),
        ({"activation": "silu"}, ValueError, "residual and activation exclude each other"),
        (
            {"scales": torch.ones(40, 2, dtype=torch.half, requires_grad=True)},
            RuntimeError,
            "no backward",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, says):
    args = make((3, 128, 40, 64), torch.float16) | change
    with pytest.raises(error, match=f"^int4_linear: .*{says}"):
        int4_linear(**args)


def test_an_activation_wants_gate_and_up():
    args = make((3, 128, 39, 64), torch.float16, more=False)
    with pytest.raises(ValueError, match=r"the gate's rows and up's must be as many, got 39"):
        int4_linear(**args, activation="silu")


# ------------------------------------------------------------------------------------ many tokens


@pytest.fixture
def no_workspaces():
    free_workspaces()
    yield
    free_workspaces()


@each_shape
@each_dtype
@each_kind
def test_weights_are_dequantized_with_one_rounding(shape, dtype, kind, device):
    """Bit for bit: a scale times a code is exact in float32, and so rounded once."""
    skip_bfloat16_in_the_interpreter(device, dtype)
    args = make(shape, dtype, device, kind)
    _, k, n, group_size = shape
    packed, scales, zeros, minima = (
        args.get(name) for name in ("packed", "scales", "zeros", "minima")
    )
    weight, buffer = guarded(torch.full((n, k), float("nan"), dtype=dtype, device=device), 7.0)
    launch_dequantize_int4(packed, scales, zeros, minima, weight, group_size=group_size)
    wanted = dequantize_int4(packed, scales, zeros, k, group_size, torch.float32, minima)
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


def test_the_workspace_is_one_and_as_large_as_the_largest_layer(device, no_workspaces):
    for n, k in ((8, 64), (40, 128), (8, 64)):
        launch_int4_linear(**make((MAX_TOKENS + 1, k, n, 64), torch.float16, device))
    assert workspace_bytes() == workspace_bytes(device_of(device)) == 2 * 40 * 128
    launch_int4_linear(**make((MAX_TOKENS, 256, 40, 64), torch.float16, device))
    assert workspace_bytes() == 2 * 40 * 128  # few tokens want none
    assert workspace_bytes(torch.device("meta")) == 0


def device_of(device):
    return torch.empty(0, device=device).device  # with its index


@pytest.mark.gpu
def test_a_captured_workspace_stays_where_it_is(no_workspaces):
    args = make((MAX_TOKENS + 1, 128, 40, 64), torch.float16, "cuda")
    wanted = int4_linear(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = int4_linear(**args)
    int4_linear(**make((MAX_TOKENS + 1, 256, 80, 64), torch.float16, "cuda"))
    taken = [torch.full((40 * 128,), 7.0, device="cuda", dtype=torch.half) for _ in range(9)]
    graph.replay()
    assert torch.equal(got, wanted)
    assert all(bool((t == 7.0).all()) for t in taken)
    assert workspace_bytes() == 2 * (40 * 128 + 80 * 256)
