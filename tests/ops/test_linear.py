"""Linear layers for few tokens: the reference against float64, the kernels against both."""

import json
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import gelu, linear, silu

from guards import GuardedEmpty, guarded
from linear_cases import assert_as_good, each_dtype, skip_bfloat16_in_the_interpreter
from llmfast_kernels.common.device import Device
from llmfast_kernels.common.options import launch_options
from llmfast_kernels.linear import dense_linear, gated_linear, kernel, launch_tables
from llmfast_kernels.linear import launch as launches
from llmfast_kernels.linear.kernel import launch_dense_linear, launch_gated_linear
from llmfast_kernels.linear.launch import Launch, choose_launch
from llmfast_kernels.linear.launch_tables import BadTable, read_table, table_of, write_table
from llmfast_kernels.linear.reference import dense_linear_reference, gated_linear_reference

GEMV = Launch("gemv", 4, 64, num_warps=2)
TILES = Launch("tiles", 16, 32, num_warps=2, num_stages=2)
CUBLAS, UNFUSED = Launch("cublas"), Launch("unfused")
EXTRAS = ["plain", "bias", "residual", "both"]
ACTIVATIONS = {"silu": silu, "gelu_tanh": partial(gelu, approximate="tanh"), "gelu": gelu}
# tokens, in_features, out_features: odd, prime, and on either side of a tile's edge
SHAPES = [(1, 1, 1), (1, 67, 5), (1, 128, 31), (1, 193, 8), (3, 32, 16), (5, 67, 33), (17, 70, 37)]

on_cuda = torch.cuda.is_available()
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
needs_cuda = pytest.mark.skipif(not on_cuda, reason="wants a CUDA GPU")


def make(shape, dtype, device="cpu", extras="both", gated=False):
    """Make x, weight and the keyword arguments; results are about 1."""
    tokens, k, n = shape
    gen = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(size, generator=gen).to(device, dtype)

    rows = 2 * n if gated else n
    x, weight, more = randn(tokens, k), randn(rows, k) / k**0.5, {}
    if extras in ("bias", "both"):
        more["bias"] = randn(rows)
    if extras in ("residual", "both") and not gated:
        more["residual"] = randn(tokens, n)
    return x, weight.to(dtype), more


def in_float64(x, weight, bias=None, residual=None, activation=None):
    y = linear(x.double(), weight.double(), None if bias is None else bias.double())
    if activation is not None:
        gate, up = y.chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate) * up
    return y if residual is None else y + residual.double()


def tiers(tokens):
    return [GEMV, TILES] if tokens == 1 else [TILES]


@each_shape
@pytest.mark.parametrize("extras", EXTRAS)
def test_reference_is_a_linear_layer(shape, extras):
    x, weight, more = make(shape, torch.float64, extras=extras)
    got = dense_linear_reference(x, weight, **more)
    wanted = (x[:, None] * weight).sum(-1) + more.get("bias", 0.0) + more.get("residual", 0.0)
    torch.testing.assert_close(got, wanted)
    x, weight, more = make(shape, torch.float64, extras=extras, gated=True)
    got = gated_linear_reference(x, weight, **more)
    torch.testing.assert_close(got, in_float64(x, weight, **more, activation="silu"))


@each_shape
@each_dtype
@pytest.mark.parametrize("extras", EXTRAS)
def test_kernels_match_float64(shape, dtype, extras, device):
    skip_bfloat16_in_the_interpreter(device, dtype)
    x, weight, more = make(shape, dtype, device, extras)
    reference, exact = dense_linear_reference(x, weight, **more), in_float64(x, weight, **more)
    for launch in tiers(len(x)):
        got = launch_dense_linear(x, weight, **more, launch=launch)
        assert got.is_contiguous()
        assert_as_good(got, reference, exact)


@each_shape
@each_dtype
@each_activation
@pytest.mark.parametrize("extras", ["plain", "bias"])
def test_gated_kernels_match_float64(shape, dtype, activation, extras, device):
    skip_bfloat16_in_the_interpreter(device, dtype)
    x, weight, more = make(shape, dtype, device, extras, gated=True)
    reference = gated_linear_reference(x, weight, **more, activation=activation)
    exact = in_float64(x, weight, **more, activation=activation)
    for launch in tiers(len(x)):
        got = launch_gated_linear(x, weight, **more, activation=activation, launch=launch)
        assert_as_good(got, reference, exact)


