"""write_kv: the reference against a plain loop, the kernel against the reference.

A write is a copy, so everything is compared bit for bit, in every dtype, untouched memory too.
"""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmfast_kernels.kv_cache import write_kv
from llmfast_kernels.kv_cache.kernel import MAX_HEAD_DIM, choose_launch, launch_write_kv
from llmfast_kernels.kv_cache.reference import write_kv_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
CANARY = {2: 0x7E5A, 4: 0x7FC0_5A5A, 8: 0x7FF8_0000_0000_5A5A}  # NaN in each float of that size
BAND = 4096  # elements on either side of a cache under guard; more than a program writes

CASES = [  # tokens, heads, head_dim, block_size, blocks
    (1, 1, 1, 16, 1),
    (1, 8, 128, 64, 3),
    (5, 2, 64, 16, 4),  # several tokens in one program, the last program not full
    (7, 3, 80, 32, 2),  # heads that do not divide a program's rows
    (9, 5, 96, 16, 3),
    (3, 2, 112, 128, 2),
    (4, 4, 256, 256, 1),
    (40, 8, 64, 16, 4),
    (2, 1, 576, 16, 2),
    (33, 1, 7, 16, 3),
    (0, 2, 64, 16, 2),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: "x".join(map(str, c)))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_impl = pytest.mark.parametrize("impl", [write_kv_reference, launch_write_kv, write_kv])
needs_cuda = partial(pytest.mark.skipif, not torch.cuda.is_available())


def bits(tensor):
    return tensor.view(BITS[tensor.element_size()])


def same(a, b):
    """Assert equality bit for bit, of NaN too, which torch.equal takes for unequal."""
    return torch.equal(bits(a), bits(b))


def random_bits(shape, dtype, device, seed):
    """Make every kind of float: infinities, subnormals and NaN with payload too."""
    gen = torch.Generator().manual_seed(seed)
    kind = BITS[dtype.itemsize]
    info = torch.iinfo(kind)
    values = torch.randint(info.min, info.max, shape, generator=gen, dtype=kind)
    return values.view(dtype).to(device)


def canaries(shape, dtype, device):
    values = torch.full(shape, CANARY[dtype.itemsize], dtype=BITS[dtype.itemsize], device=device)
    return values.view(dtype)


def make(case, dtype, device="cpu", skip=0.25):
    """Make random k and v, caches full of canaries and unordered slots, some of them -1."""
    tokens, heads, head_dim, block_size, blocks = case
    gen = torch.Generator().manual_seed(tokens)
    slots = torch.randperm(blocks * block_size, generator=gen)[:tokens]
    slots[torch.rand(tokens, generator=gen) < skip] = -1
    k, v = (random_bits((tokens, heads, head_dim), dtype, device, seed) for seed in (1, 2))
    caches = [canaries((blocks, heads, block_size, head_dim), dtype, device) for _ in range(2)]
    return k, v, *caches, slots.to(device)


def loop(k, v, k_cache, v_cache, slots):
    """Write element by element, on lists of bits."""
    results = []
    for new, cache in ((k, k_cache), (v, v_cache)):
        source, target = bits(new).tolist(), bits(cache).tolist()
        block_size = cache.shape[2]
        for token, slot in enumerate(slots.tolist()):
            if slot == -1:
                continue
            block, offset = divmod(slot, block_size)
            for head in range(new.shape[1]):
                for i in range(new.shape[2]):
                    target[block][head][offset][i] = source[token][head][i]
        flat = torch.tensor(target, dtype=BITS[cache.dtype.itemsize])
        results.append(flat.view(cache.dtype).to(cache.device))
    return results


def check(impl, expected_impl, k, v, k_cache, v_cache, slots):
    expected = [k_cache.clone(), v_cache.clone()]
    expected_impl(k, v, *expected, slots)
    assert impl(k, v, k_cache, v_cache, slots) is None
    assert same(k_cache, expected[0])
    assert same(v_cache, expected[1])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@each_case
def test_reference_is_what_the_loop_writes(case, dtype):
    k, v, k_cache, v_cache, slots = make(case, dtype)
    expected = loop(k, v, k_cache, v_cache, slots)
    write_kv_reference(k, v, k_cache, v_cache, slots)
    assert same(k_cache, expected[0])
    assert same(v_cache, expected[1])


