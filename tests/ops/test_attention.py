"""flash_attention: the reference against the formula and transformers, the kernels against it."""

import inspect
import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import (
    eager_attention_forward as gpt_oss_attention,
)
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_attention

from attention_oracle import assert_close, make, oracle, skip_bf16_in_the_interpreter, to
from llmfast_kernels import flash_attention, flash_attention_varlen
from llmfast_kernels.attention.kernel import (
    DecodeLaunch,
    PrefillLaunch,
    choose_launch,
    launch_flash_attention,
    launch_flash_attention_varlen,
)
from llmfast_kernels.attention.kernels import decode, prefill
from llmfast_kernels.attention.kernels.loop import shared_bytes
from llmfast_kernels.attention.reference import (
    flash_attention_reference,
    flash_attention_varlen_reference,
)
from llmfast_kernels.common.device import Device

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KIB = 1024
# small tiles, so that small sizes take several blocks and several splits
LAUNCHES = {
    "prefill": PrefillLaunch(block_m=16, block_n=16, num_warps=4, num_stages=2),
    "decode": DecodeLaunch(block_m=64, block_n=16, num_splits=1, num_warps=4, num_stages=2),
    # more than there are blocks of keys: the last are left without keys
    "decode 4 splits": DecodeLaunch(64, 16, 4, 4, 1),
}
HEADS_FIRST = PrefillLaunch(32, 16, 4, 1, heads_first=True)
FEATURES = {
    "causal": {},
    "full": {"causal": False},
    "scale": {"scale": 0.7},
    "window": {"window": 7},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
    "left padding": {"key_start": torch.tensor([0, 13])},
    "right padding": {"key_end": torch.tensor([22, 37], dtype=torch.int32)},
    "no key": {"key_start": torch.tensor([5, 20]), "key_end": torch.tensor([30, 20])},
    "offset": {"query_offset": 3},
    "offset of each row": {"query_offset": torch.tensor([9, -4])},
    "offset of all rows": {"query_offset": torch.tensor(40)},
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_launch = pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_for(launch, dtype=torch.float32):
    """Make two blocks of queries for the prefill kernel, a few queries for the decode kernel."""
    return make(n_queries=18 if isinstance(launch, PrefillLaunch) else 5, dtype=dtype)


# the reference


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_reference_matches_the_formula_in_float64(features):
    q, k, v = make(dtype=torch.float64)
    out, lse = flash_attention_reference(q, k, v, **features, return_lse=True)
    expected, expected_lse = oracle(q, k, v, **features)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=2e-7, atol=1e-7)
    assert torch.equal(out, flash_attention_reference(q, k, v, **features))


@each_dtype
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_reference_is_no_worse_than_plain_pytorch(features, dtype):
    q, k, v = make(dtype=dtype)
    out, lse = flash_attention_reference(q, k, v, **features, return_lse=True)
    assert_close(out, lse, q, k, v, **features)


class Module:
    """The attributes that transformers' attention functions read from their module."""

    num_key_value_groups = 2
    training = False

    def __init__(self, sinks=None):
        self.sinks = sinks


def dense_mask(n_queries, n_keys, window=None):
    pos = torch.arange(n_keys - n_queries, n_keys)[:, None]
    keys = torch.arange(n_keys)
    keep = (keys <= pos) & (keys > pos - (window or n_keys + 1))
    return torch.zeros(1, 1, n_queries, n_keys).masked_fill(~keep, torch.finfo().min)


@pytest.mark.parametrize(
    ("theirs", "their_args", "features"),
    [
        (llama_attention, {}, {}),
        (llama_attention, {}, {"window": 9}),
        (gemma2_attention, {"softcap": 1.5}, {"softcap": 1.5, "window": 9}),
        (gpt_oss_attention, {}, {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])}),
    ],
    ids=["llama", "sliding window", "gemma2", "gpt-oss"],
)
def test_reference_is_what_transformers_computes(theirs, their_args, features):
    q, k, v = make()
    module = Module(features.get("sinks"))
    mask = dense_mask(q.shape[1], k.shape[1], features.get("window"))
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    expected, _ = theirs(module, *heads_first, mask, scaling=24**-0.5, **their_args)
    torch.testing.assert_close(flash_attention_reference(q, k, v, **features), expected)


# the kernels


