"""rope_write_kv: equal to its three operations in a row, bit for bit."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from guards import BAND, GuardedEmpty, guarded
from llmfast_kernels.kv_cache.kernel import launch_write_kv
from llmfast_kernels.kv_cache.reference import write_kv_reference
from llmfast_kernels.norm.kernel import launch_rms_norm
from llmfast_kernels.norm.reference import rms_norm_reference
from llmfast_kernels.rope import kernel, rope_write_kv
from llmfast_kernels.rope.kernel import (
    launch_apply_rope,
    launch_rope_write_kv,
)
from llmfast_kernels.rope.reference import apply_rope_reference, rope_write_kv_reference
from rope_cases import (
    DTYPES,
    MAX_POSITIONS,
    each_dtype,
    make_tables,
    needs_cuda,
    skip_what_the_interpreter_cannot_round,
)

STEPS = [  # tokens, q_heads, kv_heads, head_dim, rotary_dim
    (1, 32, 8, 128, 128),
    (5, 6, 2, 64, 64),
    (3, 9, 3, 80, 80),
    (4, 3, 1, 96, 48),
    (2, 7, 5, 112, 112),
    (3, 3, 2, 256, 64),
    (6, 5, 3, 67, 10),
    (2, 2, 5, 2, 2),
    (130, 2, 1, 64, 64),  # over the limit of few tokens
    (0, 4, 2, 64, 64),
]
MODES = {  # tables, interleaved, norm, unit_offset
    "plain": ("same", False, False, False),
    "interleaved": ("same", True, False, False),
    "no tables": (None, False, False, False),
    "qwen3": ("same", False, True, False),
    "gemma3": ("same", False, True, True),
    "float32 tables": ("float32", False, True, False),
    "interleaved norm": ("float32", True, True, False),
    "norm alone": (None, False, True, False),
}
EPS = 1e-6
CANARY = {2: 0x7E5A, 4: 0x7FC0_5A5A, 8: 0x7FF8_0000_0000_5A5A}  # NaN in each float of that size
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

each_step = pytest.mark.parametrize("step", STEPS, ids=lambda s: "x".join(map(str, s)))
each_mode = pytest.mark.parametrize("mode", MODES)
some_modes = pytest.mark.parametrize("mode", ["plain", "interleaved norm", "gemma3", "norm alone"])
each_step_impl = pytest.mark.parametrize(
    "impl", [rope_write_kv_reference, launch_rope_write_kv, rope_write_kv]
)


def bits(tensor):
    return tensor.view(BITS[tensor.element_size()])


def same(a, b):
    """Assert equality bit for bit, of NaN too, which torch.equal takes for unequal."""
    return torch.equal(bits(a), bits(b))


def canaries(shape, dtype, device):
    values = torch.full(shape, CANARY[dtype.itemsize], dtype=BITS[dtype.itemsize], device=device)
    return values.view(dtype)


def make_step(step, dtype, device="cpu", mode="qwen3", block_size=16):
    """Make slices of a merged projection, caches full of canaries and unordered slots, some -1."""
    tokens, q_heads, kv_heads, head_dim, rotary_dim = step
    tables, interleaved, norm, unit_offset = MODES[mode]
    gen = torch.Generator().manual_seed(0)
    widths = [heads * head_dim for heads in (q_heads, kv_heads, kv_heads)]
    merged = torch.randn(tokens, sum(widths), generator=gen).to(device, dtype)
    q, k, v = (t.unflatten(1, (-1, head_dim)) for t in merged.split(widths, 1))
    blocks = tokens // block_size + 2
    slots = torch.randperm(blocks * block_size, generator=gen)[:tokens]
    slots[torch.rand(tokens, generator=gen) < 0.2] = -1
    shape = (blocks, kv_heads, block_size, head_dim)
    args = {"q": q, "k": k, "v": v, "cos": None, "sin": None, "positions": None}
    args |= {name: canaries(shape, dtype, device) for name in ("k_cache", "v_cache")}
    args |= {"slots": slots.to(device), "interleaved": interleaved, "unit_offset": unit_offset}
    if tables is not None:
        kind = dtype if tables == "same" else torch.float32
        args["cos"], args["sin"] = make_tables(rotary_dim, kind, device)
        args["positions"] = torch.randint(MAX_POSITIONS, (tokens,), generator=gen).to(device)
    if norm:
        weights = (torch.randn(head_dim, generator=gen).to(device, dtype) for _ in range(2))
        args["q_norm"], args["k_norm"] = weights
        args["eps"] = EPS
    return args


def fresh_caches(args):
    return args | {name: args[name].clone() for name in ("k_cache", "v_cache")}


def one_after_the_other(
    rms_norm,
    rope,
    write,
    *,
    q,
    k,
    v,
    cos,
    sin,
    positions,
    k_cache,
    v_cache,
    slots,
    interleaved,
    unit_offset,
    q_norm=None,
    k_norm=None,
    eps=None,
):
    """Run the three operations, each on contiguous tensors."""
    q, k = q.contiguous(), k.contiguous()
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps=eps, unit_offset=unit_offset)
        k = rms_norm(k, k_norm, eps=eps, unit_offset=unit_offset)
    if cos is not None:
        q, k = rope(q, k, cos, sin, positions, interleaved=interleaved)
    write(k, v, k_cache, v_cache, slots)
    return q


def assert_step(impl, args, expected_impl, exact=True):
    expected = fresh_caches(args)
    expected_q = expected_impl(**expected)
    q = impl(**args)
    assert q.shape == args["q"].shape and q.dtype == args["q"].dtype and q.is_contiguous()
    assert same(args["v_cache"], expected["v_cache"])
    if exact:
        assert same(q, expected_q)
        assert same(args["k_cache"], expected["k_cache"])
        return
    # the norm's sums differ in order: two steps of each of a pair, which then meet in a sum
    for got, wanted in ((q, expected_q), (args["k_cache"], expected["k_cache"])):
        largest = wanted.nan_to_num().abs().amax() if wanted.numel() else 0
        bound = 8 * torch.finfo(q.dtype).eps * float(largest)
        torch.testing.assert_close(got, wanted, rtol=0, atol=bound, equal_nan=True)


@each_mode
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@each_step
def test_step_reference_is_the_three_references(step, dtype, mode):
    steps = partial(
        one_after_the_other, rms_norm_reference, apply_rope_reference, write_kv_reference
    )
    assert_step(rope_write_kv, make_step(step, dtype, mode=mode), steps)


@each_dtype
@pytest.mark.parametrize(
    ("mode", "layer"), [("qwen3", Qwen3RMSNorm), ("gemma3", Gemma3RMSNorm)], ids=["qwen3", "gemma3"]
)
def test_step_reference_is_what_transformers_computes(mode, layer, dtype):
    args = make_step((7, 6, 2, 64, 64), dtype, mode=mode)
    heads = []
    for name in "qk":
        norm = layer(64, eps=EPS).to(dtype)
        norm.weight.data = args[f"{name}_norm"]
        heads.append(norm(args[name])[None])
    tables = (torch.cat((args[t], args[t]), -1)[args["positions"]][None] for t in ("cos", "sin"))
    q, k = modeling_llama.apply_rotary_pos_emb(*heads, *tables, unsqueeze_dim=2)
    assert torch.equal(rope_write_kv(**args), q[0])
    for token, slot in enumerate(args["slots"].tolist()):
        if slot >= 0:
            assert torch.equal(args["k_cache"][slot // 16, :, slot % 16], k[0, token])
            assert torch.equal(args["v_cache"][slot // 16, :, slot % 16], args["v"][token])


@each_mode
@each_dtype
@each_step
def test_step_kernel_is_the_three_kernels(step, dtype, mode, device):
    """On a GPU rms_norm alone fuses its squares with their sum, which shows in float32, and
    y * (1 + weight) to y + y * weight, which shows where there is no rounding between."""
    skip_what_the_interpreter_cannot_round(device, dtype)
    if device.type == "cpu" and mode != "qwen3" and (dtype == torch.float32 or step[0] > 100):
        pytest.skip("a minute of the interpreter's time; the programs are those of the others")
    args = make_step(step, dtype, device, mode)
    steps = partial(one_after_the_other, launch_rms_norm, launch_apply_rope, launch_write_kv)
    fuses = "q_norm" in args and (dtype == torch.float32 or args["unit_offset"])
    assert_step(launch_rope_write_kv, args, steps, exact=device.type == "cpu" or not fuses)


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # no example changes a fixture
)
@given(
    tokens=st.integers(0, 3),
    heads=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    half=st.integers(1, 40),
    rest=st.integers(0, 70),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    mode=st.sampled_from(list(MODES)),
    block_size=st.sampled_from([16, 32, 64, 128, 256]),
)
def test_step_kernel_matches_the_reference_at_any_size(
    device, tokens, heads, half, rest, dtype, mode, block_size
):
    step = (tokens, *heads, 2 * half + rest, 2 * half)
    args = make_step(step, dtype, device, mode, block_size)
    assert_step(launch_rope_write_kv, args, rope_write_kv_reference, exact="q_norm" not in args)


@each_step_impl
def test_step_of_skipped_tokens_writes_nothing_but_computes_queries(impl, device):
    args = make_step((6, 4, 2, 64, 64), torch.float16, device)
    expected = impl(**fresh_caches(args))
    args["slots"].fill_(-1)
    assert same(impl(**args), expected)
    for name in ("k_cache", "v_cache"):
        assert same(args[name], canaries(args[name].shape, torch.float16, device))


@each_step_impl
def test_step_writes_the_first_and_last_slot_of_each_block(impl, device):
    args = make_step((6, 4, 2, 64, 64), torch.float16, device, "plain")
    slots = [31, 0, 16, 15, 17, 30]
    args["slots"] = torch.tensor(slots, device=device)
    _, k = apply_rope_reference(*(args[n] for n in ("q", "k", "cos", "sin", "positions")))
    expected = [args[name].clone() for name in ("k_cache", "v_cache")]
    for token, slot in enumerate(slots):
        expected[0][slot // 16, :, slot % 16] = k[token]
        expected[1][slot // 16, :, slot % 16] = args["v"][token]
    impl(**args)
    assert same(args["k_cache"], expected[0]) and same(args["v_cache"], expected[1])


@each_step_impl
def test_step_copies_values_bit_for_bit(impl, device):
    args = make_step((5, 4, 2, 64, 64), torch.float16, device)
    gen = torch.Generator().manual_seed(1)
    args["v"] = torch.randint(-(2**15), 2**15, (5, 2, 64), generator=gen, dtype=torch.int16)
    args["v"] = args["v"].to(device).view(torch.float16)  # infinities and NaN with payload too
    args["slots"] = torch.tensor([3, 20, 0, 31, 7], device=device)
    impl(**args)
    for token, slot in enumerate(args["slots"].tolist()):
        assert same(args["v_cache"][slot // 16, :, slot % 16], args["v"][token])


@some_modes
@pytest.mark.parametrize("layout", ["contiguous", "heads first", "odd"])
def test_step_kernel_takes_strided_views(layout, mode, device):
    args = make_step((5, 6, 2, 64, 48), torch.float16, device, mode)
    views = {}
    for name in "qkv":
        x = args[name].contiguous()
        if layout == "heads first":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        elif layout == "odd":  # strides that are no multiples of 16, the first element not aligned
            x = torch.nn.functional.pad(x, (3, 4, 1, 0), value=float("nan"))[:, 1:, 3:-4]
        assert torch.equal(x, args[name])
        views[name] = x
    assert_step(
        lambda **a: launch_rope_write_kv(**a | views),
        args,
        launch_rope_write_kv,
        # other loads on a GPU, and with them another order of the norm's sums
        exact=device.type == "cpu" or "q_norm" not in args,
    )


def test_step_launcher_takes_the_other_order_of_heads_and_tokens(device):
    """Blocks that are [block_size, heads, dim] in memory are a permuted view."""
    args = make_step((9, 3, 3, 80, 80), torch.float16, device)
    expected = fresh_caches(args)
    launch_rope_write_kv(**expected)
    for name in ("k_cache", "v_cache"):
        args[name] = args[name].transpose(1, 2).contiguous().transpose(1, 2)
    launch_rope_write_kv(**args)
    for name in ("k_cache", "v_cache"):
        assert same(args[name].contiguous(), expected[name])


def test_step_tokens_change_axis_past_the_grids_limit(device, monkeypatch):
    args = make_step((5, 6, 2, 64, 32), torch.float16, device, "plain")
    monkeypatch.setattr(kernel, "_MAX_GRID_Y", 4)
    assert_step(launch_rope_write_kv, args, rope_write_kv_reference)


@some_modes
@pytest.mark.parametrize("step", [STEPS[i] for i in (0, 2, 6)], ids=str)
def test_step_touches_nothing_outside_its_tensors(step, mode, device, monkeypatch):
    empty = GuardedEmpty()
    args = make_step(step, torch.float16, device, mode)
    expected = fresh_caches(args)
    expected_q = launch_rope_write_kv(**expected)
    for name, value in args.items():
        if not isinstance(value, torch.Tensor):
            continue
        if name.endswith("cache"):
            continue
        # a stray read makes NaN, or a position or slot outside of what there is
        band = float("nan") if value.is_floating_point() else 10**6
        args[name] = guarded(value, band)[0]
    caches = {}
    for name in ("k_cache", "v_cache"):
        whole = canaries((args[name].numel() + 2 * BAND,), torch.float16, device)
        caches[name], args[name] = whole, whole[BAND:-BAND].view(args[name].shape)
    monkeypatch.setattr(torch, "empty", empty)
    q = launch_rope_write_kv(**args)

    assert same(q, expected_q)
    empty.assert_bands_are_whole(q.numel())
    for name, whole in caches.items():
        assert same(args[name], expected[name])
        band = canaries((BAND,), torch.float16, device)
        assert same(whole[:BAND], band) and same(whole[-BAND:], band)


@each_mode
@each_step_impl
def test_step_leaves_its_other_arguments_unchanged(impl, mode, device):
    args = make_step((3, 4, 2, 64, 32), torch.float16, device, mode)
    before = {name: a.clone() for name, a in args.items() if isinstance(a, torch.Tensor)}
    q = impl(**args)
    assert q.data_ptr() != args["q"].data_ptr()
    for name in before.keys() - {"k_cache", "v_cache"}:
        assert same(args[name], before[name])


def test_step_without_tables_never_looks_at_positions(device):
    args = make_step((3, 4, 2, 64, 64), torch.float16, device, "norm alone")
    expected = rope_write_kv(**fresh_caches(args))
    for positions in (torch.tensor([10**6], device=device), "unread"):
        assert same(rope_write_kv(**fresh_caches(args) | {"positions": positions}), expected)


@each_mode
def test_step_op_gives_what_its_implementation_gives(mode, device):
    args = make_step((3, 4, 2, 64, 64), torch.float16, device, mode)
    on_cuda = device.type == "cuda"
    assert_step(rope_write_kv, args, launch_rope_write_kv if on_cuda else rope_write_kv_reference)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_step_launch_is_on_the_tensors_device():
    args = make_step((3, 4, 2, 64, 64), torch.bfloat16, "cuda:1", "plain")
    with torch.cuda.device(0):
        assert_step(rope_write_kv, args, rope_write_kv_reference)


@pytest.mark.gpu
def test_the_second_step_finds_the_right_variant(device):
    """A launch never meets a variant that was compiled for other arguments."""
    for _ in range(2):
        for mode in MODES:
            for step in [(1, 4, 2, 64, 64), (200, 4, 2, 64, 64), (5, 4, 2, 80, 80)]:
                for block_size, shift in [(16, 0), (64, 0), (16, 1)]:
                    args = make_step(step, torch.bfloat16, device, mode, block_size)
                    if shift:  # no address is divisible by 16 bytes
                        flat = torch.cat([args["q"].flatten(), args["q"].flatten()])
                        args["q"] = flat[shift : shift + args["q"].numel()].view(args["q"].shape)
                    exact = "q_norm" not in args
                    assert_step(rope_write_kv, args, rope_write_kv_reference, exact)
                    if args["positions"] is not None:
                        args["positions"] = args["positions"].int()
                        assert_step(rope_write_kv, args, rope_write_kv_reference, exact)


@pytest.mark.gpu
def test_a_replayed_graph_follows_new_positions_and_slots(device):
    args = make_step((5, 4, 2, 64, 64), torch.bfloat16, device)
    rope_write_kv(**args)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = rope_write_kv(**args)
    for seed, slots in enumerate(([31, 0, -1, 5, 16], [-1, -1, 9, -1, 30], [-1] * 5)):
        gen = torch.Generator().manual_seed(seed)
        args["slots"].copy_(torch.tensor(slots))
        args["positions"].copy_(torch.randint(MAX_POSITIONS, (5,), generator=gen))
        expected = fresh_caches(args)
        expected_q = rope_write_kv(**expected)
        graph.replay()
        assert same(q, expected_q)
        assert same(args["k_cache"], expected["k_cache"])
        assert same(args["v_cache"], expected["v_cache"])


@needs_cuda(reason="8 GiB and a GPU's speed: offsets past 2**31 elements")
def test_a_steps_offsets_in_the_cache_pass_2_to_the_31():
    args = make_step((5, 4, 8, 128, 128), torch.bfloat16, "cuda")
    blocks = 2**31 // (8 * 64 * 128) + 3
    last = blocks * 64 - 1
    args["slots"] = torch.tensor([last, 0, -1, last - 64, last // 2], device="cuda")
    written = args["slots"] >= 0
    small = fresh_caches(args) | {"slots": torch.where(written, torch.arange(5).cuda(), -1)}
    expected = rope_write_kv(**small)
    for name in ("k_cache", "v_cache"):
        args[name] = torch.zeros(blocks, 8, 64, 128, device="cuda", dtype=torch.bfloat16)
    assert same(rope_write_kv(**args), expected)
    at, token = args["slots"][written], torch.arange(5, device="cuda")[written]
    for name in ("k_cache", "v_cache"):
        cache = args[name]
        assert same(cache[at // 64, :, at % 64], small[name][0, :, token].transpose(0, 1))
        cache[at // 64, :, at % 64] = 0
        assert not any(bits(part).any() for part in cache.split(256))  # nothing went elsewhere


def good_step():
    return {
        "q": torch.ones(3, 4, 8),
        "k": torch.ones(3, 2, 8),
        "v": torch.ones(3, 2, 8),
        "cos": torch.ones(9, 3),
        "sin": torch.ones(9, 3),
        "positions": torch.arange(3),
        "k_cache": torch.zeros(5, 2, 16, 8),
        "v_cache": torch.zeros(5, 2, 16, 8),
        "slots": torch.tensor([0, 7, -1]),
        "q_norm": torch.ones(8),
        "k_norm": torch.ones(8),
        "eps": EPS,
    }


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        ({"q": torch.ones(3, 4, 8).int()}, TypeError, "q must be float32.*torch.int32"),
        ({"k": torch.ones(3, 2, 8).half()}, TypeError, "k .*torch.float32, got torch.float16"),
        ({"v": torch.ones(3, 2, 8).half()}, TypeError, "v, .*k's dtype.*got torch.float16"),
        ({"cos": torch.ones(9, 3).half()}, TypeError, "cos must be float32.*got torch.float16"),
        ({"sin": torch.ones(9, 3).double()}, TypeError, "sin .*got torch.float64"),
        ({"positions": torch.ones(3)}, TypeError, "positions must be int32 or int64"),
        ({"k_cache": torch.ones(5, 2, 16, 8).half()}, TypeError, "k_cache .*torch.float16"),
        ({"v_cache": torch.ones(5, 2, 16, 8).half()}, TypeError, "v_cache .*torch.float16"),
        ({"slots": torch.arange(3).int()}, TypeError, "slots must be torch.int64, got torch.int32"),
        ({"q_norm": torch.ones(8).half()}, TypeError, "q_norm .*torch.float32, got torch.float16"),
        ({"k_norm": torch.ones(8).double()}, TypeError, "k_norm .*torch.float32.*torch.float64"),
        ({"q": torch.ones(3, 32)}, ValueError, r"q must be \(tokens.*got \(3, 32\)"),
        ({"k": torch.ones(3, 2, 6)}, ValueError, r"k must be \(3, kv_heads, 8\).*\(3, 2, 6\)"),
        ({"v": torch.ones(3, 1, 8)}, ValueError, r"v must have k's shape .*got \(3, 1, 8\)"),
        ({"cos": torch.ones(9, 5)}, ValueError, r"cos .*head_dim 8; got \(9, 5\)"),
        ({"sin": torch.ones(9, 4)}, ValueError, r"sin must have cos's shape .*got \(9, 4\)"),
        ({"positions": torch.arange(2)}, ValueError, r"positions .*\(3,\).*got \(2,\)"),
        ({"positions": None}, ValueError, "positions must be given with cos and sin, got None"),
        ({"cos": None}, ValueError, "cos and sin must be given together; got sin, but cos None"),
        ({"sin": None}, ValueError, "cos and sin must be given together; got cos, but sin None"),
        ({"q_norm": None}, ValueError, "q_norm and k_norm .*got k_norm, but q_norm None"),
        ({"k_norm": None}, ValueError, "q_norm and k_norm .*got q_norm, but k_norm None"),
        ({"q_norm": torch.ones(4)}, ValueError, r"q_norm .*\(8,\), q's head_dim; got \(4,\)"),
        ({"k_norm": torch.ones(2, 8)}, ValueError, r"k_norm .*\(8,\), q's head_dim; got \(2, 8\)"),
        ({"k_cache": torch.ones(5, 3, 16, 8)}, ValueError, r"k_cache must be .*\(5, 3, 16, 8\)"),
        ({"k_cache": torch.ones(5, 2, 24, 8)}, ValueError, "k_cache's block size .*got 24"),
        ({"v_cache": torch.ones(4, 2, 16, 8)}, ValueError, r"v_cache must have k_cache's shape"),
        ({"slots": torch.tensor([0])}, ValueError, r"slots .*\(3,\).*got \(1,\)"),
        ({"k": torch.ones(3, 2, 8, device="meta")}, ValueError, "k must be on cpu .*got meta"),
        ({"v": torch.ones(3, 2, 8, device="meta")}, ValueError, "v, .*on cpu .*got meta"),
        ({"cos": torch.ones(9, 3, device="meta")}, ValueError, "cos must be on cpu"),
        ({"slots": torch.arange(3, device="meta")}, ValueError, "slots must be on cpu.*and meta"),
        ({"k_norm": torch.ones(8, device="meta")}, ValueError, "k_norm must be on cpu .*got meta"),
        ({"q": torch.ones(3, 8, 4).mT}, ValueError, "q must have a contiguous last dimension"),
        ({"k": torch.ones(3, 8, 2).mT}, ValueError, "k must have a contiguous last dimension"),
        ({"v": torch.ones(3, 8, 2).mT}, ValueError, "k and v must have a contiguous last"),
        ({"cos": torch.ones(3, 9).t()}, ValueError, "cos, sin and positions must be contiguous"),
        ({"slots": torch.arange(6)[::2]}, ValueError, "slots must be contiguous"),
        ({"k_cache": torch.ones(5, 16, 2, 8).transpose(1, 2)}, ValueError, "k_cache.*contiguous"),
        ({"q_norm": torch.ones(16)[::2]}, ValueError, r"q_norm must be contiguous.*\(2,\)"),
        ({"eps": 0.0}, ValueError, "eps must be more than 0 with q_norm, got 0.0"),
        ({"eps": float("nan")}, ValueError, "eps must be more than 0"),
        *(
            ({name: good_step()[name].requires_grad_()}, RuntimeError, "no backward")
            for name in ("q", "k", "v", "cos", "sin", "k_cache", "v_cache", "q_norm", "k_norm")
        ),
    ],
)
def test_a_steps_bad_arguments_are_named(bad, error, says):
    rope_write_kv(**good_step())
    args = good_step() | bad
    with pytest.raises(error, match=f"^rope_write_kv: .*{says}"):
        rope_write_kv(**args)
    for name in {"k_cache", "v_cache"} - bad.keys():
        assert not args[name].any()  # nothing was written before it was found


def test_a_step_that_requires_grad_is_taken_under_no_grad():
    args = good_step()
    args["q"].requires_grad_()
    with torch.no_grad():
        assert not rope_write_kv(**args).requires_grad


@needs_cuda(reason="CUDA launchers alone refuse float64")
def test_a_step_in_float64_is_refused_on_cuda():
    with pytest.raises(TypeError, match=r"rope_write_kv: q must be float32.*float64 on cuda"):
        rope_write_kv(**make_step((1, 4, 2, 64, 64), torch.float64, "cuda"))