@each_dtype
@each_case
def test_kernel_writes_what_the_reference_writes(case, dtype, device):
    check(launch_write_kv, write_kv_reference, *make(case, dtype, device))


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # no example changes a fixture
)
@given(
    tokens=st.integers(0, 32),
    heads=st.integers(1, 6),
    head_dim=st.integers(1, 130),
    block_size=st.sampled_from([16, 32, 64, 128, 256]),
    blocks=st.integers(2, 3),
    dtype=st.sampled_from(DTYPES),
    skip=st.sampled_from([0.0, 0.5]),
)
def test_kernel_writes_what_the_reference_writes_at_any_size(
    device, tokens, heads, head_dim, block_size, blocks, dtype, skip
):
    case = (tokens, heads, head_dim, block_size, blocks)
    check(launch_write_kv, write_kv_reference, *make(case, dtype, device, skip))


@each_impl
def test_skipped_tokens_write_nothing(impl, device):
    k, v, k_cache, v_cache, slots = make((6, 2, 64, 16, 2), torch.float16, device)
    slots.fill_(-1)
    impl(k, v, k_cache, v_cache, slots)
    assert same(k_cache, canaries(k_cache.shape, k.dtype, device))
    assert same(v_cache, canaries(v_cache.shape, k.dtype, device))


@each_impl
def test_first_and_last_slot_of_each_block(impl, device):
    k, v, k_cache, v_cache, _ = make((6, 2, 64, 16, 3), torch.float16, device)
    slots = torch.tensor([47, 0, 16, 15, 32, 31], device=device)
    expected = loop(k, v, k_cache, v_cache, slots)
    impl(k, v, k_cache, v_cache, slots)
    assert same(k_cache, expected[0])
    assert same(v_cache, expected[1])


@each_impl
@pytest.mark.parametrize("view", ["merged", "heads first", "padded", "expanded", "shifted"])
def test_strided_keys_and_values(impl, view, device):
    k, v, k_cache, v_cache, slots = make((9, 3, 80, 16, 2), torch.float16, device)
    if view == "merged":  # [queries of 6 heads, keys, values]
        qkv = canaries((9, 12, 80), k.dtype, device)
        qkv[:, 6:9], qkv[:, 9:] = k, v
        k_view, v_view = qkv[:, 6:9], qkv[:, 9:]
    elif view == "heads first":  # keys alone: strides of k are not those of v
        k_view, v_view = k.transpose(0, 1).contiguous().transpose(0, 1), v
    elif view == "padded":
        wide = canaries((9, 3, 96), k.dtype, device)
        wide[:, :, :80] = v
        k_view, v_view = k, wide[:, :, :80]
    elif view == "expanded":  # one head for all
        k_view, v_view = k[:, :1].expand(-1, 3, -1), v[:1].expand(9, -1, -1)
        k, v = k_view.contiguous(), v_view.contiguous()
    else:  # one element on: no address is divisible by 16 bytes
        k_view = torch.cat([k.flatten(), k.flatten()])[1 : 1 + k.numel()].view(k.shape)
        k, v_view = k_view.clone(), v
    expected = loop(k, v, k_cache, v_cache, slots)
    impl(k_view, v_view, k_cache, v_cache, slots)
    assert same(k_cache, expected[0])
    assert same(v_cache, expected[1])


def test_launcher_takes_the_other_order_of_heads_and_tokens(device):
    """Blocks that are [block_size, heads, dim] in memory are a permuted view."""
    k, v, k_cache, v_cache, slots = make((9, 3, 80, 16, 2), torch.float16, device)
    expected = loop(k, v, k_cache, v_cache, slots)
    caches = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in (k_cache, v_cache)]
    launch_write_kv(k, v, *caches, slots)
    assert same(caches[0].contiguous(), expected[0])
    assert same(caches[1].contiguous(), expected[1])


@pytest.mark.parametrize("case", CASES[:6], ids=lambda c: "x".join(map(str, c)))
def test_nothing_outside_the_caches_is_written(case, device):
    k, v, k_cache, v_cache, slots = make(case, torch.float16, device)
    buffers = [canaries((k_cache.numel() + 2 * BAND,), k.dtype, device) for _ in range(2)]
    caches = [buffer[BAND:-BAND].view(k_cache.shape) for buffer in buffers]
    expected = loop(k, v, k_cache, v_cache, slots)
    launch_write_kv(k, v, *caches, slots)
    for buffer, cache, wanted in zip(buffers, caches, expected, strict=True):
        assert same(cache, wanted)
        band = canaries((BAND,), k.dtype, device)
        assert same(buffer[:BAND], band) and same(buffer[-BAND:], band)