@each_dtype
@each_launch
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_kernels_compute_the_formula(features, launch, dtype, device):
    skip_bf16_in_the_interpreter(dtype, device)
    q, k, v = make_for(launch, dtype)
    out, lse = launch_flash_attention(
        *to(device, (q, k, v)), **to(device, features), return_lse=True, launch=launch
    )
    assert_close(out, lse, q, k, v, **features)


PAIRS = [
    (a, b)
    for a, b in itertools.combinations(list(FEATURES)[1:], 2)
    if not FEATURES[a].keys() & FEATURES[b].keys()
]


@pytest.mark.parametrize(
    ("pair", "launch", "dtype"),
    [
        pytest.param(pair, launch, dtype, id=f"{pair[0]} and {pair[1]}")
        for pair, launch, dtype in zip(
            PAIRS,
            itertools.cycle([LAUNCHES["prefill"], LAUNCHES["decode 4 splits"], LAUNCHES["decode"]]),
            itertools.cycle([torch.float32, torch.float16]),
            strict=False,
        )
    ],
)
def test_features_work_together(pair, launch, dtype, device):
    features = FEATURES[pair[0]] | FEATURES[pair[1]]
    q, k, v = make_for(launch, dtype)
    out, lse = launch_flash_attention(
        *to(device, (q, k, v)), **to(device, features), return_lse=True, launch=launch
    )
    assert_close(out, lse, q, k, v, **features)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.fixed_dictionaries(
        {
            "batch": st.integers(0, 2),
            "n_queries": st.integers(0, 30),
            "n_keys": st.integers(0, 70),
            "kv_heads": st.integers(1, 2),
            "dim": st.sampled_from([1, 8, 16, 20, 32, 80]),
        }
    ),
    group=st.sampled_from([1, 2, 3]),
    launch=st.sampled_from([*LAUNCHES.values(), HEADS_FIRST, None]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 5, 40]),
)
def test_kernels_take_any_shape(device, shape, group, launch, dtype, causal, window):
    q, k, v = make(heads=shape["kv_heads"] * group, **shape, dtype=dtype)
    if isinstance(launch, DecodeLaunch):
        launch = DecodeLaunch(128, 16, launch.num_splits, 4, 1)
    features = {"causal": causal, "window": window}
    out, lse = launch_flash_attention(
        *to(device, (q, k, v)), **features, return_lse=True, launch=launch
    )
    if q.numel() and k.numel():
        assert_close(out, lse, q, k, v, **features)
    else:
        assert out.shape == q.shape and not out.any()
        assert (lse == -math.inf).all()


@each_dtype
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("n_queries", [1, 3, 18], ids=["one", "few", "many"])
def test_kernels_as_chosen_take_every_head_dim(n_queries, dim, dtype, device):
    skip_bf16_in_the_interpreter(dtype, device)
    q, k, v = make(1, n_queries, 21, 4, 1, dim, dtype)
    out, lse = launch_flash_attention(*to(device, (q, k, v)), return_lse=True)
    assert_close(out, lse, q, k, v)


def test_wide_windows_have_blocks_without_a_mask(device):
    q, k, v = make(1, 20, 90, 1, 1)
    for window in (33, 50, 64):
        features = {"window": window, "key_start": torch.tensor([30])}
        out, lse = launch_flash_attention(
            *to(device, (q, k, v)),
            **to(device, features),
            return_lse=True,
            launch=LAUNCHES["prefill"],
        )
        assert_close(out, lse, q, k, v, **features)


def test_merge_takes_more_splits_than_it_holds_at_once(device):
    q, k, v = make(1, 1, 1110, 2, 1)
    k[:, -50:] *= 3  # the largest scores are last
    out, lse = launch_flash_attention(
        *to(device, (q, k, v)), return_lse=True, launch=DecodeLaunch(16, 16, 70, 4, 1)
    )
    assert_close(out, lse, q, k, v)


def test_extreme_scores_stay_finite(device):
    """Weights that underflow next to each other, and scores of a thousand."""
    q, k, v = make(n_queries=5)
    for sign in (1, -1):
        k[:] = sign * 300 * q[:, :1, :2] / q[:, :1, :2].norm(dim=-1, keepdim=True)
        for launch in LAUNCHES.values():
            out = launch_flash_attention(*to(device, (q, k, v)), causal=False, launch=launch)
            expected = flash_attention_reference(q, k, v, causal=False)
            torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-4)


