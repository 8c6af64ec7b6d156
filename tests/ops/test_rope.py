"""apply_rope: the reference against the formula and transformers' own, the kernel against it."""

from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from guards import GuardedEmpty, guarded
from llmfast_kernels.rope import apply_rope, kernel
from llmfast_kernels.rope.kernel import (
    MAX_HEAD_DIM,
    choose_launch,
    launch_apply_rope,
)
from llmfast_kernels.rope.reference import apply_rope_reference
from rope_cases import (
    MAX_POSITIONS,
    each_dtype,
    make_tables,
    needs_cuda,
    skip_what_the_interpreter_cannot_round,
)

SHAPES = [  # tokens, q_heads, kv_heads, head_dim, rotary_dim
    (1, 1, 1, 2, 2),
    (1, 32, 8, 128, 128),
    (5, 6, 2, 64, 64),
    (3, 9, 3, 80, 32),  # partial, no power of 2
    (7, 3, 1, 67, 10),  # odd heads of an odd size
    (3, 2, 5, 96, 94),  # more heads of k than of q
    (2, 1, 1, 2050, 1026),  # a head is more than a tile
    (130, 2, 1, 64, 32),  # over the limit of few tokens
    (0, 4, 2, 64, 64),
]

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
each_tables = pytest.mark.parametrize("tables", ["same", "float32"], ids=lambda t: f"tables-{t}")
each_pairing = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def make(shape, dtype, device="cpu", tables="same"):
    tokens, q_heads, kv_heads, head_dim, rotary_dim = shape
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(tokens, q_heads, head_dim, generator=gen).to(device, dtype)
    k = torch.randn(tokens, kv_heads, head_dim, generator=gen).to(device, dtype)
    cos, sin = make_tables(rotary_dim, dtype if tables == "same" else torch.float32, device)
    positions = torch.randint(MAX_POSITIONS, (tokens,), generator=gen)
    return q, k, cos, sin, positions.to(device)


def assert_same(actual, expected):
    """Assert equality bit for bit: all roundings are known, and no sum has a choice of order."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.is_contiguous()
        assert torch.equal(a, e)


def check_kernel(args, interleaved):
    expected = apply_rope_reference(*args, interleaved=interleaved)
    assert_same(launch_apply_rope(*args, interleaved=interleaved), expected)


def by_formula(x, positions, rotary_dim, interleaved):
    """Rotate each pair as a complex number by exp(i * angle), in float64."""
    x = x.double()
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    pairs = turned.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    axis = -1 if interleaved else -2
    numbers = torch.complex(*pairs.unbind(axis))
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim)
    angles = positions.double()[:, None, None] * frequencies
    numbers = numbers * torch.exp(1j * angles)
    turned = torch.stack((numbers.real, numbers.imag), axis).flatten(-2)
    return torch.cat((turned, rest), -1)


@each_pairing
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_shape
def test_reference_matches_formula_in_float64(shape, dtype, interleaved):
    """Assert two epsilons of the pair's length: cos or sin, product and sum are rounded."""
    q, k, cos, sin, positions = make(shape, dtype)
    got = apply_rope_reference(q, k, cos, sin, positions, interleaved=interleaved)
    for out, x in zip(got, (q, k), strict=True):
        assert out.dtype == dtype
        expected = by_formula(x, positions, shape[-1], interleaved)
        bound = 4 * torch.finfo(dtype).eps * x.abs().amax() if x.numel() else 0
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=float(bound))


MODELS = {  # the module, interleaved pairs, whether it turns a part of a head, tables' dtype
    "llama": (modeling_llama, False, False, "same"),
    "gpt_neox": (modeling_gpt_neox, False, True, "same"),
    "glm": (modeling_glm, True, True, "same"),
    "cohere": (modeling_cohere, True, False, "float32"),
}


@each_dtype
@pytest.mark.parametrize("model", MODELS)
@each_shape
def test_reference_is_what_transformers_computes(shape, model, dtype):
    module, interleaved, partial_rotary, tables = MODELS[model]
    if shape[-1] != shape[-2] and not partial_rotary:
        pytest.skip(f"{model} turns whole heads")
    q, k, cos, sin, positions = make(shape, dtype)
    if tables == "float32":  # a layer that computes in float32 still has tables cast to the dtype
        cos, sin = cos.float(), sin.float()
    layer_tables = [t[positions][None].to(dtype) for t in (cos, sin)]
    if model == "cohere":
        layer_tables = [t.repeat_interleave(2, -1) for t in layer_tables]
    else:  # GLM repeats the first half by itself
        layer_tables = [torch.cat((t, t), -1) for t in layer_tables]
    heads_first = (t.transpose(0, 1)[None] for t in (q, k))
    expected = module.apply_rotary_pos_emb(*heads_first, *layer_tables)
    got = apply_rope_reference(q, k, cos, sin, positions, interleaved=interleaved)
    assert_same(got, [t[0].transpose(0, 1).contiguous() for t in expected])