@each_impl
def test_what_was_in_the_cache_is_overwritten(impl, device):
    """With one token per call, as in decoding, the last write to a slot stays."""
    k, v, k_cache, v_cache, _ = make((4, 2, 64, 16, 2), torch.float16, device)
    for token, slot in enumerate([17, 3, 17, 3]):
        one = slice(token, token + 1)
        impl(k[one], v[one], k_cache, v_cache, torch.tensor([slot], device=device))
    for cache, new in ((k_cache, k), (v_cache, v)):
        assert same(cache[1, :, 1], new[2]) and same(cache[0, :, 3], new[3])


@each_impl
def test_two_tokens_with_one_slot_touch_no_other(impl, device):
    """Each element is from one of the two tokens; which one is undefined."""
    k, v, k_cache, v_cache, _ = make((2, 2, 64, 16, 1), torch.float16, device)
    impl(k, v, k_cache, v_cache, torch.tensor([5, 5], device=device))
    for cache, new in ((k_cache, k), (v_cache, v)):
        written = bits(cache[0, :, 5])
        assert ((written == bits(new)[0]) | (written == bits(new)[1])).all()
        rest = torch.arange(16, device=device) != 5
        assert (bits(cache)[:, :, rest] == CANARY[2]).all()


@each_impl
def test_keys_values_and_slots_are_left_unchanged(impl, device):
    k, v, k_cache, v_cache, slots = make((5, 2, 64, 16, 2), torch.float16, device)
    before = [t.clone() for t in (k, v, slots)]
    impl(k, v, k_cache, v_cache, slots)
    assert all(same(a, b) for a, b in zip((k, v, slots), before, strict=True))


@each_dtype
def test_op_writes_what_the_loop_writes(dtype, device):
    args = make((5, 2, 64, 16, 2), dtype, device)
    expected = loop(*args)
    assert write_kv(*args) is None
    assert same(args[2], expected[0]) and same(args[3], expected[1])


