"""paged_attention: the reference against the formula, the kernels against it and each other.

Every cache here holds NaN in the slots that no query attends, and every table garbage in the
entries that nobody needs.
"""

import functools
import inspect
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention_oracle import assert_close, skip_bf16_in_the_interpreter, to
from llmfast_kernels.attention import flash_attention, paged_attention
from llmfast_kernels.attention import kernel as attention_kernel
from llmfast_kernels.attention.kernel import (
    DecodeLaunch,
    PrefillLaunch,
    launch_flash_attention,
    launch_paged_attention,
)
from llmfast_kernels.attention.reference import (
    flash_attention_reference,
    paged_attention_reference,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# tiles of a block, of part of one, of several, so that small sizes take several tiles and splits
LAUNCHES = {
    "prefill": PrefillLaunch(block_m=16, block_n=16, num_warps=4, num_stages=2),
    "prefill several blocks": PrefillLaunch(16, 64, 4, 2),
    "decode": DecodeLaunch(block_m=64, block_n=16, num_splits=1, num_warps=4, num_stages=2),
    "decode several blocks": DecodeLaunch(64, 32, 2, 4, 2),
    # more than there are tiles: the last are left without keys
    "decode 4 splits": DecodeLaunch(64, 16, 4, 4, 1),
    # sequences with one query, and with more
    "mixed": (DecodeLaunch(16, 16, 3, 4, 2), PrefillLaunch(16, 32, 4, 2)),
}
UNSPLIT = (DecodeLaunch(16, 16, 1, 4, 2), PrefillLaunch(16, 16, 4, 2))
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0])
FEATURES = {
    "causal": {},
    "scale": {"scale": 0.7},
    "window": {"window": 7},
    "wide window": {"window": 21},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": SINKS},
    "window, softcap and sinks": {"window": 18, "softcap": 1.5, "sinks": SINKS},
    "tree": {"tree": True},
    "tree, softcap and sinks": {"tree": True, "softcap": 1.5, "sinks": SINKS},
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_launch = pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
each_feature = pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Batch(NamedTuple):
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k_cache, v_cache
    args: dict[str, object]
    sequences: list[tuple[slice, torch.Tensor, torch.Tensor]]  # tokens of q; keys and values


def make(
    contexts=(37, 0, 16, 5),
    queries=(18, 1, 3, 1),
    *,
    block_size=16,
    heads=4,
    kv_heads=2,
    dim=24,
    dtype=torch.float32,
    tree=False,
    unused_tokens=2,
    spare_entries=1,
    **features,
):
    """Make sequences in shuffled blocks: NaN where nobody attends, garbage in unused entries."""
    gen = torch.Generator().manual_seed(sum(contexts) + sum(queries))
    window = features.get("window")
    counts = [-(-n // block_size) for n in contexts]
    order = iter(torch.randperm(sum(counts) + 3, generator=gen).tolist())
    garbage = torch.tensor([-1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    table = garbage.repeat(len(contexts), max(counts, default=0) + spare_entries)
    table = table[:, : max(counts, default=0) + spare_entries].contiguous()
    shape = (sum(counts) + 3, kv_heads, block_size, dim)
    k_cache, v_cache = torch.full((2, *shape), math.nan, dtype=dtype)
    starts = [0, *itertools.accumulate(queries)]
    n_tokens = starts[-1] + unused_tokens
    q = torch.randn(n_tokens, heads, dim, generator=gen).to(dtype)
    sequences = []
    for b, (n_keys, n_queries) in enumerate(zip(contexts, queries, strict=True)):
        k, v = torch.randn(2, n_keys, kv_heads, dim, generator=gen).to(dtype)
        first = max(0, n_keys - n_queries - window + 1) if window else 0
        for j in range(first, n_keys):
            if j == first or j % block_size == 0:
                table[b, j // block_size] = next(order)
            block = table[b, j // block_size]
            k_cache[block, :, j % block_size] = k[j]
            v_cache[block, :, j % block_size] = v[j]
        sequences.append((slice(starts[b], starts[b + 1]), k, v))
    args = {
        "query_start": torch.tensor(starts, dtype=torch.int32),
        "context_len": torch.tensor(contexts, dtype=torch.int32),
        "block_table": table,
        "max_query_len": max(queries, default=0),
        **features,
    }
    if tree:
        width = min(64, args["max_query_len"] + 3)
        args["tree_mask"] = torch.rand(n_tokens, width, generator=gen) < 0.5
    return Batch((q, k_cache, v_cache), args, sequences)


def make_for(launch, dtype=torch.float32, **options):
    """Make prefill, decoding and padding in one batch, with as many queries as the launch takes."""
    few = isinstance(launch, DecodeLaunch)
    batch = make(queries=(5 if few else 18, 1, 3, 1), dtype=dtype, **options)
    if isinstance(launch, tuple):
        batch.args["max_prompts"] = 2
    return batch


def run(batch, device, launch=None, **changed):
    return launch_paged_attention(
        *to(device, batch.tensors),
        **to(device, batch.args) | changed,
        return_lse=True,
        launch=launch,
    )


def assert_right(out, lse, batch):
    """Assert the relative rule for each sequence alone."""
    (q, _, _), args = batch.tensors, batch.args
    out, lse = out.cpu(), lse.cpu()
    assert out.shape == q.shape and out.is_contiguous()
    assert lse.shape == (q.shape[1], q.shape[0])
    tree_mask, sinks = args.get("tree_mask"), args.get("sinks")
    features = {name: args.get(name) for name in ("scale", "window", "softcap", "sinks")}
    for of_q, k, v in batch.sequences:
        if len(k) and of_q.start < of_q.stop:
            features["tree"] = None if tree_mask is None else tree_mask[of_q]
            tensors = (q[None, of_q], k[None], v[None])
            assert_close(out[None, of_q], lse[None, :, of_q], *tensors, **features)
        else:
            nothing = torch.tensor([-math.inf]) if sinks is None else sinks
            assert not out[of_q].any()
            assert (lse[:, of_q] == nothing.expand(len(lse))[:, None]).all()


# the reference


@each_feature
def test_reference_in_float64_is_the_formula(features):
    batch = make(dtype=torch.float64, **features)
    out, lse = paged_attention_reference(*batch.tensors, **batch.args, return_lse=True)
    assert out.dtype == torch.float64
    assert_right(out, lse, batch)
    n = batch.args["query_start"][-1]
    alone = paged_attention_reference(*batch.tensors, **batch.args)
    assert torch.equal(out[:n], alone[:n])


@each_dtype
@each_feature
def test_reference_is_no_worse_than_plain_pytorch(features, dtype):
    batch = make(dtype=dtype, **features)
    assert_right(*paged_attention_reference(*batch.tensors, **batch.args, return_lse=True), batch)


@pytest.mark.parametrize("window", [None, 9])
def test_reference_is_the_contiguous_one_on_the_gathered_keys(window):
    batch = make(contexts=(21, 33), queries=(4, 4), window=window, unused_tokens=0)
    out = paged_attention_reference(*batch.tensors, **batch.args)
    for of_q, k, v in batch.sequences:
        one = flash_attention_reference(
            batch.tensors[0][None, of_q], k[None], v[None], window=window
        )
        torch.testing.assert_close(out[of_q], one[0], rtol=1e-6, atol=1e-6)


# the kernels


@pytest.mark.parametrize("name", ["prefill", "decode several blocks", "decode 4 splits", "mixed"])
@each_feature
def test_kernels_compute_the_formula(features, name, device):
    launch = LAUNCHES[name]
    batch = make_for(launch, **features)
    assert_right(*run(batch, device, launch), batch)


@each_launch
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["causal", "window, softcap and sinks", "tree, softcap and sinks"])
def test_kernels_compute_the_formula_in_half_precision(name, dtype, launch, device):
    skip_bf16_in_the_interpreter(dtype, device)
    batch = make_for(launch, dtype, **FEATURES[name])
    assert_right(*run(batch, device, launch), batch)


@pytest.mark.parametrize(
    ("block_size", "block_n"),
    [(16, 16), (16, 64), (32, 16), (32, 64), (64, 64), (128, 32), (256, 64)],
    ids=lambda n: str(n),
)
def test_every_block_size(block_size, block_n, device):
    for launch, queries in (
        (PrefillLaunch(16, block_n, 4, 2), (17, 2)),
        (DecodeLaunch(16, block_n, 2, 4, 2), (1, 1)),
    ):
        batch = make((90, 3), queries, block_size=block_size, heads=1, kv_heads=1, window=23)
        assert_right(*run(batch, device, launch), batch)


@pytest.mark.parametrize("block_size", [16, 32], ids=lambda n: f"block{n}")
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("window", [None, 17])
def test_contexts_around_every_boundary(window, num_splits, block_size, device):
    contexts = [n + d for n in (16, 32, 48, 64, 96) for d in (-1, 0, 1)]
    queries = [1] * len(contexts)
    batch = make(contexts, queries, block_size=block_size, heads=2, kv_heads=1, window=window)
    assert_right(*run(batch, device, DecodeLaunch(16, 16, num_splits, 4, 2)), batch)
    assert_right(*paged_attention_reference(*batch.tensors, **batch.args, return_lse=True), batch)


@each_launch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_paged_is_contiguous_bit_for_bit(dtype, launch, device):
    n_queries = 5 if isinstance(launch, DecodeLaunch) else 18
    for n in (1, n_queries):
        contexts = (37, 64, n)
        batch = make(contexts, [n] * 3, heads=2, kv_heads=1, dtype=dtype, unused_tokens=0)
        out, lse = run(batch, device, launch, max_prompts=3 if n > 1 else 0)
        k, v = torch.full((2, 3, 70, 1, 24), math.nan, dtype=dtype)
        for b, (_, *cached) in enumerate(batch.sequences):
            k[b, : contexts[b]], v[b, : contexts[b]] = cached
        context_len = batch.args["context_len"]
        expected, expected_lse = launch_flash_attention(
            *to(device, (batch.tensors[0].unflatten(0, (3, n)), k, v)),
            key_end=to(device, context_len),
            query_offset=to(device, context_len - n),
            return_lse=True,
            launch=launch[n > 1] if isinstance(launch, tuple) else launch,
        )
        assert torch.equal(out, expected.flatten(0, 1))
        assert torch.equal(lse, expected_lse.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("n_sequences", [1, 2, 7, 31, 256])
def test_any_number_of_sequences(n_sequences, device):
    contexts = [(7 * b) % 41 for b in range(n_sequences)]  # padding rows too
    batch = make(contexts, [1] * n_sequences, heads=2, kv_heads=1, dim=16)
    if n_sequences <= 31 or device.type == "cuda":
        assert_right(*run(batch, device), batch)
    assert_right(*paged_attention_reference(*batch.tensors, **batch.args, return_lse=True), batch)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=3),
    group=st.sampled_from([1, 2, 3]),
    kv_heads=st.integers(1, 2),
    dim=st.sampled_from([1, 8, 16, 20, 32, 80]),
    block_size=st.sampled_from([16, 32]),
    launch=st.sampled_from([*LAUNCHES.values(), PrefillLaunch(32, 16, 4, 1, True), None]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    features=st.sampled_from([{}, {"window": 1}, {"window": 12}, {"tree": True}]),
)
def test_kernels_take_any_shape(
    device, sequences, group, kv_heads, dim, block_size, launch, dtype, features
):
    if isinstance(launch, DecodeLaunch):
        sequences = [(n_keys, min(n_queries, 64 // group)) for n_keys, n_queries in sequences]
    # fewer keys than queries: the first queries are before the first key
    batch = make(
        [n_keys for n_keys, _ in sequences],
        [n_queries for _, n_queries in sequences],
        heads=kv_heads * group,
        kv_heads=kv_heads,
        dim=dim,
        block_size=block_size,
        dtype=dtype,
        **features,
    )
    prompts = sum(n_queries > 1 for _, n_queries in sequences)
    assert_right(*run(batch, device, launch, max_prompts=prompts), batch)


@each_dtype
@pytest.mark.parametrize("dim", [80, 128, 256])
@pytest.mark.parametrize("n_queries", [1, 18], ids=["one", "many"])
def test_kernels_as_chosen_take_every_head_dim(n_queries, dim, dtype, device):
    skip_bf16_in_the_interpreter(dtype, device)
    batch = make((21,), (n_queries,), kv_heads=1, dim=dim, dtype=dtype)
    assert_right(*run(batch, device), batch)


def test_extreme_scores_stay_finite(device):
    for sign, launch in itertools.product((1, -1), LAUNCHES.values()):
        batch = make_for(launch)
        q, k_cache, _ = batch.tensors
        k_cache.copy_(torch.where(k_cache.isnan(), k_cache, sign * 300.0))
        q.abs_()
        out, _ = run(batch, device, launch)
        expected = paged_attention_reference(*batch.tensors, **batch.args)
        n = batch.args["query_start"][-1]
        torch.testing.assert_close(out[:n].cpu(), expected[:n], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_context_len", [0, 1, 40, 10**6])
@pytest.mark.parametrize("n_queries", [1, 20])
def test_the_bound_of_the_context_is_only_a_hint(n_queries, max_context_len, device):
    batch = make((90, 17), (n_queries, 1), kv_heads=1, spare_entries=100)
    assert_right(*run(batch, device, max_context_len=max_context_len), batch)


@each_launch
def test_a_larger_bound_of_the_queries_changes_nothing(launch, device):
    batch = make_for(launch)
    expected = run(batch, device, launch)
    n = batch.args["query_start"][-1]
    for got, want in zip(run(batch, device, launch, max_query_len=20), expected, strict=True):
        of_tokens = (slice(n),) if got.shape[0] == len(batch.tensors[0]) else (..., slice(n))
        torch.testing.assert_close(got[of_tokens], want[of_tokens], rtol=1e-6, atol=1e-6)


# prompts and single tokens in separate kernels


@pytest.mark.parametrize("max_prompts", [2, 3, 9])
def test_a_larger_bound_of_the_prompts_changes_nothing(max_prompts, device):
    batch = make((40, 5, 0, 33, 1, 20), (17, 1, 1, 16, 1, 1), kv_heads=1)
    expected = run(batch, device, UNSPLIT, max_prompts=2)
    for launch in (UNSPLIT, None):  # and as chosen: 17 queries of 4 heads are prefill's
        out, lse = run(batch, device, launch, max_prompts=max_prompts)
        assert_right(out, lse, batch)
        if launch is not None:
            assert torch.equal(out[:37], expected[0][:37])
            assert torch.equal(lse[:, :37], expected[1][:, :37])


@pytest.mark.parametrize(
    ("contexts", "queries"),
    [
        ((9, 33, 1), (1, 1, 1)),
        ((40, 2, 36), (40, 2, 33)),
        ((0, 0, 0), (1, 0, 0)),  # nothing but padding
        ((0, 20, 0, 5), (1, 4, 0, 0)),  # fewer queries than the step has places for
        ((), ()),
    ],
    ids=["single tokens", "prompts", "padding", "some of each", "nothing"],
)
def test_mixed_launches_need_no_mixture(contexts, queries, device):
    for launch in (LAUNCHES["mixed"], UNSPLIT):
        batch = make(contexts, queries, heads=2, kv_heads=1, dim=16, unused_tokens=5)
        assert_right(*run(batch, device, launch, max_prompts=3), batch)


@pytest.mark.parametrize("first", [0, 255, 256, 299])
def test_prompts_are_found_among_many_sequences(first, device):
    """The prefill kernel searches 256 sequences at a time."""
    contexts, queries = [0] * 300, [0] * 300
    for row in {first, 120, 298}:
        contexts[row], queries[row] = 35, 18 + row % 16
    contexts[7] = queries[7] = 1
    batch = make(contexts, queries, heads=1, kv_heads=1, dim=16)
    assert_right(*run(batch, device, UNSPLIT, max_prompts=5), batch)


@pytest.mark.parametrize("later", [("_prefill",), ("_decode", "_merge")], ids="-".join)
def test_neither_kernel_writes_rows_of_the_other(later, device, monkeypatch):
    """Outputs are NaN before: the rows of the kernel that runs last stay NaN until then."""
    batch = make((40, 5, 33, 1), (17, 1, 16, 1), unused_tokens=0)
    single = torch.tensor([False] * 17 + [True] + [False] * 16 + [True])
    launches = []
    for name in later:
        kernel = getattr(attention_kernel, name)

        def keep(*args, kernel=kernel, **options):
            launches.append(functools.partial(kernel, *args, **options))

        monkeypatch.setattr(attention_kernel, name, keep)
    out, lse = run(batch, device, LAUNCHES["mixed"], max_prompts=2)
    missing = ~single if later == ("_prefill",) else single
    for rows in (out.cpu(), lse.cpu().T):
        assert rows[missing].isnan().all() and not rows[~missing].isnan().any()
    for launch in launches:
        launch()
    assert_right(out, lse, batch)


def test_few_queries_each_are_one_kernels(device, monkeypatch):
    """One kernel takes the batch: the prefill kernel's tiles would be nearly empty."""
    batch = make((37, 5, 16), (4, 1, 1))
    ran = []
    for name in ("_prefill", "_decode"):
        kernel = getattr(attention_kernel, name)

        def count(*args, name=name, kernel=kernel, **options):
            ran.append(name)
            return kernel(*args, **options)

        monkeypatch.setattr(attention_kernel, name, count)
    assert_right(*run(batch, device, max_prompts=1), batch)
    assert ran == ["_decode"]
    ran.clear()
    batch = make((37, 5, 16), (20, 1, 1))
    assert_right(*run(batch, device, max_prompts=1), batch)
    assert ran == ["_decode", "_prefill"]


# the tree mask

SMALL = {
    "prefill": LAUNCHES["prefill"],
    "decode": DecodeLaunch(64, 16, 3, 4, 2),
    "chosen": None,
}
each_small = pytest.mark.parametrize("launch", SMALL.values(), ids=SMALL)


@each_small
def test_a_chain_is_causal(launch, device):
    batch = make((37, 5, 9), (5, 5, 9))
    position = torch.cat([torch.arange(n) for n in (5, 5, 9, 2)])
    chain = to(device, position[:, None] >= torch.arange(12))
    for got, want in zip(
        run(batch, device, launch, tree_mask=chain), run(batch, device, launch), strict=True
    ):
        n = 19
        of_tokens = (slice(n),) if len(got) == n + 2 else (..., slice(n))
        torch.testing.assert_close(got[of_tokens], want[of_tokens], rtol=1e-5, atol=1e-6)


@each_small
def test_a_tree_is_its_branches_one_by_one(launch, device):
    """Two continuations of one token, verified together: each as if the other were not there."""
    batch = make((30,), (5,), unused_tokens=0)
    #  0 - 1 - 2
    #    \ 3 - 4
    branches = ([0, 1, 2], [0, 3, 4])
    tree = torch.zeros(5, 5, dtype=torch.bool)
    for branch in branches:
        for i, token in enumerate(branch):
            tree[token, branch[: i + 1]] = True
    out, _ = run(batch, device, launch, tree_mask=to(device, tree))
    ((_, k, v),) = batch.sequences
    q = batch.tensors[0]
    for branch in branches:
        keys = [*range(25), *(25 + token for token in branch)]
        alone = flash_attention(q[None, branch], k[None, keys], v[None, keys])
        torch.testing.assert_close(out[branch].cpu(), alone[0], rtol=1e-4, atol=1e-5)


@each_small
@pytest.mark.parametrize("context", [64, 100])
def test_sixty_four_new_tokens(context, launch, device):
    """The 64th bit is used too, and queries without an older key may attend none."""
    batch = make((context,), (64,), heads=1, kv_heads=1, dim=16, tree=True)
    tree_mask = batch.args["tree_mask"]
    assert tree_mask.shape == (66, 64)
    tree_mask[3] = False
    tree_mask[5] = torch.arange(64) == 63
    assert_right(*run(batch, device, launch), batch)


def test_one_query_need_not_attend_itself(device):
    batch = make((20, 1, 9), (1, 1, 1))
    tree_mask = torch.tensor([[False], [False], [True], [True], [True]])
    batch.args["tree_mask"] = tree_mask
    assert_right(*run(batch, device, DecodeLaunch(16, 16, 2, 4, 2)), batch)
    assert_right(*run(batch, device), batch)


# memory: layouts, what is read, what is written


@each_launch
def test_any_order_of_heads_and_offsets(launch, device):
    """K and V are views of [num_blocks, block_size, kv_heads, D], permuted differently."""
    batch = make_for(launch)
    q, k_cache, v_cache = batch.tensors
    expected, _ = run(batch, device, launch)
    other = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k_cache, v_cache)]
    for caches in ((k_cache, other[1]), (other[0], v_cache), other):
        out, _ = run(batch._replace(tensors=(q, *caches)), device, launch)
        n = batch.args["query_start"][-1]
        assert torch.equal(out[:n], expected[:n])


@each_launch
def test_slices_of_larger_tensors(launch, device):
    """Queries are part of a merged projection, keys of a larger cache, and buffers are wide."""
    batch = make_for(launch, tree=True)
    (q, k_cache, v_cache), args = batch.tensors, batch.args
    merged = torch.cat([q, q, q], dim=1)[:, :4]
    larger = torch.stack([k_cache, v_cache], dim=1)
    sliced = dict(args)
    for name in ("block_table", "tree_mask"):
        sliced[name] = torch.cat([args[name], args[name]], dim=1)[:, : args[name].shape[1]]
    got = run(Batch((merged, larger[:, 0], v_cache), sliced, []), device, launch)
    assert_right(*got, batch)


@pytest.mark.usefixtures("poison_empty")
@each_launch
def test_only_the_rows_of_sequences_are_written(launch, device):
    batch = make_for(launch)
    out, lse = run(batch, device, launch)
    n = batch.args["query_start"][-1]
    assert out[:n].isfinite().all() and out[n:].isnan().all()
    assert not lse[:, :n].isnan().any() and lse[:, n:].isnan().all()


@each_launch
def test_nothing_is_written_outside_the_outputs(launch, device, monkeypatch):
    """Every allocation of the launch lies between two bands that must keep their value."""
    batch = make_for(launch, dim=20)
    args, tensors = to(device, batch.args), to(device, batch.tensors)
    band, bases = 256, []
    make_empty = torch.empty

    def banded(*size, **kwargs):
        shape = torch.Size(size[0] if isinstance(size[0], (tuple, list)) else size)
        base = make_empty(shape.numel() + 2 * band, **kwargs).fill_(42)
        bases.append(base)
        return base[band:-band].fill_(math.nan).view(shape)

    monkeypatch.setattr(torch, "empty", banded)
    launch_paged_attention(*tensors, **args, return_lse=True, launch=launch)
    first = launch[0] if isinstance(launch, tuple) else launch
    assert len(bases) == (3 if getattr(first, "num_splits", 1) > 1 else 2)
    assert all((base[:band] == 42).all() and (base[-band:] == 42).all() for base in bases)


@each_launch
def test_arguments_are_left_unchanged(launch, device):
    batch = make_for(launch, tree=True, sinks=SINKS)
    tensors, args = to(device, batch.tensors), to(device, batch.args)
    given_tensors = [x for x in (*tensors, *args.values()) if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in given_tensors]
    launch_paged_attention(*tensors, **args, launch=launch)
    for now, then in zip(given_tensors, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


# the operation: dispatch and refusals


@each_feature
def test_op_gives_what_its_implementation_gives(features, device):
    batch = make(**features)
    tensors, args = to(device, batch.tensors), to(device, batch.args)
    run_it = launch_paged_attention if device.type == "cuda" else paged_attention_reference
    n = batch.args["query_start"][-1]
    out, lse = paged_attention(*tensors, **args, return_lse=True)
    expected, expected_lse = run_it(*tensors, **args, return_lse=True)
    assert torch.equal(out[:n], expected[:n]) and torch.equal(lse[:, :n], expected_lse[:, :n])
    assert torch.equal(paged_attention(*tensors, **args)[:n], expected[:n])


def test_launcher_has_the_signature_of_the_reference():
    taken = dict(inspect.signature(launch_paged_attention).parameters)
    del taken["launch"]
    of_reference = inspect.signature(paged_attention_reference).parameters
    assert list(taken.values()) == list(of_reference.values())
    assert list(of_reference) == list(inspect.signature(paged_attention).parameters)


Q, CACHE = torch.ones(6, 4, 8), torch.ones(3, 2, 16, 8)
ARGS = {
    "query_start": torch.tensor([0, 4, 6], dtype=torch.int32),
    "context_len": torch.tensor([20, 16], dtype=torch.int32),
    "block_table": torch.tensor([[2, 0], [1, -1]], dtype=torch.int32),
    "max_query_len": 4,
}
TREE = torch.ones(6, 4, dtype=torch.bool)


def test_the_arguments_below_are_good_but_for_the_change():
    assert paged_attention(Q, CACHE, CACHE, **ARGS).shape == Q.shape
    assert paged_attention(Q, CACHE, CACHE, **ARGS, tree_mask=TREE).shape == Q.shape


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"q": Q.int()}, TypeError, "q must be .* torch.int32"),
        (
            {"k_cache": CACHE.half()},
            TypeError,
            "k_cache and v_cache must have q's .* torch.float16",
        ),
        ({"v_cache": CACHE.double()}, TypeError, "k_cache and v_cache must have q's .*float64"),
        ({"v_cache": CACHE.to("meta")}, ValueError, "k_cache and v_cache .*on cpu as q is.*meta"),
        ({"q": Q[None]}, ValueError, r"q and k_cache must be \[T, Hq, D\] and .*\(1, 6, 4, 8\)"),
        ({"k_cache": CACHE[0]}, ValueError, r"block_size, D\], got .*\(2, 16, 8\)"),
        ({"v_cache": CACHE[:2]}, ValueError, r"v_cache must have k_cache's shape.*\(2, 2, 16, 8\)"),
        ({"v_cache": CACHE[..., :4]}, NotImplementedError, "v_cache's head .*k_cache's, 8, got 4"),
        ({"q": Q[..., :4]}, ValueError, "q and k_cache must have one head dim.* got 4 and 8"),
        ({"q": Q[:, :3]}, ValueError, "multiple of those of k_cache, got 3 and 2"),
        ({"q": Q.mT.contiguous().mT}, ValueError, r"q, k_cache and v_cache .* last stride of 1"),
        ({"scale": 0.0}, ValueError, "scale must be more than 0, got 0.0"),
        ({"softcap": math.inf}, ValueError, "softcap must be more than 0, got inf"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"sinks": torch.ones(2)}, ValueError, r"sinks .*shape \(4,\) .*got \(2,\)"),
        (
            {"k_cache": CACHE[:, :, :8], "v_cache": CACHE[:, :, :8]},
            ValueError,
            r"block size must be one of \(16, 32, 64, 128, 256\), got 8 in shape \(3, 2, 8, 8\)",
        ),
        ({"context_len": torch.ones(2, 1)}, ValueError, r"context_len .*\[B\], got \(2, 1\)"),
        ({"context_len": torch.ones(2)}, TypeError, "context_len must be int32, got .*float32"),
        ({"context_len": torch.ones(4).int()[::2]}, ValueError, "context_len must be contiguous"),
        ({"query_start": torch.tensor([0, 4, 6])}, TypeError, "query_start must be int32, .*int64"),
        (
            {"query_start": torch.tensor([0, 6], dtype=torch.int32)},
            ValueError,
            r"query_start .*shape \(3,\).*got \(2,\)",
        ),
        ({"block_table": torch.ones(2, 2)}, TypeError, "block_table must be int32, got .*float32"),
        (
            {"block_table": ARGS["block_table"][:1]},
            ValueError,
            r"block_table .*\[2, .*got \(1, 2\)",
        ),
        ({"block_table": ARGS["block_table"].mT}, ValueError, r"block_table .*strides \(1, 2\)"),
        (
            {"block_table": ARGS["block_table"].to("meta")},
            ValueError,
            "block_table .*on cpu .*on meta",
        ),
        ({"max_query_len": -1}, ValueError, "at least 0, got -1, None and None"),
        ({"max_context_len": -2}, ValueError, "at least 0, got 4, -2 and None"),
        ({"max_prompts": -1}, ValueError, "at least 0, got 4, None and -1"),
        ({"tree_mask": TREE, "window": 5}, NotImplementedError, "window .*tree_mask, got 5"),
        ({"tree_mask": TREE.int()}, TypeError, "tree_mask must be bool, got torch.int32"),
        ({"tree_mask": TREE[:5]}, ValueError, r"tree_mask must be \[6, n\] .*got \(5, 4\)"),
        ({"tree_mask": TREE[:, :3]}, ValueError, r"max_query_len \(4\) <= n .*got \(6, 3\)"),
        ({"tree_mask": TREE.repeat(1, 17)}, ValueError, r"n <= 64; got \(6, 68\)"),
        ({"tree_mask": TREE.mT.contiguous().mT}, ValueError, r"tree_mask .*strides \(1, 6\)"),
        # values, which are looked at on the CPU
        ({"max_query_len": 3}, ValueError, r"more than max_query_len \(3\) queries, got \[4, 2\]"),
        ({"max_prompts": 1}, ValueError, r"max_prompts \(1\) sequences .* query, got \[4, 2\]"),
        (
            {"query_start": torch.tensor([0, 4, 7], dtype=torch.int32)},
            ValueError,
            r"query_start must rise from 0 to at most 6 .*got \[0, 4, 7\]",
        ),
        (
            {"query_start": torch.tensor([0, 4, 3], dtype=torch.int32)},
            ValueError,
            "query_start must rise",
        ),
        (
            {"context_len": torch.tensor([33, 16], dtype=torch.int32)},
            ValueError,
            r"context_len must be from 0 to 32 .*got \[33, 16\]",
        ),
    ],
)
def test_bad_arguments_are_named(changed, error, says):
    tensors = {"q": Q, "k_cache": CACHE, "v_cache": CACHE}
    with pytest.raises(error, match=f"^paged_attention: .*{says}"):
        paged_attention(**tensors | ARGS | changed)


def test_an_entry_that_is_no_block_is_an_error_on_the_cpu():
    for entry in (-1, 3):
        table = torch.tensor([[2, entry], [1, -1]], dtype=torch.int32)
        with pytest.raises(IndexError):
            paged_attention(Q, CACHE, CACHE, **ARGS | {"block_table": table})


def test_no_backward():
    with pytest.raises(RuntimeError, match=r"^paged_attention: no backward; call under torch.no_g"):
        paged_attention(Q.clone().requires_grad_(), CACHE, CACHE, **ARGS)


# on a GPU only


@gpu_only
def test_float64_and_wide_heads_are_refused_on_cuda():
    batch = make(dtype=torch.float64)
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        paged_attention(*to("cuda", batch.tensors), **to("cuda", batch.args))
    batch = make((3,), (1,), dim=257)
    with pytest.raises(NotImplementedError, match="at most 256 on CUDA, got 257"):
        paged_attention(*to("cuda", batch.tensors), **to("cuda", batch.args))


def long_batch(contexts, queries, block_size, dim=128, heads=8, kv_heads=2, n_blocks=None):
    """Real sizes on the GPU, in bfloat16: NaN in every block that no sequence has."""
    gen = torch.Generator("cuda").manual_seed(0)
    counts = [-(-n // block_size) for n in contexts]
    n_blocks = n_blocks or sum(counts) + 5
    shape = (n_blocks, kv_heads, block_size, dim)
    caches = torch.full((2, *shape), math.nan, device="cuda", dtype=torch.bfloat16)
    table = torch.full((len(contexts), max(counts) + 2), -1, dtype=torch.int32)
    blocks = torch.randperm(n_blocks, generator=torch.Generator().manual_seed(0))
    for b, used in enumerate(blocks[: sum(counts)].split(counts)):
        table[b, : counts[b]] = used
        fresh = torch.randn(2, counts[b], *shape[1:], generator=gen, device="cuda")
        caches[:, used.cuda()] = fresh.bfloat16()
    starts = [0, *itertools.accumulate(queries)]
    q = torch.randn(starts[-1], heads, dim, generator=gen, device="cuda").bfloat16()
    args = {
        "query_start": torch.tensor(starts, dtype=torch.int32, device="cuda"),
        "context_len": torch.tensor(contexts, dtype=torch.int32, device="cuda"),
        "block_table": table.cuda(),
        "max_query_len": max(queries),
    }
    return (q, *caches), args


def assert_near_float64(out, tensors, args):
    exact = paged_attention_reference(*(x.double() for x in tensors), **args)
    error = (out - exact).square().mean().sqrt()
    # weights and output are each rounded once: half a unit at most, so less than one together
    assert error <= torch.finfo(out.dtype).eps * exact.square().mean().sqrt()


@gpu_only
@pytest.mark.parametrize(
    ("dim", "block_size", "queries", "features"),
    [
        (dim, block_size, queries, features)
        for dim, (block_size, features) in zip(
            itertools.cycle([64, 128]),
            [
                (16, {}),
                (16, {"window": 700}),
                (32, {"softcap": 5.0}),
                (64, {}),
                (64, {"window": 700}),
                (64, {"window": 700}),
                (256, {}),
            ],
            strict=False,
        )
        for queries in ((1, 1, 1), (16, 3, 1), (200, 1, 64))
    ],
    ids=str,
)
def test_long_inputs_in_bfloat16(dim, block_size, queries, features):
    tensors, args = long_batch((3001, 700, 64), queries, block_size, dim)
    args |= features
    assert_near_float64(paged_attention(*tensors, **args), tensors, args)


@gpu_only
@pytest.mark.parametrize("n_queries", [2, 16, 40, 64])
def test_long_trees_in_bfloat16(n_queries):
    tensors, args = long_batch((3001, 129, n_queries), [n_queries] * 3, 64)
    args["tree_mask"] = torch.rand(3 * n_queries, 64, device="cuda") < 0.4
    assert_near_float64(paged_attention(*tensors, **args), tensors, args)


@gpu_only
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("n_queries", [1, 16, 100])
def test_long_inputs_are_contiguous_bit_for_bit(n_queries, block_size):
    contexts = (3001, 700, 2048)
    (q, k_cache, v_cache), args = long_batch(contexts, [n_queries] * 3, block_size)
    k, v = torch.zeros(2, 3, 3072, 2, 128, device="cuda", dtype=torch.bfloat16)
    for b, context in enumerate(contexts):
        blocks = args["block_table"][b, : -(-context // block_size)]
        for row, cache in ((k, k_cache), (v, v_cache)):
            row[b, :context] = cache[blocks].transpose(1, 2).flatten(0, 1)[:context]
    out = paged_attention(q, k_cache, v_cache, **args, max_context_len=3072)
    expected = flash_attention(
        q.unflatten(0, (3, n_queries)),
        k,
        v,
        key_end=args["context_len"],
        query_offset=args["context_len"] - n_queries,
    )
    assert torch.equal(out, expected.flatten(0, 1))


@gpu_only
@pytest.mark.parametrize("n_queries", [1, 100], ids=["decode", "prefill"])
@pytest.mark.parametrize("block_size", [16, 64])
def test_a_cache_past_two_to_the_31_elements(block_size, n_queries):
    """Caches of 4 GiB each: the sequences' blocks are the first and the last."""
    n_blocks = 2**31 // (8 * block_size * 128) + 40
    k_cache = torch.empty(n_blocks, 8, block_size, 128, device="cuda", dtype=torch.bfloat16)
    v_cache = torch.empty_like(k_cache)
    used = torch.cat([torch.arange(8), torch.arange(n_blocks - 8, n_blocks)]).cuda()
    for cache in (k_cache, v_cache):
        cache[used] = torch.randn(16, 8, block_size, 128, device="cuda").bfloat16()
    q = torch.randn(2 * n_queries, 8, 128, device="cuda").bfloat16()
    args = {
        "query_start": torch.tensor([0, n_queries, 2 * n_queries], device="cuda").int(),
        "context_len": torch.tensor([8 * block_size, 8 * block_size - 3], device="cuda").int(),
        "max_query_len": n_queries,
    }
    out = paged_attention(q, k_cache, v_cache, **args, block_table=used.view(2, 8).int())
    few = torch.arange(16, device="cuda").view(2, 8).int()
    expected = paged_attention(q, k_cache[used], v_cache[used], **args, block_table=few)
    assert torch.equal(out, expected)


@gpu_only
@pytest.mark.parametrize("tree", [False, True], ids=["causal", "tree"])
@pytest.mark.parametrize("n_queries", [1, 4, 60])
def test_a_captured_graph_follows_its_tensors(n_queries, tree):
    """Tables, lengths and starts are read on the device: a replay sees their new values."""
    first, second = (
        long_batch(contexts, queries, 16, n_blocks=400)
        for contexts, queries in (
            ((900, 1000, 16), (n_queries, n_queries, n_queries)),
            ((70, 2000, 0), (n_queries, max(n_queries // 2, 1), n_queries)),
        )
    )
    width = max(args["block_table"].shape[1] for _, args in (first, second))
    buffers, batches = None, []
    for tensors, args in (first, second):
        table = torch.full((3, width), -1, dtype=torch.int32, device="cuda")
        table[:, : args["block_table"].shape[1]] = args["block_table"]
        q = torch.zeros(3 * n_queries, *tensors[0].shape[1:], device="cuda", dtype=torch.bfloat16)
        q[: len(tensors[0])] = tensors[0]
        batches.append([q, *tensors[1:], args["query_start"], args["context_len"], table])
        if tree:
            batches[-1].append(torch.rand(3 * n_queries, 64, device="cuda") < 0.5)
    names = ("query_start", "context_len", "block_table", "tree_mask")

    def attend(tensors):
        args = dict(zip(names, tensors[3:], strict=False))
        return paged_attention(*tensors[:3], **args, max_query_len=n_queries)

    buffers = [x.clone() for x in batches[0]]
    attend(buffers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(buffers)
    for batch in (batches[1], batches[0], batches[1]):
        for buffer, new in zip(buffers, batch, strict=True):
            buffer.copy_(new)
        graph.replay()
        n = int(batch[3][-1])
        assert torch.equal(out[:n], attend(batch)[:n])


@gpu_only
def test_launches_in_turn_take_the_variant_compiled_for_them():
    """Block sizes, paged and not, a mask or none, aligned and not: each meets its own variant."""
    for _, block_size, tree, shift in itertools.product(range(2), (16, 64), (False, True), (0, 1)):
        batch = make((37, 9), (2, 1), block_size=block_size, dim=64, tree=tree)
        q, *caches = to("cuda", batch.tensors)
        q = torch.cat([q.flatten(), q.flatten()])[shift : shift + q.numel()].view_as(q)
        shifted = Batch((q, *caches), batch.args, batch.sequences)
        expected = batch._replace(tensors=(q.cpu(), *batch.tensors[1:]))
        assert_right(*run(shifted, torch.device("cuda")), expected)


@gpu_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_it_runs_on_the_tensors_own_device():
    batch = make_for(None)
    assert_right(*run(batch, torch.device("cuda:1")), batch)