def test_tables_are_the_first_half_of_a_rotary_modules():
    config = modeling_llama.LlamaConfig(hidden_size=64, num_attention_heads=2)
    x = torch.randn(1, 9, 2, 32, dtype=torch.bfloat16)
    position_ids = torch.arange(9)[None]
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(x, position_ids)
    assert cos.dtype == x.dtype and cos.shape == (1, 9, 32)
    expected = modeling_llama.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    tables = (t[0, :, :16].contiguous() for t in (cos, sin))
    assert_same(apply_rope(x[0], x[0], *tables, position_ids[0]), [t[0] for t in expected])


@each_pairing
@each_tables
@each_dtype
@each_shape
def test_kernel_matches_reference(shape, dtype, tables, interleaved, device):
    skip_what_the_interpreter_cannot_round(device, dtype)
    if device.type == "cpu" and shape[0] > 100 and (interleaved or tables == "float32"):
        pytest.skip("a second of the interpreter's time; the programs are those of fewer tokens")
    check_kernel(make(shape, dtype, device, tables), interleaved)


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # no example changes a fixture
)
@given(
    tokens=st.integers(0, 4),
    heads=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    half=st.integers(1, 40),
    rest=st.integers(0, 70),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    interleaved=st.booleans(),
)
def test_kernel_matches_reference_at_any_size(
    device, tokens, heads, half, rest, dtype, interleaved
):
    check_kernel(make((tokens, *heads, 2 * half + rest, 2 * half), dtype, device), interleaved)


@each_dtype
def test_float32_tables_lose_no_more_than_the_layer(dtype, device):
    """Hold both to float64: at most twice the error of plain PyTorch."""
    skip_what_the_interpreter_cannot_round(device, dtype)
    shape = (5, 8, 2, 128, 128)
    args = make(shape, dtype, device, "float32")
    same = make(shape, dtype, device)
    for ours, layers, x in zip(
        launch_apply_rope(*args), apply_rope_reference(*same), args[:2], strict=True
    ):
        exact = by_formula(x.cpu(), args[-1].cpu(), 128, False)
        scale = exact.square().mean().sqrt()
        error, layers_error = (
            float((y.cpu().double() - exact).square().mean().sqrt() / scale) for y in (ours, layers)
        )
        assert error <= max(2 * layers_error, 4 * torch.finfo(dtype).eps)
        assert dtype == torch.float32 or error < layers_error  # one rounding, not three


@each_pairing
@pytest.mark.parametrize("layout", ["merged", "heads first", "odd"])
def test_kernel_takes_strided_views(layout, interleaved, device):
    shape = tokens, q_heads, kv_heads, head_dim, _ = (5, 6, 2, 64, 48)
    q, k, *rest = make(shape, torch.float16, device)
    if layout == "merged":
        v = torch.full_like(k, float("nan"))
        merged = torch.cat((q, k, v), 1).view(tokens, -1)
        widths = [h * head_dim for h in (q_heads, kv_heads, kv_heads)]
        q_view, k_view, _ = (t.unflatten(1, (-1, head_dim)) for t in merged.split(widths, 1))
    elif layout == "heads first":
        q_view, k_view = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k))
    else:  # strides that are no multiples of 16, and a first element that is not aligned
        nan = float("nan")
        q_view, k_view = (torch.nn.functional.pad(t, (3, 4, 1, 0), value=nan) for t in (q, k))
        q_view, k_view = q_view[:, 1:, 3:-4], k_view[:, 1:, 3:-4]
    assert torch.equal(q_view, q) and torch.equal(k_view, k) and not q_view.is_contiguous()
    expected = apply_rope_reference(q, k, *rest, interleaved=interleaved)
    assert_same(launch_apply_rope(q_view, k_view, *rest, interleaved=interleaved), expected)
    assert_same(apply_rope_reference(q_view, k_view, *rest, interleaved=interleaved), expected)


def test_one_token_of_a_tensor_with_any_stride(device):
    """PyTorch lets a dimension of size 1 have any stride, 1 too."""
    q, k, *rest = make((1, 1, 1, 64, 64), torch.float16, device)
    view = q.as_strided((1, 1, 64), (1, 1, 1))
    assert_same(launch_apply_rope(view, k, *rest), apply_rope_reference(q, k, *rest))