# memory: layouts, what lies outside, what is written


@each_launch
def test_views_as_transformers_makes_them(launch, device):
    """The queries are [B, H, L, D] transposed, the keys a slice of a longer cache full of NaN."""
    q, k, v = make_for(launch)
    q_view = q.transpose(1, 2).contiguous().transpose(1, 2)
    caches = torch.full((2, 2, 2, 64, 24), math.nan)
    caches[:, :, :, 5:42] = torch.stack([k, v]).transpose(2, 3)
    k_view, v_view = (cache[:, :, 5:42].transpose(1, 2) for cache in to(device, caches))
    out = launch_flash_attention(to(device, q_view), k_view, v_view, launch=launch)
    torch.testing.assert_close(out.cpu(), flash_attention_reference(q, k, v), rtol=1e-4, atol=1e-5)
    assert out.is_contiguous()


def ranges(device):
    key_start, key_end = torch.tensor([3, 0]), torch.tensor([29, 0])
    return {"key_start": key_start.to(device), "key_end": key_end.to(device)}


def unwritten(k, v, key_start, key_end):
    """Put NaN where no query may look."""
    keys = torch.arange(k.shape[1], device=k.device)[:, None, None]
    inside = (keys >= key_start[:, None, None, None]) & (keys < key_end[:, None, None, None])
    return (x.masked_fill(~inside, math.nan) for x in (k, v))


@each_launch
@pytest.mark.parametrize("features", [{}, {"causal": False}, {"window": 20}], ids=str)
def test_keys_outside_their_range_may_be_unwritten(features, launch, device):
    q, k, v = to(device, make_for(launch))
    expected = flash_attention_reference(q, k, v, **ranges(device), **features)
    k_nan, v_nan = unwritten(k, v, **ranges(device))
    args = (q, k_nan, v_nan)
    got = launch_flash_attention(*args, **ranges(device), **features, launch=launch)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got = flash_attention_reference(*args, **ranges(device), **features)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@each_launch
def test_keys_after_the_last_query_may_be_unwritten(launch, device):
    """A static cache: the query's position counts, not the length of the cache."""
    q, k, v = to(device, make(n_queries=3))
    expected = flash_attention_reference(q, k[:, :20], v[:, :20])
    k[:, 20:] = v[:, 20:] = math.nan
    for offset in (17, torch.tensor([17], device=device)):
        got = launch_flash_attention(q, k, v, query_offset=offset, launch=launch)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        got = flash_attention_reference(q, k, v, query_offset=offset)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@each_launch
def test_ranges_beyond_the_keys_are_cut_off(launch, device):
    q, k, v = to(device, make_for(launch))
    around = torch.full((2, 2, 57, 2, 24), math.nan, device=device)
    around[:, :, 10:47] = torch.stack([k, v])
    beyond = {
        "key_start": torch.tensor([-7, 0], device=device),
        "key_end": torch.tensor([37, 45], device=device),
    }
    for causal in (True, False):
        got = launch_flash_attention(
            q, *around[:, :, 10:47], **beyond, causal=causal, launch=launch
        )
        expected = flash_attention_reference(q, k, v, causal=causal)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@each_launch
def test_nothing_is_written_outside_the_outputs(launch, device, monkeypatch):
    """Every allocation of the launch lies between two bands that must keep their value."""
    q, k, v = to(device, make(dim=20))
    band, bases = 256, []
    make_empty = torch.empty

    def banded(*size, **kwargs):
        shape = torch.Size(size[0] if isinstance(size[0], (tuple, list)) else size)
        base = make_empty(shape.numel() + 2 * band, **kwargs).fill_(42)
        bases.append(base)
        return base[band:-band].fill_(math.nan).view(shape)

    monkeypatch.setattr(torch, "empty", banded)
    out, lse = launch_flash_attention(q, k, v, return_lse=True, launch=launch)
    assert len(bases) == (3 if getattr(launch, "num_splits", 1) > 1 else 2)
    assert all((base[:band] == 42).all() and (base[-band:] == 42).all() for base in bases)
    assert out.isfinite().all() and lse.isfinite().all()