@each_dtype
def test_it_rounds_where_a_layer_and_an_activation_round(dtype, device):
    """Sums of small integers are exact, so the bits must be those of the two steps."""
    skip_bfloat16_in_the_interpreter(device, dtype)
    gen = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, (5, 40), generator=gen).to(device, dtype)
    weight = torch.randint(-60, 60, (34, 40), generator=gen).to(device, dtype)
    residual = torch.randn(5, 34, generator=gen).to(device, dtype)
    assert linear(x, weight).abs().max() > 2 / torch.finfo(dtype).eps / 8  # so sums are rounded
    for tokens in (1, 5):
        for launch in tiers(tokens):
            some = x[:tokens].contiguous()
            got = launch_dense_linear(some, weight, residual=residual[:tokens], launch=launch)
            wanted = dense_linear_reference(some, weight, residual=residual[:tokens])
            assert torch.equal(got, wanted)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # no example changes a fixture
)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 150), st.integers(1, 50)),
    extras=st.sampled_from(EXTRAS),
    gated=st.booleans(),
    tile=st.sampled_from([(16, 16), (16, 64), (32, 32)]),
)
def test_kernels_match_at_any_shape(device, shape, extras, gated, tile):
    x, weight, more = make(shape, torch.float16, device, extras, gated)
    for launch in tiers(len(x)):
        launch = replace(launch, block_n=tile[0], block_k=tile[1])
        run = launch_gated_linear if gated else launch_dense_linear
        reference = gated_linear_reference if gated else dense_linear_reference
        exact = in_float64(x, weight, **more, activation="silu" if gated else None)
        got = run(x, weight, **more, launch=launch)
        assert_as_good(got, reference(x, weight, **more), exact)


@each_dtype
def test_tiers_agree(dtype, device):
    """Tokens one by one and together differ in the order of the sum only."""
    skip_bfloat16_in_the_interpreter(device, dtype)
    x, weight, more = make((4, 131, 37), dtype, device)
    exact = in_float64(x, weight, **more)
    for launch in (TILES, CUBLAS, replace(TILES, block_n=32, block_k=64)):
        got = launch_dense_linear(x, weight, **more, launch=launch)
        assert_as_good(got, dense_linear_reference(x, weight, **more), exact)
    for i in range(4):
        row = {"bias": more["bias"], "residual": more["residual"][i]}
        got = launch_dense_linear(x[i], weight, **row, launch=GEMV)
        assert got.shape == (37,)
        assert_as_good(got, dense_linear_reference(x[i], weight, **row), exact[i])


def test_the_library_s_tiers_compute_the_same(device):
    x, weight, more = make((5, 67, 33), torch.float16, device)
    before = more["residual"].clone()
    got = launch_dense_linear(x, weight, **more, launch=CUBLAS)
    assert torch.equal(got, dense_linear_reference(x, weight, **more))
    assert torch.equal(more["residual"], before)
    x, weight, more = make((5, 67, 33), torch.float16, device, gated=True)
    got = launch_gated_linear(x, weight, **more, activation="gelu", launch=UNFUSED)
    exact = in_float64(x, weight, **more, activation="gelu")
    assert_as_good(got, gated_linear_reference(x, weight, **more, activation="gelu"), exact)


@pytest.mark.parametrize("gated", [False, True], ids=["dense", "gated"])
@pytest.mark.parametrize("shape", [(1, 67, 5), (3, 67, 33)], ids=str)
def test_nothing_outside_the_tensors_is_read_or_written(shape, gated, device, monkeypatch):
    empty = GuardedEmpty()
    x, weight, more = make(shape, torch.float16, device, gated=gated)
    exact = in_float64(x, weight, **more, activation="silu" if gated else None)
    reference = (gated_linear_reference if gated else dense_linear_reference)(x, weight, **more)
    nan = float("nan")  # a stray read makes NaN
    x, weight = guarded(x, nan)[0], guarded(weight, nan)[0]
    more = {name: guarded(t, nan)[0] for name, t in more.items()}
    monkeypatch.setattr(torch, "empty", empty)
    for launch in tiers(len(x)):
        run = launch_gated_linear if gated else launch_dense_linear
        assert_as_good(run(x, weight, **more, launch=launch), reference, exact)
        empty.assert_bands_are_whole(reference.numel())
        empty.buffers.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3])