@pytest.mark.parametrize("positions", [[7, 7, 0, 49, 3], [49, 48, 2, 1, 0], [0] * 5], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_positions_are_in_any_order(positions, dtype, device):
    q, k, cos, sin, _ = make((5, 4, 2, 64, 64), torch.float16, device)
    ids = torch.tensor(positions, dtype=dtype, device=device)
    got = launch_apply_rope(q, k, cos, sin, ids)
    assert_same(got, apply_rope_reference(q, k, cos, sin, ids))
    for token, position in enumerate(positions):  # each as if it were alone
        one = slice(token, token + 1)
        alone = launch_apply_rope(
            q[one], k[one], cos[position][None], sin[position][None], ids[:1] * 0
        )
        assert_same([t[one] for t in got], alone)
    if positions == [0] * 5:
        assert_same(got, (q, k))


def test_tokens_change_axis_past_the_grids_limit(device, monkeypatch):
    args = make((5, 6, 2, 64, 32), torch.float16, device)
    monkeypatch.setattr(kernel, "_MAX_GRID_Y", 4)
    check_kernel(args, interleaved=False)


@each_pairing
@pytest.mark.parametrize(
    "shape", [(3, 5, 1, 67, 10), (1, 32, 8, 128, 128), (2, 3, 3, 80, 32)], ids=str
)
def test_nothing_outside_the_tensors_is_read_or_written(shape, interleaved, device, monkeypatch):
    empty = GuardedEmpty()
    *plain, positions = make(shape, torch.float16, device)
    positions[0], positions[-1] = 0, MAX_POSITIONS - 1
    expected = apply_rope_reference(*plain, positions, interleaved=interleaved)
    args = [guarded(t, band=float("nan"))[0] for t in plain]  # a stray read makes NaN
    # a stray position is one outside of the tables
    args.append(guarded(positions, band=MAX_POSITIONS)[0])
    monkeypatch.setattr(torch, "empty", empty)
    got = launch_apply_rope(*args, interleaved=interleaved)

    assert_same(got, expected)
    tokens, q_heads, kv_heads, head_dim, _ = shape
    empty.assert_bands_are_whole(*(tokens * heads * head_dim for heads in (q_heads, kv_heads)))


def test_nan_and_infinity_stay_in_their_pair(device):
    q, k, *rest = make((2, 2, 1, 64, 32), torch.float16, device)
    q[0, 1, 3], q[1, 0, 40], k[1, 0, 5] = float("nan"), float("inf"), float("inf")
    got = launch_apply_rope(q, k, *rest)
    for actual, expected in zip(got, apply_rope_reference(q, k, *rest), strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.nan_to_num(), expected.nan_to_num())
    assert got[0].isnan().nonzero().tolist() == [[0, 1, 3], [0, 1, 19]]
    assert got[0][1, 0, 40].isinf()  # behind the pairs: copied


@pytest.mark.parametrize("layout", ["tokens first", "heads first"])
@needs_cuda(reason="10 GiB and a GPU's speed: offsets past 2**31 elements")
def test_offsets_pass_2_to_the_31(layout):
    heads, head_dim = 32, 128
    tokens = 2**31 // (heads * head_dim) + 5
    shape = (heads, tokens, head_dim) if layout == "heads first" else (tokens, heads, head_dim)
    q = torch.ones(shape, device="cuda", dtype=torch.bfloat16)
    if layout == "heads first":
        q = q.transpose(0, 1)
    picked = torch.tensor([0, 1, tokens - 7, tokens - 6, tokens - 5, tokens - 1], device="cuda")
    some, few_k, cos, sin, few = make((6, heads, 1, head_dim, head_dim), torch.bfloat16, "cuda")
    q[picked] = some
    k = torch.ones(tokens, 1, head_dim, device="cuda", dtype=torch.bfloat16)
    k[picked] = few_k
    positions = torch.zeros(tokens, device="cuda", dtype=torch.int64)
    positions[picked] = few
    got = launch_apply_rope(q, k, cos, sin, positions)
    assert_same([t[picked] for t in got], apply_rope_reference(some, few_k, cos, sin, few))


@needs_cuda(reason="9 GiB: offsets past 2**31 elements")
def test_a_tables_offset_passes_2_to_the_31():
    q, k, cos, sin, _ = make((2, 2, 1, 64, 64), torch.bfloat16, "cuda")
    rows = 2**31 // 32 + 2
    tables = [torch.zeros(rows, 32, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    for table, values in zip(tables, (cos, sin), strict=True):
        table[-1], table[-2] = values[3], values[7]
    positions = torch.tensor([rows - 1, rows - 2], device="cuda")
    expected = apply_rope_reference(q, k, cos, sin, torch.tensor([3, 7], device="cuda"))
    assert_same(launch_apply_rope(q, k, *tables, positions), expected)


@pytest.mark.gpu
def test_the_second_launch_finds_the_right_variant(device):
    """A launch never meets a variant that was compiled for other arguments."""
    for _ in range(2):
        for tokens, dtype, tables in [
            (1, torch.float16, "same"),
            (1, torch.bfloat16, "same"),
            (1, torch.bfloat16, "float32"),
            (200, torch.bfloat16, "float32"),
        ]:
            q, k, *tables, ids = make((tokens, 4, 2, 64, 64), dtype, device, tables)
            for position_ids in (ids, ids.int()):
                check_kernel((q, k, *tables, position_ids), False)
                check_kernel((q, k, *tables, position_ids), True)
            padded = torch.nn.functional.pad(q, (0, 3, 0, 1))[:, :4, :64]  # strides of 67 and 335
            check_kernel((padded, k, *tables, ids), False)


@each_pairing
def test_arguments_are_left_unchanged(interleaved, device):
    args = make((3, 4, 2, 64, 32), torch.float16, device)
    before = [a.clone() for a in args]
    launch_apply_rope(*args, interleaved=interleaved)
    apply_rope_reference(*args, interleaved=interleaved)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


@each_pairing
def test_op_gives_what_its_implementation_gives(device, interleaved):
    args = make((3, 4, 2, 64, 32), torch.float16, device)
    impl = launch_apply_rope if device.type == "cuda" else apply_rope_reference
    assert_same(apply_rope(*args, interleaved=interleaved), impl(*args, interleaved=interleaved))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launch_is_on_the_tensors_device():
    args = make((3, 4, 2, 64, 64), torch.bfloat16, "cuda:1")
    with torch.cuda.device(0):
        assert_same(apply_rope(*args), apply_rope_reference(*args))


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("q", torch.ones(2, 4, 8).int(), TypeError, "q must be float32.*torch.int32"),
        ("k", torch.ones(2, 1, 8).half(), TypeError, "k .*torch.float32, got torch.float16"),
        ("cos", torch.ones(9, 3).half(), TypeError, "cos must be float32.*got torch.float16"),
        ("sin", torch.ones(9, 3).double(), TypeError, "sin .*torch.float32, got torch.float64"),
        ("positions", torch.ones(2), TypeError, "positions must be int32.*torch.float32"),
        ("q", torch.ones(2, 32), ValueError, r"q must be \(tokens.*got \(2, 32\)"),
        ("q", torch.ones(2, 0, 8), ValueError, r"at least one head.*got \(2, 0, 8\)"),
        ("k", torch.ones(3, 1, 8), ValueError, r"k must be \(2, kv_heads, 8\).*\(3, 1, 8\)"),
        ("k", torch.ones(2, 1, 6), ValueError, r"k must be \(2, kv_heads, 8\).*\(2, 1, 6\)"),
        ("k", torch.ones(2, 0, 8), ValueError, r"k must be .*got \(2, 0, 8\)"),
        ("k", torch.ones(2, 8), ValueError, r"k must be .*got \(2, 8\)"),
        ("cos", torch.ones(9, 5), ValueError, r"at most q's head_dim 8; got \(9, 5\)"),
        ("cos", torch.ones(9, 0), ValueError, r"rotary_dim at least 2.*got \(9, 0\)"),
        ("cos", torch.ones(1, 9, 3), ValueError, r"cos must be .*got \(1, 9, 3\)"),
        ("sin", torch.ones(9, 4), ValueError, r"sin must have cos's shape \(9, 3\), got \(9, 4\)"),
        ("positions", torch.arange(3), ValueError, r"shape \(2,\).*got \(3,\)"),
        ("positions", torch.ones(1, 2).long(), ValueError, r"shape \(2,\).*got \(1, 2\)"),
        ("k", torch.ones(2, 1, 8, device="meta"), ValueError, "k must be on cpu .*got meta"),
        ("cos", torch.ones(9, 3, device="meta"), ValueError, "cos must be on cpu .*got meta"),
        ("sin", torch.ones(9, 3, device="meta"), ValueError, "sin must be on cpu .*got meta"),
        ("positions", torch.arange(2, device="meta"), ValueError, "positions must be on cpu"),
        ("q", torch.ones(2, 8, 4).mT, ValueError, r"q must have a contiguous last.*\(32, 1, 4\)"),
        ("k", torch.ones(2, 8, 4).mT, ValueError, r"k must have a contiguous last.*\(32, 1, 4\)"),
        ("cos", torch.ones(3, 9).t(), ValueError, r"must be contiguous, got strides \(1, 9\)"),
        ("sin", torch.ones(9, 6)[:, ::2], ValueError, r"must be contiguous.*, \(6, 2\) and"),
        ("positions", torch.arange(4)[::2], ValueError, r"must be contiguous.* and \(2,\)"),
        ("q", torch.ones(2, 4, 8, requires_grad=True), RuntimeError, "no backward"),
        ("k", torch.ones(2, 1, 8, requires_grad=True), RuntimeError, "no backward"),
        ("cos", torch.ones(9, 3, requires_grad=True), RuntimeError, "torch.no_grad"),
        ("sin", torch.ones(9, 3, requires_grad=True), RuntimeError, "torch.no_grad"),
    ],
)
def test_bad_arguments_are_named(name, value, error, says):
    args = {
        "q": torch.ones(2, 4, 8),
        "k": torch.ones(2, 1, 8),
        "cos": torch.ones(9, 3),
        "sin": torch.ones(9, 3),
        "positions": torch.arange(2),
    }
    apply_rope(**args)
    with pytest.raises(error, match=f"^apply_rope: .*{says}"):
        apply_rope(**args | {name: value})


def test_what_requires_grad_is_taken_under_no_grad():
    args = make((2, 2, 1, 8, 8), torch.float32)
    args[0].requires_grad = True
    with torch.no_grad():
        q, k = apply_rope(*args)
    assert not q.requires_grad and not k.requires_grad


def test_float64_takes_tables_of_float32():
    q, k = apply_rope(*make((2, 2, 1, 8, 8), torch.float64, tables="float32"))
    assert q.dtype == k.dtype == torch.float64


@needs_cuda(reason="CUDA launchers alone refuse float64")
def test_float64_is_refused_on_cuda():
    with pytest.raises(TypeError, match=r"apply_rope: q must be float32.*torch.float64 on cuda"):
        apply_rope(*make((2, 2, 1, 8, 8), torch.float64, "cuda"))


@pytest.mark.parametrize("norm", [False, True], ids=["no norm", "norm"])
@pytest.mark.parametrize("few_tokens", [False, True])
@pytest.mark.parametrize("n_heads", [1, 3, 8, 32, 128])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(2, 2), (67, 10), (128, 128), (128, 0), (4096, 4094)]
)
def test_launch_covers_the_head(n_heads, head_dim, rotary_dim, few_tokens, norm):
    launch = choose_launch(n_heads, head_dim, rotary_dim, few_tokens, norm)
    assert launch.block_r >= rotary_dim // 2
    assert launch.block_p >= head_dim - rotary_dim
    assert (launch.block_p == 0) == (head_dim == rotary_dim)
    assert (launch.block_r == 0) == (rotary_dim == 0)
    for block in (launch.block_h, launch.block_r, launch.block_p):
        assert block & (block - 1) == 0  # tl.arange takes powers of 2
    assert launch.num_warps in (1, 2, 4, 8)
    assert launch.block_h < 2 * n_heads or (norm and launch.block_h * head_dim <= 256)
    # a lane holds at most 16 elements and their tables, so that all stays in registers
    width = 2 * launch.block_r + launch.block_p
    assert launch.block_h * width <= 2 * 16 * 32 * launch.num_warps


def test_few_tokens_take_more_programs():
    many, few = (choose_launch(32, 128, 128, few_tokens=f) for f in (False, True))
    assert (many.block_h, few.block_h) == (8, 4)


def test_a_head_is_summed_as_rms_norm_sums_it():
    """Lanes hold eight elements, so they add in one order, and warps share no head."""
    for n_heads, head_dim, few_tokens in product((1, 2, 32), (64, 128, 256), (False, True)):
        launch = choose_launch(n_heads, head_dim, head_dim, few_tokens, norm=True)
        assert launch.block_h * head_dim == 8 * 32 * launch.num_warps
        assert launch.block_h >= launch.num_warps


def test_too_long_a_head_is_refused():
    with pytest.raises(NotImplementedError, match="at most 4096 elements a head on CUDA, got 4098"):
        choose_launch(1, MAX_HEAD_DIM + 2, 64)