@each_launch
def test_arguments_are_left_unchanged(launch, device):
    args = to(device, make_for(launch))
    features = to(device, FEATURES["no key"] | FEATURES["sinks"] | FEATURES["offset of each row"])
    before = [x.clone() for x in (*args, *features.values())]
    launch_flash_attention(*args, **features, launch=launch)
    after = (*args, *features.values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# sequences laid end to end

LENGTHS_Q, LENGTHS_K = [0, 7, 1, 18, 3], [4, 17, 33, 9, 0]


def make_varlen(device, dtype=torch.float32, padding=0):
    q, k, v = (
        x[0] for x in make(1, sum(LENGTHS_Q) + padding, sum(LENGTHS_K) + padding, dtype=dtype)
    )
    bounds = {
        f"cu_seqlens_{name}": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        for name, lengths in (("q", LENGTHS_Q), ("k", LENGTHS_K))
    }
    args = to(device, (q, k, v))
    return args, to(device, bounds) | {"max_seqlen_q": 18, "max_seqlen_k": 33}


@each_dtype
@each_launch
@pytest.mark.parametrize("name", ["causal", "full", "window", "sinks"])
def test_varlen_is_each_sequence_alone(name, launch, dtype, device):
    skip_bf16_in_the_interpreter(dtype, device)
    features = FEATURES[name]
    args, bounds = make_varlen(device, dtype)
    out, lse = launch_flash_attention_varlen(
        *args, **bounds, **to(device, features), return_lse=True, launch=launch
    )
    assert lse.shape == (4, sum(LENGTHS_Q))
    q, k, v = (x.cpu() for x in args)
    start_q = start_k = 0
    for n_queries, n_keys in zip(LENGTHS_Q, LENGTHS_K, strict=True):
        of_q, of_k = slice(start_q, start_q + n_queries), slice(start_k, start_k + n_keys)
        start_q, start_k = start_q + n_queries, start_k + n_keys
        if n_queries and n_keys:
            one = (q[None, of_q], k[None, of_k], v[None, of_k])
            assert_close(out[None, of_q], lse[None, :, of_q], *one, **features)
        else:
            assert not out[of_q].any()
    expected = flash_attention_varlen_reference(q, k, v, **to("cpu", bounds), **features)
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-2, atol=1e-2)


@each_launch
def test_varlen_writes_no_row_past_the_last_sequence(launch, device):
    args, bounds = make_varlen(device, padding=5)
    out, lse = launch_flash_attention_varlen(*args, **bounds, return_lse=True, launch=launch)
    n = sum(LENGTHS_Q)
    assert out[:n].isfinite().all() and out[n:].isnan().all()  # fresh memory is poisoned
    assert not lse[:, :n].isnan().any() and lse[:, n:].isnan().all()


def test_varlen_as_chosen_and_with_generous_bounds(device):
    args, bounds = make_varlen(device)
    expected = flash_attention_varlen_reference(*args, **bounds)
    for longest in (18, 90):
        got = launch_flash_attention_varlen(*args, **bounds | {"max_seqlen_q": longest})
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# the operations: dispatch and refusals


def test_op_gives_what_its_implementation_gives(device):
    q, k, v = to(device, make())
    on_gpu = device.type == "cuda"
    run = launch_flash_attention if on_gpu else flash_attention_reference
    assert torch.equal(flash_attention(q, k, v), run(q, k, v))
    for got, expected in zip(
        flash_attention(q, k, v, **to(device, FEATURES["no key"]), return_lse=True),
        run(q, k, v, **to(device, FEATURES["no key"]), return_lse=True),
        strict=True,
    ):
        assert torch.equal(got, expected)
    args, bounds = make_varlen(device)
    run = launch_flash_attention_varlen if on_gpu else flash_attention_varlen_reference
    assert torch.equal(
        flash_attention_varlen(*args, **bounds, window=5), run(*args, **bounds, window=5)
    )


def test_launchers_have_the_signature_of_their_reference():
    for launcher, reference in (
        (launch_flash_attention, flash_attention_reference),
        (launch_flash_attention_varlen, flash_attention_varlen_reference),
    ):
        taken = dict(inspect.signature(launcher).parameters)
        del taken["launch"]
        assert list(taken.values()) == list(inspect.signature(reference).parameters.values())