@needs_cuda(reason="8 GiB and a GPU's speed: offsets past 2**31 elements")
def test_offsets_in_the_cache_pass_2_to_the_31():
    heads, block_size, head_dim = 8, 64, 128
    blocks = 2**31 // (heads * block_size * head_dim) + 3
    last = blocks * block_size - 1
    slots = torch.tensor([last, 0, -1, last - block_size, last // 2], device="cuda")
    shape = (blocks, heads, block_size, head_dim)
    caches = [torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    k, v = (random_bits((5, heads, head_dim), torch.bfloat16, "cuda", seed) for seed in (1, 2))
    launch_write_kv(k, v, *caches, slots)
    written = slots >= 0
    for cache, new in zip(caches, (k, v), strict=True):
        at = slots[written]
        assert same(cache[at // block_size, :, at % block_size], new[written])
        cache[at // block_size, :, at % block_size] = 0
        assert not any(bits(part).any() for part in cache.split(256))  # nothing went elsewhere


@needs_cuda(reason="4 GiB: offsets past 2**31 elements")
@pytest.mark.parametrize("axis", ["tokens", "heads"])
def test_offsets_in_the_keys_pass_2_to_the_31(axis):
    far = 2**30 + 16
    buffer = torch.zeros(2 * far + 256, device="cuda", dtype=torch.bfloat16)
    strides = (far, 64, 1) if axis == "tokens" else (64, far, 1)
    k = buffer.as_strided((3, 3, 64), strides)
    k.copy_(random_bits((3, 3, 64), torch.bfloat16, "cuda", 1))
    _, v, k_cache, v_cache, _ = make((3, 3, 64, 16, 2), torch.bfloat16, "cuda")
    slots = torch.tensor([31, 0, 7], device="cuda")
    check(launch_write_kv, write_kv_reference, k, v, k_cache, v_cache, slots)


@needs_cuda(reason="captures a CUDA graph")
def test_a_replayed_graph_follows_new_slots_and_values():
    args = make((5, 2, 64, 16, 2), torch.bfloat16, "cuda", skip=0)
    k, _, k_cache, v_cache, slots = args
    write_kv(*args)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write_kv(*args)
    for new in ([31, 0, -1, 5, 16], [-1, -1, 9, -1, 30], [-1] * 5):
        for cache in (k_cache, v_cache):
            cache.copy_(canaries(cache.shape, cache.dtype, "cuda"))
        slots.copy_(torch.tensor(new))
        k.copy_(random_bits(k.shape, k.dtype, "cuda", seed=new[0] + 100))
        expected = loop(*args)
        graph.replay()
        assert same(k_cache, expected[0]) and same(v_cache, expected[1])


@needs_cuda(reason="a second launch skips Triton's look at the arguments only on CUDA")
def test_later_launches_follow_other_shapes_and_strides():
    """Each pair differs in one thing that Triton specialises on; a stale variant would misplace."""
    for case in [(5, 2, 64, 16, 2), (1, 2, 64, 16, 2), (5, 2, 64, 32, 2), (5, 2, 80, 16, 2)] * 2:
        for shift in (0, 1, 0):
            k, v, k_cache, v_cache, slots = make(case, torch.bfloat16, "cuda")
            pair = torch.cat([k.flatten(), k.flatten()])
            k = pair[shift : shift + k.numel()].view(k.shape)
            check(write_kv, write_kv_reference, k, v, k_cache, v_cache, slots)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launch_is_on_the_tensors_device():
    args = make((5, 2, 64, 16, 2), torch.bfloat16, "cuda:1")
    with torch.cuda.device(0):
        check(write_kv, write_kv_reference, *args)


def test_a_slot_beyond_the_cache_raises_off_cuda():
    k, v, k_cache, v_cache, _ = make((1, 2, 4, 16, 2), torch.float32)
    with pytest.raises(IndexError):
        write_kv(k, v, k_cache, v_cache, torch.tensor([32]))


GOOD = {
    "k": torch.ones(3, 2, 4),
    "v": torch.ones(3, 2, 4),
    "k_cache": torch.zeros(5, 2, 16, 4),
    "v_cache": torch.zeros(5, 2, 16, 4),
    "slots": torch.tensor([0, 7, -1]),
}


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        ({"k": GOOD["k"].int()}, TypeError, "k must be float32.*got torch.int32 on cpu"),
        ({"v": GOOD["v"].half()}, TypeError, "k's dtype torch.float32; got torch.float16"),
        ({"k_cache": GOOD["k_cache"].bfloat16()}, TypeError, "k_cache .*torch.bfloat16"),
        ({"v_cache": GOOD["v_cache"].double()}, TypeError, "v_cache .*torch.float64"),
        ({"slots": GOOD["slots"].int()}, TypeError, "slots must be torch.int64, got torch.int32"),
        ({"k": torch.ones(3, 8)}, ValueError, r"k must be \(n_tokens, .*got shape \(3, 8\)"),
        ({"k": torch.ones(3, 0, 4)}, ValueError, r"k .*at least 1 head.*\(3, 0, 4\)"),
        ({"k": torch.ones(3, 2, 0)}, ValueError, r"k .*1 element.*\(3, 2, 0\)"),
        ({"v": torch.ones(2, 2, 4)}, ValueError, r"v .*k's shape \(3, 2, 4\), got \(2, 2, 4\)"),
        (
            {"k_cache": torch.ones(80, 2, 4)},
            ValueError,
            r"k_cache must be .*got shape \(80, 2, 4\)",
        ),
        (
            {"k_cache": torch.ones(5, 3, 16, 4)},
            ValueError,
            r"k_cache .*, 2, block.*\(5, 3, 16, 4\)",
        ),
        ({"k_cache": torch.ones(5, 2, 16, 8)}, ValueError, r"k_cache .*size, 4\).*\(5, 2, 16, 8\)"),
        ({"k_cache": torch.ones(5, 2, 24, 4)}, ValueError, r"one of \(16, .*256\), got 24"),
        ({"k_cache": torch.ones(5, 2, 512, 4)}, ValueError, "block size .*got 512"),
        (
            {"v_cache": torch.ones(4, 2, 16, 4)},
            ValueError,
            r"v_cache .*\(5, 2.*got \(4, 2, 16, 4\)",
        ),
        ({"slots": torch.tensor([0])}, ValueError, r"slots .*\(3,\).*got \(1,\)"),
        ({"slots": torch.tensor([[0, 1, 2]])}, ValueError, r"slots .*got \(1, 3\)"),
        (
            {"v": torch.ones(3, 2, 4, device="meta")},
            ValueError,
            "on cpu as k is; got meta, cpu, cpu and cpu",
        ),
        (
            {"k_cache": GOOD["k_cache"].to("meta")},
            ValueError,
            "on cpu as k is; got cpu, meta, cpu and cpu",
        ),
        (
            {"v_cache": GOOD["v_cache"].to("meta")},
            ValueError,
            "on cpu as k is; got cpu, cpu, meta and cpu",
        ),
        (
            {"slots": GOOD["slots"].to("meta")},
            ValueError,
            "on cpu as k is; got cpu, cpu, cpu and meta",
        ),
        ({"k": torch.ones(3, 2, 8)[..., ::2]}, ValueError, r"last dim.*strides \(16, 8, 2\) and"),
        ({"v": torch.ones(3, 2, 8)[..., ::2]}, ValueError, r"last dim.*and \(16, 8, 2\)"),
        ({"k_cache": torch.ones(5, 16, 2, 4).transpose(1, 2)}, ValueError, "k_cache.*contig"),
        ({"v_cache": torch.ones(5, 16, 2, 4).transpose(1, 2)}, ValueError, "v_cache.*contiguous"),
        ({"slots": torch.arange(6)[::2]}, ValueError, r"slots must be contiguous.* and \(2,\)"),
        ({"k": torch.ones(3, 2, 4, requires_grad=True)}, RuntimeError, "no backward"),
        ({"v": torch.ones(3, 2, 4, requires_grad=True)}, RuntimeError, "torch.no_grad"),
        ({"k_cache": torch.ones(5, 2, 16, 4, requires_grad=True)}, RuntimeError, "no backward"),
        ({"v_cache": torch.ones(5, 2, 16, 4, requires_grad=True)}, RuntimeError, "no backward"),
    ],
)
def test_bad_arguments_are_named(bad, error, says):
    args = {name: t.clone() for name, t in GOOD.items()} | bad
    caches = [args["k_cache"].detach().clone(), args["v_cache"].detach().clone()]
    with pytest.raises(error, match=f"^write_kv: .*{says}"):
        write_kv(**args)
    for name, before in zip(("k_cache", "v_cache"), caches, strict=True):
        assert before.is_meta or torch.equal(args[name], before)


def test_what_requires_grad_is_taken_under_no_grad():
    args = {name: t.clone() for name, t in GOOD.items()}
    args["k"].requires_grad_()
    with torch.no_grad():
        write_kv(**args)
    assert args["k_cache"].sum() == 16 and not args["k_cache"].requires_grad


@needs_cuda(reason="CUDA launchers alone refuse float64")
def test_float64_is_refused_on_cuda():
    with pytest.raises(TypeError, match=r"write_kv: k must be float32.*torch.float64 on cuda"):
        write_kv(*make((1, 2, 64, 16, 1), torch.float64, "cuda"))


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("head_dim", [1, 7, 64, 80, 128, 256, 576, MAX_HEAD_DIM])
def test_launch_covers_the_row(head_dim, element_size):
    launch = choose_launch(head_dim, element_size)
    assert head_dim <= launch.block_d < 2 * head_dim or head_dim == launch.block_d
    assert launch.rows & (launch.rows - 1) == 0  # tl.arange takes powers of 2
    assert launch.num_warps in (1, 2, 4)
    # a lane holds whole loads of 16 bytes of keys, and no more than two
    lane_bytes = launch.rows * launch.block_d * element_size // (32 * launch.num_warps)
    assert lane_bytes in (16, 32)


def test_a_program_takes_several_heads():
    assert choose_launch(128, 2).rows == 8  # one token of Llama-3.1-8B
    assert choose_launch(64, 2).rows == 16
    assert choose_launch(256, 4).rows == 2


def test_too_long_a_head_is_refused():
    with pytest.raises(NotImplementedError, match="at most 1024 elements on CUDA, got 1025"):
        choose_launch(MAX_HEAD_DIM + 1, 2)