def test_offsets_pass_2_to_the_31(tokens):
    k = 16384
    n = 2**31 // k + 3
    weight = torch.zeros(n, k, device="cuda", dtype=torch.bfloat16)
    picked = torch.tensor([0, 1, n - 5, n - 1], device="cuda")
    x, some, _ = make((tokens, k, len(picked)), torch.bfloat16, "cuda", "plain")
    weight[picked] = some
    got = dense_linear(x, weight)[:, picked]
    assert_as_good(got, linear(x, some), in_float64(x, some))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 31, 64, 100, 128, 129])
@pytest.mark.parametrize("gated", [False, True], ids=["dense", "gated"])
@each_dtype
def test_the_operation_at_a_model_s_shapes(tokens, gated, dtype):
    """The default launches, whatever the table says."""
    for k, n in ((4096, 6144), (4096, 4096), (14336, 4096), (576, 1536)):
        x, weight, more = make((tokens, k, n), dtype, "cuda", "both", gated)
        op, reference = dense_linear, dense_linear_reference
        if gated:
            op, reference = gated_linear, gated_linear_reference
        exact = in_float64(x, weight, **more, activation="silu" if gated else None)
        assert_as_good(op(x, weight, **more), reference(x, weight, **more), exact)


@pytest.mark.gpu
def test_more_tokens_and_float32_run_cublas(device):
    for tokens, dtype in ((129, torch.float16), (1, torch.float32), (0, torch.float16)):
        x, weight, more = make((tokens, 64, 32), dtype, device)
        assert torch.equal(
            dense_linear(x, weight, **more), dense_linear_reference(x, weight, **more)
        )


def test_op_gives_what_its_implementation_gives(device):
    x, weight, more = make((3, 40, 24), torch.float16, device)
    wanted = launch_dense_linear if device.type == "cuda" else dense_linear_reference
    assert torch.equal(dense_linear(x, weight, **more), wanted(x, weight, **more))
    x, weight, more = make((3, 40, 24), torch.float16, device, gated=True)
    wanted = launch_gated_linear if device.type == "cuda" else gated_linear_reference
    assert torch.equal(gated_linear(x, weight, **more), wanted(x, weight, **more))
    deep = x.view(1, 3, 1, 40)
    assert gated_linear(deep, weight, **more).shape == (1, 3, 1, 24)


ONES = partial(torch.ones, dtype=torch.float32)


@pytest.mark.parametrize(
    ("args", "more", "error", "says"),
    [
        ((ONES(2, 4).int(), ONES(3, 4)), {}, TypeError, "x must be .*torch.int32"),
        ((ONES(()), ONES(3, 4)), {}, ValueError, r"x must be contiguous.*got shape \(\)"),
        ((ONES(4, 2).t(), ONES(3, 4)), {}, ValueError, r"x must be contiguous.*strides \(1, 2\)"),
        ((ONES(2, 4), ONES(3, 5)), {}, ValueError, r"weight .*, 4\).*got shape \(3, 5\)"),
        ((ONES(2, 4), ONES(4)), {}, ValueError, r"weight .*got shape \(4,\)"),
        ((ONES(2, 4), ONES(4, 3).t()), {}, ValueError, r"weight .*strides \(1, 3\)"),
        ((ONES(2, 4), ONES(3, 4).half()), {}, TypeError, "weight .*float32, got torch.float16"),
        ((ONES(2, 4), ONES(3, 4, device="meta")), {}, ValueError, "weight .*on cpu.* on meta"),
        ((ONES(2, 4), ONES(3, 4), ONES(4)), {}, ValueError, r"bias must be \(3,\).*\(4,\)"),
        ((ONES(2, 4), ONES(3, 4)), {"residual": ONES(3)}, ValueError, r"residual must be \(2, 3\)"),
        ((ONES(2, 4), ONES(3, 4, requires_grad=True)), {}, RuntimeError, "no backward"),
        (
            (ONES(2, 4), ONES(3, 4)),
            {"residual": ONES(2, 3, requires_grad=True)},
            RuntimeError,
            "no backward",
        ),
    ],
)
def test_bad_arguments_are_named(args, more, error, says):
    with pytest.raises(error, match=f"^dense_linear: .*{says}"):
        dense_linear(*args, **more)