Q, K = torch.ones(2, 5, 4, 8), torch.ones(2, 7, 2, 8)
INTS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("q", "k", "v", "features", "error", "says"),
    [
        (Q.int(), K, K, {}, TypeError, "q must be .* torch.int32"),
        (Q, K.half(), K, {}, TypeError, "q's dtype torch.float32, got torch.float16"),
        (Q, K, K.double(), {}, TypeError, "q's dtype torch.float32, got .*torch.float64"),
        (Q, K.to("meta"), K, {}, ValueError, "on cpu as q is, got meta"),
        (Q[0], K, K, {}, ValueError, r"\[B, Lq, Hq, D\].*\(5, 4, 8\)"),
        (Q, K[:1], K, {}, ValueError, r"one B, got \(2, .* \(1, "),
        (Q, K, K[:, :6], {}, ValueError, r"k's shape \(2, 7, 2, 8\), got \(2, 6, 2, 8\)"),
        (Q, K, K[..., :4], {}, NotImplementedError, "v's head dimension must be k's, 8, got 4"),
        (Q, K[..., :4], K[..., :4], {}, ValueError, "one head dimension .* got 8 and 4"),
        (Q[..., :0], K[..., :0], K[..., :0], {}, ValueError, "at least 1, got 0"),
        (Q[:, :, :3], K, K, {}, ValueError, "multiple of those of k, got 3 and 2"),
        (Q, K[:, :, :0], K[:, :, :0], {}, ValueError, "multiple of those of k, got 4 and 0"),
        (Q, K, K.mT.contiguous().mT, {}, ValueError, r"last stride of 1.*\(112, 16, 1, 2\)"),
        (Q, K, K, {"scale": 0.0}, ValueError, "scale must be more than 0, got 0.0"),
        (Q, K, K, {"scale": math.nan}, ValueError, "scale must be more than 0, got nan"),
        (Q, K, K, {"softcap": -1.0}, ValueError, "softcap must be more than 0, got -1.0"),
        (Q, K, K, {"window": 0}, ValueError, "window must be at least 1, got 0"),
        (Q, K, K, {"sinks": INTS}, TypeError, "sinks must have a float dtype, got torch.int64"),
        (Q, K, K, {"sinks": torch.ones(2)}, ValueError, r"shape \(4,\) .*got \(2,\)"),
        (Q, K, K, {"sinks": torch.ones(8)[::2]}, ValueError, r"sinks must be contiguous.*\(2,\)"),
        (Q, K, K, {"key_start": INTS.short()}, TypeError, "key_start must be int32 or int64"),
        (Q, K, K, {"key_end": INTS[:1]}, ValueError, r"key_end .*shape \(2,\).*got \(1,\)"),
        (Q, K, K, {"key_end": INTS.to("meta")}, ValueError, "key_end .*on cpu; got .* on meta"),
        (Q, K, K, {"query_offset": INTS.float()}, TypeError, "query_offset must be int32"),
        (Q, K, K, {"query_offset": INTS.repeat(2)}, ValueError, r"query_offset .*\(2,\).*\(4,\)"),
    ],
)
def test_bad_arguments_are_named(q, k, v, features, error, says):
    with pytest.raises(error, match=f"^flash_attention: .*{says}"):
        flash_attention(q, k, v, **features)


BOUNDS = {
    "cu_seqlens_q": torch.tensor([0, 5]),
    "cu_seqlens_k": torch.tensor([0, 7]),
    "max_seqlen_q": 5,
    "max_seqlen_k": 7,
}


@pytest.mark.parametrize(
    ("q", "changed", "error", "says"),
    [
        (Q, {}, ValueError, r"\[Tq, Hq, D\].*\(2, 5, 4, 8\)"),
        (Q[0].int(), {}, TypeError, "torch.int32"),
        (Q[0], {"cu_seqlens_q": torch.tensor(5)}, ValueError, r"cu_seqlens_q .*\[B \+ 1\]"),
        (Q[0], {"cu_seqlens_q": torch.ones(2)}, TypeError, "cu_seqlens_q .*torch.float32"),
        (Q[0], {"cu_seqlens_k": INTS.repeat(2)}, ValueError, r"cu_seqlens_k .*\(2,\).*\(4,\)"),
        (Q[0], {"max_seqlen_k": -1}, ValueError, "at least 0, got 5 and -1"),
        (Q[0], {"window": 0}, ValueError, "window"),
    ],
)
def test_bad_arguments_of_varlen_are_named(q, changed, error, says):
    with pytest.raises(error, match=f"^flash_attention_varlen: .*{says}"):
        flash_attention_varlen(q, K[0], K[0], **BOUNDS | changed)