def test_bad_arguments_of_a_gated_layer_are_named():
    with pytest.raises(ValueError, match=r"^gated_linear: .*even; got shape \(3, 4\)"):
        gated_linear(ONES(2, 4), ONES(3, 4))
    with pytest.raises(ValueError, match=r"^gated_linear: activation must be silu, .*'relu'"):
        gated_linear(ONES(2, 4), ONES(6, 4), activation="relu")


# ------------------------------------------------------------------------------------- launches

TOY = Device("NVIDIA Toy", "sm_77", 3, 99 * 1024, 2**20)
H100 = Device("NVIDIA H100 80GB HBM3", "sm_90", 132, 227 * 1024, 50 * 2**20)
GPUS = [replace(H100, shared_memory=size * 1024) for size in (99, 163, 227)]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.shared_memory)
@pytest.mark.parametrize("operation", launches.VENDOR)
def test_heuristic_launches_fit(operation, gpu):
    for n, k in ((1, 1), (64, 576), (4096, 4096), (6144, 4096), (14336, 4096), (4096, 14336)):
        for tokens in range(1, launches.MAX_TOKENS + 2):
            launch = choose_launch(operation, n, k, tokens, gpu)
            assert launch.fits(tokens, operation == "gated_linear", gpu.shared_memory)
            assert (launch.tier == "gemv") == (tokens == 1)
            if tokens > launches.MAX_TOKENS:
                assert launch == launches.VENDOR[operation]


def test_a_table_takes_precedence_over_the_heuristic():
    key = ("dense_linear", 6144, 4096, 16)

    def choose(tokens, table=None):
        return choose_launch("dense_linear", 6144, 4096, tokens, H100, table)

    table = {key: TILES}
    assert choose(2, table) == choose(16, table) == TILES
    assert choose(17, table) == choose(17) != TILES
    assert choose(16) != TILES and choose(1, table).tier == "gemv"
    beyond = {("dense_linear", 6144, 4096, 256): TILES}
    assert choose(129, beyond) == CUBLAS


@pytest.mark.parametrize("tokens", [1, 5])
def test_launch_options_choose_the_library(tokens, device, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a kernel of ours was launched")

    monkeypatch.setattr(kernel, "_gemv", refuse)
    monkeypatch.setattr(kernel, "_tiles", refuse)
    x, weight, more = make((tokens, 64, 34), torch.float16, device)
    with launch_options(library_linear=True):
        got = launch_dense_linear(x, weight, **more)
        launch_gated_linear(x, weight)
    assert torch.equal(got, dense_linear_reference(x, weight, **more))
    with pytest.raises(AssertionError, match="of ours"):
        launch_dense_linear(x, weight)


# ---------------------------------------------------------------------------------------- tables

TABLE = {("dense_linear", 6144, 4096, 1): GEMV, ("gated_linear", 14336, 4096, 16): TILES}


def test_a_table_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "deep/table.json"
    write_table(path, TOY, TABLE)
    assert read_table(path, TOY) == TABLE
    data = json.loads(path.read_text())
    assert (data["gpu"], data["arch"], data["sms"]) == ("NVIDIA Toy", "sm_77", 3)
    assert data["launches"][0] == {
        "operation": "dense_linear",
        "n": 6144,
        "k": 4096,
        "tokens": 1,
        **asdict(GEMV),
    }


def test_a_table_is_for_a_name_or_for_an_architecture_and_its_sms(tmp_path):
    path = tmp_path / "table.json"
    write_table(path, TOY, TABLE)
    assert read_table(path, replace(TOY, name="NVIDIA Other")) == TABLE
    assert read_table(path, replace(TOY, sm_count=4)) == TABLE
    with pytest.raises(BadTable, match="is for 'NVIDIA Toy', this GPU is 'NVIDIA Other'"):
        read_table(path, replace(TOY, name="NVIDIA Other", sm_count=4))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Return empty folders for the user's tables and for the package's."""
    own, packaged = tmp_path / "own", tmp_path / "packaged"
    monkeypatch.setattr(launch_tables, "OWN", own)
    monkeypatch.setattr(launch_tables, "PACKAGED", packaged)
    table_of.cache_clear()
    yield own, packaged
    table_of.cache_clear()


def _damage(text):
    return lambda path: path.write_text(text(path.read_text()))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_damage(lambda text: text[: len(text) // 2]), "cannot be read"),
        (
            _damage(lambda text: text.replace("NVIDIA Toy", "NVIDIA Other").replace("_77", "_78")),
            "NVIDIA Other",
        ),
        (_damage(lambda text: text.replace('"schema": 2', '"schema": 1')), "schema 2"),
        (_damage(lambda text: text.replace('"n": 6144', '"n": "6144"')), "damaged"),
        (_damage(lambda text: text.replace('"block_k": 64', '"block_k": 65')), "damaged"),
        (_damage(lambda text: text.replace('"tier": "gemv"', '"tier": "magic"')), "damaged"),
        (_damage(lambda text: text.replace('"tier": "gemv"', '"tier": "unfused"')), "damaged"),
        (_damage(lambda text: text.replace('"num_warps"', '"warps"')), "damaged"),
        (_damage(lambda text: text.replace('"tokens": 1,', '"tokens": 2,')), "damaged"),
        (_damage(lambda text: "[]"), "schema 2"),
    ],
)
def test_a_bad_table_is_refused_and_the_heuristic_serves(damage, says, folders, caplog):
    path = folders[0] / launch_tables.table_name(TOY)
    write_table(path, TOY, TABLE)
    damage(path)
    with pytest.raises(BadTable, match=says):
        read_table(path, TOY)
    assert table_of(TOY) is None
    assert table_of(TOY) is None
    assert len(caplog.records) == 1 and says in caplog.text


def test_the_users_table_comes_first_then_the_name_then_the_sms(folders, caplog):
    own, packaged = folders
    gpu = replace(TOY, name="A (B)")
    write_table(packaged / launch_tables.shared_table_name(gpu), TOY, TABLE)
    assert table_of(gpu) == TABLE
    more_sms = replace(gpu, sm_count=4)
    assert table_of(more_sms) is None
    assert "llmfast tune" in caplog.text and "A (B) (sm_77, 4 SMs)" in caplog.text
    assert table_of(more_sms) is None and len(caplog.records) == 1  # once
    named = {("dense_linear", 8, 8, 1): GEMV}
    write_table(packaged / launch_tables.table_name(gpu), gpu, named)
    table_of.cache_clear()
    assert table_of(gpu) == named
    write_table(own / launch_tables.table_name(gpu), gpu, {})
    table_of.cache_clear()
    assert table_of(gpu) == {}
    assert len(caplog.records) == 1


def test_an_h200_has_the_table_of_an_h100():
    h200, pcie = replace(H100, name="NVIDIA H200"), replace(H100, name="H100 PCIe", sm_count=114)
    shared = launch_tables.PACKAGED / launch_tables.shared_table_name(h200)
    assert read_table(shared, h200) == read_table(shared, H100) != {}
    assert not (launch_tables.PACKAGED / launch_tables.shared_table_name(pcie)).exists()


def test_every_packaged_table_is_good():
    for path in launch_tables.PACKAGED.glob("*.json"):
        data = json.loads(path.read_text())
        gpu = replace(H100, name=data["gpu"], arch=data["arch"], sm_count=data["sms"])
        assert path.name in (launch_tables.table_name(gpu), launch_tables.shared_table_name(gpu))
        for (operation, _, _, tokens), launch in read_table(path, gpu).items():
            assert launch.fits(tokens, operation == "gated_linear", gpu.shared_memory)
            assert tokens == launches.bucket(tokens)


@needs_cuda
def test_the_launch_follows_the_table_of_the_gpu(monkeypatch):
    grids, table = [], {("dense_linear", 24, 40, 16): TILES}
    monkeypatch.setattr(kernel, "table_of", lambda gpu: table)
    kernel._choose.cache_clear()
    monkeypatch.setattr(kernel, "_tiles", lambda grid, args, **options: grids.append(grid))
    x, weight, _ = make((3, 40, 24), torch.float16, "cuda")
    launch_dense_linear(x, weight)
    assert grids == [(2,)]
    kernel._choose.cache_clear()