def test_no_backward():
    q = Q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"^flash_attention: no backward; call under torch.no_g"):
        flash_attention(q, K, K)
    with torch.no_grad():
        assert flash_attention(q, K, K).shape == q.shape


# ranges beyond int32


FAR = (-(2**63), -(2**32), -(2**31) - 1, 2**31, 2**32, 2**63 - 1)


@each_launch
@pytest.mark.parametrize("name", ["key_start", "key_end", "query_offset"])
@pytest.mark.parametrize("far", FAR)
def test_ranges_beyond_int32_are_cut_off(name, far, launch, device):
    """Two sequences: one attends everything or nothing, the other its usual keys."""
    q, k, v = (x.to(device) for x in make_for(launch))
    usual = {"key_start": 1, "key_end": 7, "query_offset": k.shape[1] - q.shape[1]}[name]
    values = [far, *[usual] * (q.shape[0] - 1)]
    features = {name: torch.tensor(values, dtype=torch.int64, device=device)}
    if name == "query_offset":
        features["window"] = 9
    out, lse = launch_flash_attention(q, k, v, **features, return_lse=True, launch=launch)
    # the reference adds to the offset in int64, where the farthest would wrap round
    near = {n: x.clamp(-(2**62), 2**62) if n == "query_offset" else x for n, x in features.items()}
    exact, exact_lse = flash_attention_reference(q, k, v, **near, return_lse=True)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-6)


# the choice of the launch


def gpu(sm_count, shared_memory=227 * KIB):
    return Device("", "sm_90", sm_count, shared_memory, l2_bytes=0)


@pytest.mark.parametrize("shared_memory", [99 * KIB, 163 * KIB, 227 * KIB])
@pytest.mark.parametrize("element_size", [2, 4])
def test_every_launch_fits_shared_memory(element_size, shared_memory):
    for dim, n in itertools.product([1, 16, 64, 80, 128, 129, 256], [1, 16, 17, 32, 64, 65, 9999]):
        common = {
            "head_dim": dim,
            "element_size": element_size,
            "device": gpu(132, shared_memory),
        }
        launches = [prefill.choose_prefill_launch(n_queries=n, **common)]
        if n <= decode.max_rows(element_size):
            launches += [decode.choose_decode_launch(sequences=8, rows=n, key_blocks=64, **common)]
            assert n <= launches[-1].block_m
        for one in launches:
            used = shared_bytes(one.block_m, one.block_n, one.num_stages, dim, element_size)
            assert used <= shared_memory, (dim, n, one)
            assert one.block_m >= 16 and one.block_n >= 16 and one.num_warps in (4, 8)


def splits(sequences, keys, sm_count=132):
    return decode.choose_decode_launch(
        sequences=sequences,
        rows=4,
        key_blocks=-(-keys // 64),
        head_dim=128,
        element_size=2,
        device=gpu(sm_count),
    ).num_splits


def test_splits_fill_the_gpu_and_no_more():
    assert splits(8, 1) == splits(8, 64) == splits(8, 0) == splits(0, 4096) == 1
    assert splits(8, 1024) == 16  # one block each
    assert 128 <= 8 * splits(8, 8192) <= 4 * 132
    assert 128 <= 8 * splits(8, 131072) <= 4 * 132
    assert splits(8 * 8, 4096) == 2 and splits(17 * 8, 2048) > 1  # or 4 of 132 would have twice
    assert splits(64 * 8, 4096) == splits(32 * 8, 2048) == 1
    assert splits(100_000, 131072) == 1
    for sequences, keys in itertools.product([1, 7, 8, 64, 300, 2048], [65, 1000, 4096, 131072]):
        for sm_count in (1, 60, 132):
            blocks, got = -(-keys // 64), splits(sequences, keys, sm_count)
            assert 1 <= got <= blocks
            assert -(-blocks // -(-blocks // got)) == got  # no split is left without keys


def test_few_queries_take_the_decode_kernel():
    def chosen(n_queries, dtype=torch.float16, window=None):
        q = torch.ones(1, n_queries, 4, 8, dtype=dtype)
        return choose_launch(q, 1, 1, n_queries, 100_000, window)

    assert isinstance(chosen(1), DecodeLaunch) and chosen(1).block_m == 16
    assert isinstance(chosen(16), DecodeLaunch) and chosen(16).block_m == 64
    assert isinstance(chosen(17), PrefillLaunch)
    assert isinstance(chosen(8, torch.float32), DecodeLaunch)
    assert isinstance(chosen(9, torch.float32), PrefillLaunch)
    assert chosen(1).num_splits > 64 and chosen(1, window=64).num_splits == 1


# on a GPU only


@gpu_only
def test_float64_and_wide_heads_are_refused_on_cuda():
    q = torch.ones(1, 1, 1, 8, device="cuda", dtype=torch.float64)
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        flash_attention(q, q, q)
    q = torch.ones(1, 1, 1, 257, device="cuda")
    with pytest.raises(NotImplementedError, match="at most 256 on CUDA, got 257"):
        flash_attention(q, q, q)


@gpu_only
@pytest.mark.parametrize("n_queries", [1, 200], ids=["decode", "prefill"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_long_inputs_in_bfloat16(n_queries, dim):
    """Real sizes: full tiles, many blocks, many splits. Against float32 of the same input."""
    gen = torch.Generator("cuda").manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=gen, device="cuda").bfloat16()

    q, k, v = randn(3, n_queries, 8, dim), randn(3, 3001, 2, dim), randn(3, 3001, 2, dim)
    features = {"key_start": torch.tensor([0, 700, 1], device="cuda"), "window": 2500}
    out = flash_attention(q, k, v, **features)
    exact = flash_attention_reference(q.double(), k.double(), v.double(), **features)
    error = (out - exact).square().mean().sqrt()
    # weights and output are each rounded once: half a unit at most, so less than one together
    assert error <= torch.finfo(torch.bfloat16).eps * exact.square().mean().sqrt()


@gpu_only
@pytest.mark.parametrize("n_queries", [1, 100], ids=["decode", "prefill"])
def test_keys_past_two_to_the_31_elements(n_queries):
    n_keys = 2**31 // (8 * 128) + 1000  # 4 GiB of keys, 4 of values
    k = torch.empty(1, n_keys, 8, 128, device="cuda", dtype=torch.bfloat16)
    v = torch.empty_like(k)
    for x in (k, v):
        x[:, -2000:].normal_()
    q = torch.randn(1, n_queries, 8, 128, device="cuda").bfloat16()
    key_start = torch.tensor([n_keys - 1500], device="cuda")
    out = flash_attention(q, k, v, key_start=key_start)
    expected = flash_attention(q, k[:, -1500:].clone(), v[:, -1500:].clone())
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-3)


@gpu_only
def test_queries_past_two_to_the_31_elements():
    n_queries = 2**31 // (32 * 64) + 1000  # 4 GiB of queries, 4 of output
    q = torch.empty(1, n_queries, 32, 64, device="cuda", dtype=torch.bfloat16)
    q[:, -300:].normal_()
    k, v = torch.randn(2, 1, n_queries, 1, 64, device="cuda").bfloat16()
    out = flash_attention(q, k, v, window=16)
    expected = flash_attention(
        q[:, -300:].clone(), k[:, -315:].clone(), v[:, -315:].clone(), window=16
    )
    # other blocks, other roundings of the weights: half a unit of their sum, twice, times a value
    atol = torch.finfo(torch.bfloat16).eps / 2 * float(v.abs().max())
    torch.testing.assert_close(out[:, -300:], expected, rtol=2**-7, atol=atol)


@gpu_only
@pytest.mark.parametrize("n_queries", [1, 70], ids=["decode", "prefill"])
def test_a_captured_graph_follows_its_tensors(n_queries):
    """Positions and ranges are read on the device: a replay sees their new values."""
    q, k, v = to("cuda", make(2, n_queries, 3000, 8, 2, 64, torch.bfloat16))
    offset = torch.tensor([200, 300], device="cuda")
    key_start = torch.tensor([0, 10], device="cuda")

    def run():
        return flash_attention(q, k, v, query_offset=offset, key_start=key_start)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for step in (0, 1000, 2500):
        offset += step
        key_start += step // 3
        graph.replay()
        assert torch.equal(out, run())


@gpu_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_it_runs_on_the_tensors_own_device():
    q, k, v = to("cuda:1", make(dtype=torch.float16))
    out = flash_attention(q, k, v)
    assert out.device == q.device
    torch.testing.assert_close(out, flash_attention_reference(q, k, v), rtol=1e-2, atol=1e-2)
