"""sample_tokens: the reference against transformers and exact odds, the kernel against it."""

import pytest
import torch
import triton
import triton.language as tl
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmfast_kernels.sampling import kernel, sample_tokens
from llmfast_kernels.sampling.kernel import Launch, choose_launch, launch_sample_tokens
from llmfast_kernels.sampling.kernels.sample import (
    filter_lists,
    filter_small_candidates,
)
from llmfast_kernels.sampling.kernels.sample import kept_weights as kept_weights_of_chunk
from llmfast_kernels.sampling.op import MAX_VOCAB
from llmfast_kernels.sampling.reference import (
    ALL_MASKED,
    NOT_FINITE,
    OK,
    kept_weights,
    penalise,
    philox,
    sample_tokens_reference,
)

VOCABS = [1, 7, 128, 1009]
FILTERS = {  # as transformers has them: None is off
    "none": (None, None, None),
    "top-k": (5, None, None),
    "top-p": (None, 0.75, None),
    "min-p": (None, None, 0.05),
    "top-k top-p": (20, 0.875, None),
    "top-p min-p": (None, 0.9375, 0.1),
    "all": (40, 0.96875, 0.02),
    "one by top-k": (1, None, None),
    "one by top-p": (None, 0.0, None),
    "one by min-p": (None, None, 1.0),
    "more than there is": (5000, 0.999, 1e-9),
}
LAUNCHES = {
    "wide": Launch(
        *(32, 32), groups=2, width=32, small=32, listed_by_row=True, num_warps=1, row_warps=4
    ),
    "narrow": Launch(
        *(8, 16), groups=2, width=2, small=4, listed_by_row=False, num_warps=1, row_warps=2
    ),
}
INF, NAN = float("inf"), float("nan")

on_cuda = torch.cuda.is_available()
each_filter = pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
each_vocab = pytest.mark.parametrize("n_vocab", VOCABS)


def random_logits(n_rows, n_vocab, seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(n_rows, n_vocab, generator=gen)).to(dtype)


def per_row(value, n_rows, dtype=torch.float32):
    return None if value is None else torch.full((n_rows,), value, dtype=dtype)


def filter_tensors(filters, n_rows):
    k, p, m = filters
    return {
        "top_k": per_row(k, n_rows, torch.int32),
        "top_p": per_row(p, n_rows),
        "min_p": per_row(m, n_rows),
    }


def transformers_filters(filters):
    warpers = zip((TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper), filters, strict=True)
    return LogitsProcessorList([warper(value) for warper, value in warpers if value is not None])


def draw_options(n_rows, temperature=1.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return {
        "temperature": torch.full((n_rows,), temperature),
        "seeds": torch.randint(-(2**62), 2**62, (n_rows,), generator=gen),
        "positions": torch.randint(0, 2**40, (n_rows,), generator=gen),
    }


def everything(n_rows, n_vocab, seed=0):
    """Every option, each row another mixture: greedy, off and on."""
    gen = torch.Generator().manual_seed(seed)

    def pick(*values, dtype=torch.float32):
        return torch.tensor([values[i % len(values)] for i in range(n_rows)], dtype=dtype)

    return {
        **draw_options(n_rows, seed=seed),
        "temperature": pick(0.7, 1.0, 0.0, 1.5, 0.2, 3.0),
        "top_k": pick(0, 5, 3, 50, 1, 20000, -1, dtype=torch.int32),
        "top_p": pick(0.9, 1.0, 0.5, 0.8, 0.0),
        "min_p": pick(0.0, 0.05, 0.3),
        "repetition_penalty": pick(1.3, 1.0, 0.8),
        "presence_penalty": pick(0.5, 0.0),
        "frequency_penalty": pick(0.2, -0.1, 0.0),
        "prompt_seen": torch.rand(n_rows, n_vocab, generator=gen) < 0.3,
        "output_counts": torch.randint(0, 3, (n_rows, n_vocab), generator=gen, dtype=torch.int32),
        "bias": torch.randn(n_rows, n_vocab, generator=gen),
    }


def moved(options, device):
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}


def check_kernel(logits, device, **options):
    """Scores are the same bit for bit; exp may differ in its last bits, and sums by as little."""
    got = launch_sample_tokens(logits.to(device), **moved(options, device))
    wanted = sample_tokens_reference(logits, **options)
    for name, actual, expected in zip(got._fields, got, wanted, strict=True):
        if expected is None:
            assert actual is None, name
            continue
        assert actual.dtype == expected.dtype, name
        if expected.is_floating_point():
            torch.testing.assert_close(
                actual.cpu(), expected, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name
            )
        else:
            assert actual.tolist() == expected.tolist(), name
    return got


@each_filter
@each_vocab
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_reference_keeps_what_transformers_keeps(n_vocab, filters, ties):
    logits = random_logits(4, n_vocab).double()
    if ties:
        logits = logits.round()
    warped = transformers_filters(filters)(None, logits)
    weights = kept_weights(logits, **filter_tensors(filters, 4))
    if not ties:
        assert torch.equal(weights > 0, warped > -INF)
    # of equal scores transformers keeps as many, but its sort leaves open which
    kept = logits.masked_fill(weights == 0, -INF)
    assert torch.equal(kept.sort(dim=-1).values, warped.sort(dim=-1).values)
    weights = weights.sort(dim=-1).values
    odds = weights.double() / weights.sum(dim=-1, keepdim=True)
    exact = warped.softmax(dim=-1).sort(dim=-1).values
    # each weight is cut by less than one step of 2**-40 of the largest
    torch.testing.assert_close(odds, exact, rtol=0, atol=n_vocab * 2.0**-40)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ((2, None, None), [0, 1, 2, 3]),  # every tie of the k-th is kept
        ((None, 0.5, None), [2, 3]),  # of ties the later index ranks higher
        ((None, 0.51, None), [1, 2, 3]),
        ((None, 0.0, None), [3]),
        ((None, None, 1.0), [0, 1, 2, 3]),
        ((2, 0.25, 1.0), [3]),
    ],
    ids=str,
)
def test_ties_are_cut_as_transformers_cuts_them(filters, kept, device):
    logits = torch.zeros(1, 4)
    assert (transformers_filters(filters)(None, logits) > -INF)[0].nonzero()[:, 0].tolist() == kept
    options = filter_tensors(filters, 1)
    assert kept_weights(logits, **options)[0].nonzero()[:, 0].tolist() == kept
    rows = 64 if on_cuda else 4
    options = filter_tensors(filters, rows) | draw_options(rows)
    tokens = check_kernel(logits.expand(rows, 4), device, **options).tokens
    assert set(tokens.tolist()) <= set(kept)
    assert not on_cuda or len(set(tokens.tolist())) == len(kept)


def test_penalties_are_those_of_transformers_and_of_the_formula():
    n_vocab, rows = 31, 3
    gen = torch.Generator().manual_seed(1)
    logits = random_logits(rows, n_vocab)
    prompt = torch.randint(0, n_vocab, (rows, 6), generator=gen)
    output = torch.randint(0, n_vocab, (rows, 9), generator=gen)
    seen = torch.zeros(rows, n_vocab, dtype=torch.bool).scatter(1, prompt, True)
    counts = torch.stack([row.bincount(minlength=n_vocab) for row in output]).int()
    assert counts.max() > 1

    repeated = RepetitionPenaltyLogitsProcessor(1.3)(torch.cat([prompt, output], 1), logits)
    got = penalise(logits, torch.full((rows,), 1.3), None, None, seen, counts, None)
    assert torch.equal(got, repeated)
    only_prompt = RepetitionPenaltyLogitsProcessor(1.3)(prompt, logits)
    got = penalise(logits, torch.full((rows,), 1.3), None, None, seen, None, None)
    assert torch.equal(got, only_prompt)

    bias = torch.randn(n_vocab, generator=gen)
    expected = repeated.clone()
    for row in range(rows):
        for token in set(output[row].tolist()):  # not of the prompt
            expected[row, token] -= 0.5 + 0.25 * output[row].tolist().count(token)
    got = penalise(
        logits,
        torch.full((rows,), 1.3),
        torch.full((rows,), 0.5),
        torch.full((rows,), 0.25),
        seen,
        counts,
        bias.expand(rows, n_vocab),
    )
    torch.testing.assert_close(got, expected + bias, rtol=1e-6, atol=1e-6)


def odds_of(logits, filters, temperature):
    scores = TemperatureLogitsWarper(temperature)(None, logits.double())
    return transformers_filters(filters)(None, scores).softmax(dim=-1)


@pytest.mark.parametrize(
    "filters", [FILTERS[k] for k in ("none", "top-k", "top-p", "min-p", "all")], ids=str
)
def test_draws_follow_the_odds(filters):
    """Chi-square of 8000 draws, at most the 99.9th percentile."""
    n_vocab, draws = 11, 8000
    logits = random_logits(1, n_vocab, seed=3) / 2
    options = filter_tensors(filters, draws) | draw_options(draws, temperature=1.25)
    options["seeds"][:] = 7  # a sequence's own draws: one seed, position after position
    options["positions"] = torch.arange(draws)
    tokens = sample_tokens(logits.expand(draws, -1), **options).tokens
    odds = odds_of(logits, filters, 1.25)[0]
    counts = tokens.bincount(minlength=n_vocab).double()
    assert (counts[odds == 0] == 0).all()
    expected = (draws * odds)[odds > 0]
    chi_square = ((counts[odds > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    quantile = [0, 10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32, 26.12, 27.88, 29.59]
    assert chi_square <= quantile[freedom] + 1e-9


@pytest.mark.parametrize(
    "n_vocab",
    [111, *(pytest.param(n, marks=pytest.mark.gpu) for n in (32000, 128256))],
)
@pytest.mark.parametrize(
    "filters", [f for name, f in FILTERS.items() if "one" not in name], ids=str
)
def test_total_variation_is_that_of_exact_draws(filters, n_vocab, device):
    """At most the 99.9th percentile of what as many exact draws give."""
    draws, trials = 2048, 1000
    logits = random_logits(1, n_vocab, seed=4).to(device)
    options = filter_tensors(filters, draws) | draw_options(draws)
    tokens = sample_tokens(logits.expand(draws, -1), **moved(options, device)).tokens.cpu()
    odds = odds_of(logits.cpu(), filters, 1.0)[0]

    def variation(tokens):
        counts = tokens.bincount(minlength=n_vocab).double()
        return 0.5 * (counts / len(tokens) - odds).abs().sum()

    up_to = odds.cumsum(0)
    gen = torch.Generator().manual_seed(0)
    exact = torch.rand(trials, draws, generator=gen, dtype=torch.float64) * up_to[-1]
    exact = torch.searchsorted(up_to, exact, right=True).clamp(max=n_vocab - 1)
    limit = torch.stack([variation(row) for row in exact]).quantile(0.999)
    assert variation(tokens) <= limit


@triton.jit
def _philox_kernel(seeds_ptr, positions_ptr, words_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    words = tl.randint4x(tl.load(seeds_ptr + at), tl.load(positions_ptr + at))
    tl.store(words_ptr + at, words[0].to(tl.int64))
    tl.store(words_ptr + N + at, words[1].to(tl.int64))


def test_random_words_are_tritons_and_the_papers(device):
    zero = torch.zeros(1, dtype=torch.int64)
    assert [hex(w.item()) for w in philox(zero, zero)] == ["0x6627e8d5", "0xe169c58d"]
    options = draw_options(16)
    seeds, positions = options["seeds"], options["positions"]
    words = torch.empty(2, 16, dtype=torch.int64, device=device)
    _philox_kernel[(1,)](seeds.to(device), positions.to(device), words, N=16)
    assert torch.equal((words & 0xFFFFFFFF).cpu(), torch.stack(philox(seeds, positions)))


@each_vocab
def test_kernel_matches_reference_with_everything_asked(n_vocab, device):
    rows = 30 if on_cuda else 6
    options = everything(rows, n_vocab) | {"logprobs": min(n_vocab, 3)}
    check_kernel(random_logits(rows, n_vocab), device, **options)


@each_filter
def test_kernel_matches_reference_filter_by_filter(filters, device):
    rows, n_vocab = (64, 1009) if on_cuda else (2, 61)
    for seed, logits in enumerate(
        (random_logits(rows, n_vocab), random_logits(rows, n_vocab) // 1)
    ):
        options = filter_tensors(filters, rows) | draw_options(rows, 0.8, seed)
        check_kernel(logits, device, **options)


@triton.jit(do_not_specialize=["stride_lists"])
def _kept_kernel(
    filters, candidates, scores_ptr, kept_ptr, sums_ptr, z_max_ptr, threshold_ptr, weights_ptr,
    stride_lists, n_vocab, CHUNK: tl.constexpr, MAX_CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
    SMALL: tl.constexpr,
):  # fmt: skip
    """Take the steps of sample_kernel, but store the weights and draw nothing."""
    row = tl.program_id(0).to(tl.int64)
    z_max = tl.load(z_max_ptr + row)
    if candidates.small_ptr is not None:
        n = tl.load(candidates.n_listed_ptr + row)
        if (n > 0) & (n <= SMALL):
            cols, kept = filter_small_candidates(
                row, n, z_max, filters, weights_ptr, candidates.small_ptr, n_vocab,
                CHUNK, MAX_CHUNKS, SMALL,
            )  # fmt: skip
            tl.store(kept_ptr + row * n_vocab + cols, kept, mask=tl.arange(0, SMALL) < n)
            tl.store(sums_ptr + row * MAX_CHUNKS, tl.sum(kept))
            return
    weights, last, skip, min_p, ties_before = filter_lists(
        row, z_max, filters, threshold_ptr, weights_ptr, candidates, stride_lists, n_vocab,
        CHUNK, MAX_CHUNKS, WIDTH,
    )  # fmt: skip
    chunks = tl.arange(0, MAX_CHUNKS)
    tl.store(sums_ptr + row * MAX_CHUNKS + chunks, weights)
    for start in range(0, n_vocab, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        z = tl.load(scores_ptr + row * n_vocab + cols, mask=cols < n_vocab, other=float("-inf"))
        before = tl.sum(tl.where(chunks == start // CHUNK, ties_before, 0))
        kept = kept_weights_of_chunk(z, z_max, last, skip, min_p, before)
        tl.store(kept_ptr + row * n_vocab + cols, kept, mask=cols < n_vocab)


def check_kept(logits, launch, device, monkeypatch, **options):
    """Compare what the kernels keep with the reference; return each row's number of candidates."""
    scores = logits.to(device)
    rows, n_vocab = scores.shape
    kept = torch.zeros(rows, n_vocab, dtype=torch.int64, device=device)
    sums = torch.zeros(rows, launch.max_chunks, dtype=torch.int64, device=device)
    n_listed = []

    def store(grid, args, **options):
        _, filters, candidates, _, _, *rest = args
        z_max, threshold, weights, stride_lists, _, *sizes = rest
        read = (z_max, threshold, weights, stride_lists, *sizes)
        _kept_kernel[grid](filters, candidates, scores, kept, sums, *read, **options)
        n_listed.append(candidates.n_listed_ptr)

    monkeypatch.setattr(kernel, "_sample", store)
    monkeypatch.setattr(kernel, "choose_launch", lambda n_rows, n_vocab: launch)
    launch_sample_tokens(scores, **moved(options | draw_options(rows), device))
    wanted = kept_weights(logits, **options)
    assert torch.equal((kept > 1).cpu(), wanted > 1)
    assert torch.equal(sums.sum(dim=1), kept.sum(dim=1))
    # exp differs in its last bits and is cut to an integer
    torch.testing.assert_close(kept.cpu().double(), wanted.double(), rtol=1e-5, atol=1)
    return n_listed[0]


@each_filter
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_kernel_keeps_what_the_reference_keeps(filters, ties, launch, device, monkeypatch):
    rows, n_vocab = (64, launch.max_chunks * 7 + 1) if on_cuda else (3, 61)
    spread = torch.tensor([2.0, 0.05, 12.0]).repeat(rows)[:rows, None]
    logits = spread * random_logits(rows, n_vocab, seed=8)
    logits[0, ::3] = -INF
    if ties:
        logits = (logits / 2).round() + 0.0  # no -0.0, as the kernel leaves none
    check_kept(logits, launch, device, monkeypatch, **filter_tensors(filters, rows))


@pytest.mark.parametrize("beyond", [0, 1])
@pytest.mark.parametrize("values", [1, 3, 1000], ids=["all ties", "some ties", "distinct"])
@pytest.mark.parametrize(("small", "by_row"), [(8, True), (8, False), (32, True)])
def test_both_ways_of_the_cut_keep_the_same(small, by_row, values, beyond, device, monkeypatch):
    """As many scores as are compared each with each, and one more; the rest far below."""
    n = small + beyond
    options = {
        "top_k": torch.tensor([0, 1, 3, n - 1, n, n + 1, 5, 3, 0, 2]),
        "top_p": torch.tensor([0.75, 1.0, 0.5, 0.9, 0.0, 0.6, 0.999, 1.0, 0.0, 0.3]),
        "min_p": torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0, 1.0, 0.5, 0.0]),
    }
    rows, n_vocab = 10, 67
    gen = torch.Generator().manual_seed(small + values)
    logits = torch.full((rows, n_vocab), -50.0)
    likely = torch.rand(rows, n_vocab, generator=gen).argsort(dim=1)[:, :n]
    levels = torch.randint(0, values, (rows, n), generator=gen).float() / values
    logits.scatter_(1, likely, 6 * levels)
    logits[-1, likely[-1]] -= torch.linspace(0, 27.9, n)  # what has hardly any weight
    launch = Launch(
        32, 4, groups=1, width=8, small=small, listed_by_row=by_row, num_warps=1, row_warps=4
    )
    n_listed = check_kept(logits, launch, device, monkeypatch, **options)
    assert (n_listed > small).any() == (beyond > 0)
    assert (n_listed <= small).any()
    if values == 3:
        monkeypatch.undo()
        monkeypatch.setattr(kernel, "choose_launch", lambda n_rows, n_vocab: launch)
        check_kernel(logits, device, **options, **draw_options(rows))


@pytest.mark.parametrize(("small", "by_row"), [(16, True), (16, False), (2, True)])
def test_groups_below_the_threshold_are_not_read_again(small, by_row, device, monkeypatch):
    """After chunk_max they become NaN, which nothing may notice."""
    rows, n_vocab, k = 3, 300, 4
    logits = random_logits(rows, n_vocab)
    launch = Launch(
        64, 8, groups=8, width=8, small=small, listed_by_row=by_row, num_warps=1, row_warps=4
    )
    options = filter_tensors((k, 0.9, 0.01), rows) | draw_options(rows)
    monkeypatch.setattr(kernel, "choose_launch", lambda n_rows, n_vocab: launch)
    wanted = sample_tokens_reference(logits, **options).tokens
    scores = logits.to(device)
    chunk_max, replaced = kernel._chunk_max, []

    def chunk_max_first(*args, **more):
        chunk_max(*args, **more)
        groups = torch.nn.functional.pad(logits, (0, -n_vocab % 8), value=-INF).view(rows, -1, 8)
        maxima = groups.amax(dim=2)
        # the threshold is as close as its search: 28 / 2**12
        below = maxima < maxima.topk(k, dim=1).values[:, -1:] - 0.01
        below = below.repeat_interleave(8, dim=1)[:, :n_vocab]
        scores.masked_fill_(below.to(device), NAN)
        replaced.append(below.float().mean())

    monkeypatch.setattr(kernel, "_chunk_max", chunk_max_first)
    got = launch_sample_tokens(scores, **moved(options, device)).tokens
    assert got.tolist() == wanted.tolist()
    assert replaced[0] > 0.5


def test_rows_of_many_chunks(device, monkeypatch):
    monkeypatch.setattr(kernel, "choose_launch", lambda n_rows, n_vocab: LAUNCHES["narrow"])
    check_kernel(random_logits(6, 101), device, logprobs=3, **everything(6, 101))
    ties = random_logits(4, 101).clamp(max=1.0)  # the largest in many chunks
    got = check_kernel(ties, device, logprobs=12)
    assert got.tokens.tolist() == [(row == 1).nonzero()[0].item() for row in ties]
    nucleus = {"top_p": torch.full((4,), 0.3)} | draw_options(4)  # cut among those ties
    check_kernel(ties, device, **nucleus)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernel_takes_every_dtype_and_row_strides(dtype, device):
    """Nothing is rounded to the logits' dtype, so bfloat16 runs in the interpreter too."""
    rows, n_vocab = 3, 37
    options = everything(rows, n_vocab) | {"logprobs": 2}
    plain = check_kernel(random_logits(rows, n_vocab, dtype=dtype), device, **options)
    wide = torch.full((rows, n_vocab + 11), NAN, dtype=dtype)
    wide[:, 3 : 3 + n_vocab] = random_logits(rows, n_vocab, dtype=dtype)
    for name in ("prompt_seen", "output_counts", "bias"):
        padded = torch.ones(rows, n_vocab + 5, dtype=options[name].dtype)
        padded[:, 1 : 1 + n_vocab] = options[name]
        options[name] = padded[:, 1 : 1 + n_vocab]
    strided = check_kernel(wide[:, 3 : 3 + n_vocab], device, **options)
    assert torch.equal(plain.tokens, strided.tokens)


def test_greedy_is_argmax_and_the_lowest_index_of_ties(device):
    logits = torch.tensor(
        [
            [1.0, 3.0, 3.0, 2.0, 3.0],
            [0.0, 0.0, 0.0, 0.0, 0.0],
            [-0.0, 0.0, -1.0, 0.0, -0.0],
            [-INF, -INF, -5.0, -INF, -5.0],
            [-1e30, 1e30, 0.0, 1e30, 1e30],
        ]
    )
    wanted = [1, 0, 0, 2, 1]
    assert check_kernel(logits, device).tokens.tolist() == wanted
    filters = filter_tensors(FILTERS["all"], 5)
    options = draw_options(5, temperature=0.0) | filters
    assert check_kernel(logits, device, **options).tokens.tolist() == wanted
    many = random_logits(20, 1009, dtype=torch.float16)  # ties are common in half precision
    first = [(row == row.max()).nonzero()[0].item() for row in many]
    assert check_kernel(many, device).tokens.tolist() == first


def test_greedy_is_of_the_penalised_scores(device):
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    counts = torch.tensor([[0, 0, 2], [0, 0, 0]], dtype=torch.int32)
    bias = torch.tensor([0.0, -INF, 0.0])
    options = {"frequency_penalty": torch.full((2,), 0.75), "output_counts": counts}
    assert check_kernel(logits, device, **options).tokens.tolist() == [1, 2]
    options["bias"] = bias.expand(2, 3)
    assert check_kernel(logits, device, **options).tokens.tolist() == [2, 2]
    got = sample_tokens(logits.to(device), **moved(options | {"bias": bias}, device))
    assert got.tokens.tolist() == [2, 2]


@pytest.mark.parametrize("temperature", [None, 0.0, 1.0])
def test_rows_without_an_answer_are_reported(temperature, device):
    logits = torch.zeros(6, 9)
    logits[1, 4] = NAN
    logits[2] = -INF
    logits[3, 8] = INF
    logits[4, :8] = -INF
    logits[5] = torch.tensor([-1e30, 1e30] * 4 + [-INF])
    options = {} if temperature is None else draw_options(6, temperature)
    options |= filter_tensors(FILTERS["all"], 6)
    got = check_kernel(logits, device, logprobs=2, **options)
    assert got.status.tolist() == [OK, NOT_FINITE, ALL_MASKED, NOT_FINITE, OK, OK]
    assert ((got.tokens >= 0) & (got.tokens < 9)).all()
    assert got.tokens[[1, 2, 3, 4]].tolist() == [0, 0, 0, 8]
    assert logits[5, got.tokens[5].item()] == 1e30
    broken = [False, True, True, True, False, False]
    assert got.logprobs.isnan().tolist() == broken
    assert got.top_logprobs.isnan().all(dim=1).tolist() == broken
    assert (got.top_tokens[1:4] == 0).all()


def test_rows_made_unusable_by_their_parameters_are_reported(device):
    logits = random_logits(4, 5)
    options = draw_options(4)
    options["temperature"] = torch.tensor([1.0, NAN, 1e-45, 1.0])
    options["bias"] = torch.zeros(4, 5)
    options["bias"][3] = -INF
    got = check_kernel(logits, device, **options)
    assert got.status.tolist() == [OK, NOT_FINITE, NOT_FINITE, ALL_MASKED]


def test_filters_outside_their_range(device):
    """NaN is the strictest filter, in the kernel as in the reference."""
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.5]]).expand(7, 4)
    options = {
        "top_p": torch.tensor([NAN, -1.0, 1.5, 1.0, 1.0, 1.0, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.0, NAN, -1.0, 1.5, -INF]),
    }
    kept = [{2}, {2}, {0, 1, 2, 3}, {1, 2}, {0, 1, 2, 3}, {1, 2}, {0, 1, 2, 3}]
    weights = kept_weights(logits, None, **options)
    assert [set(row.nonzero()[:, 0].tolist()) for row in weights] == kept
    for seed in range(2):
        draw = draw_options(7, seed=seed)
        tokens = check_kernel(logits, device, **options, **draw).tokens
        assert all(token in row for token, row in zip(tokens.tolist(), kept, strict=True))
        for name, value in options.items():  # each has code of its own
            check_kernel(logits, device, **{name: value}, **draw)


def test_rows_of_one_sequence_get_the_tokens_of_calls_for_each_alone(device):
    """As verifying drafts needs it: several rows of a sequence, each at its own position."""
    n_vocab, drafts = 61, torch.tensor([[7, 7, 9], [3, 11, 3]])
    sequences, per_sequence = 2, drafts.shape[1] + 1
    rows = sequences * per_sequence
    of_row = torch.arange(rows) // per_sequence
    logits = random_logits(rows, n_vocab).to(device)
    options = everything(sequences, n_vocab) | {"temperature": torch.tensor([0.8, 0.0])}
    counts = options["output_counts"].repeat_interleave(per_sequence, 0)
    positions = options["positions"][of_row] + torch.arange(per_sequence).repeat(sequences)
    for row in range(rows):
        before = drafts[of_row[row], : row % per_sequence]
        counts[row] += before.bincount(minlength=n_vocab)
    options = {name: value[of_row] for name, value in options.items()}
    options = moved(options | {"output_counts": counts, "positions": positions}, device)
    got = launch_sample_tokens(logits, **options).tokens
    for row in range(rows):
        alone = {name: value[row : row + 1] for name, value in options.items()}
        assert launch_sample_tokens(logits[row : row + 1], **alone).tokens == got[row]

    first = slice(0, per_sequence)  # the rows of a sequence may share its tensors
    options = {name: value[first] for name, value in options.items()}
    for name in ("prompt_seen", "bias"):
        options[name] = options[name][:1].expand(per_sequence, n_vocab)
    assert torch.equal(launch_sample_tokens(logits[first], **options).tokens, got[first])


def test_a_temperature_without_end_makes_all_alike_but_minus_infinity(device):
    logits = random_logits(3, 5)
    logits[1, 2] = -INF  # -inf / inf is no number
    logits[2] = -INF
    got = check_kernel(logits, device, **draw_options(3, temperature=INF))
    assert got.status.tolist() == [OK, NOT_FINITE, NOT_FINITE]
    options = draw_options(8, temperature=INF) | {"top_p": torch.full((8,), 0.5)}
    got = check_kernel(logits[:1].expand(8, 5), device, **options)
    assert set(got.tokens.tolist()) <= {2, 3, 4}


def test_a_masked_token_is_never_drawn(device):
    rows = 40
    logits = torch.full((rows, 17), -INF)
    logits[:, [3, 16]] = 1.0
    got = check_kernel(logits, device, **draw_options(rows, temperature=100.0))
    assert set(got.tokens.tolist()) == {3, 16}


def test_a_seed_repeats_its_draw_whatever_else_is_in_the_batch(device):
    rows, n_vocab = 6, 101
    logits = (random_logits(rows, n_vocab) / 2).to(device)
    options = moved(filter_tensors((50, 0.95, 0.001), rows) | draw_options(rows), device)
    tokens = launch_sample_tokens(logits, **options).tokens
    assert torch.equal(launch_sample_tokens(logits, **options).tokens, tokens)
    some = torch.tensor([3, 1, 5], device=device)
    picked = {name: value[some] for name, value in options.items()}
    assert torch.equal(launch_sample_tokens(logits[some], **picked).tokens, tokens[some])
    for name in ("seeds", "positions"):
        other = options | {name: options[name] + 1}
        assert not torch.equal(launch_sample_tokens(logits, **other).tokens, tokens)


@each_vocab
def test_log_probabilities_are_of_the_raw_logits(n_vocab, device):
    rows, n = 3, min(4, n_vocab)
    logits = random_logits(rows, n_vocab).round()  # ties among the top n
    options = draw_options(rows, 2.0) | {"bias": 5 * random_logits(rows, n_vocab, seed=9)}
    got = check_kernel(logits, device, logprobs=n, **options)
    exact = logits.double().log_softmax(dim=-1)
    chosen = exact.gather(1, got.tokens.cpu()[:, None])[:, 0]
    torch.testing.assert_close(got.logprobs.cpu().double(), chosen, rtol=1e-5, atol=1e-5)
    for row in range(rows):
        ranked = sorted(range(n_vocab), key=lambda i, r=logits[row]: (-r[i].item(), i))
        assert got.top_tokens[row].tolist() == ranked[:n]
        torch.testing.assert_close(
            got.top_logprobs[row].cpu().double(), exact[row, ranked[:n]], rtol=1e-5, atol=1e-5
        )
    alone = check_kernel(logits, device, logprobs=0, **options)
    assert torch.equal(alone.logprobs, got.logprobs) and alone.top_tokens is None


def test_no_rows_and_unwritten_memory(device, poison_empty):
    options = everything(0, 7)
    got = launch_sample_tokens(torch.zeros(0, 7, device=device), **moved(options, device))
    assert got.tokens.shape == (0,)
    check_kernel(random_logits(2, 9), device, logprobs=9, **everything(2, 9))


def test_arguments_are_left_unchanged(device):
    logits, options = random_logits(2, 33).to(device), moved(everything(2, 33), device)
    before = {name: value.clone() for name, value in options.items()}
    launch_sample_tokens(logits, logprobs=1, **options)
    assert torch.equal(logits.cpu(), random_logits(2, 33))
    assert all(torch.equal(options[name], before[name]) for name in options)


def test_op_gives_what_its_implementation_gives(device):
    logits, options = random_logits(3, 33).to(device), moved(everything(3, 33), device)
    implementation = launch_sample_tokens if on_cuda else sample_tokens_reference
    expected = implementation(logits, logprobs=2, **options)
    for got, wanted in zip(sample_tokens(logits, logprobs=2, **options), expected, strict=True):
        assert torch.equal(got, wanted)


def test_float64_is_kept_throughout():
    logits = random_logits(3, 33, dtype=torch.float64)
    logits[:, 5] = logits.amax(dim=-1) + 1e-12  # float32 would see a tie, or the other larger
    got = sample_tokens(logits, logprobs=1)
    assert got.tokens.tolist() == [5, 5, 5]
    assert got.logprobs.dtype == torch.float64
    exact = logits.log_softmax(dim=-1)[:, 5]
    torch.testing.assert_close(got.logprobs, exact, rtol=1e-14, atol=0)


@pytest.mark.gpu
def test_replays_of_a_graph_see_new_values_and_never_wait():
    logits = random_logits(4, 1009).cuda()
    options = moved(everything(4, 1009), "cuda")
    sample_tokens(logits, logprobs=2, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = sample_tokens(logits, logprobs=2, **options)
    for _ in range(3):
        options["positions"] += 1
        logits.add_(torch.randn_like(logits))
        graph.replay()
        assert torch.equal(got.tokens, sample_tokens(logits, logprobs=2, **options).tokens)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launch_is_on_the_tensors_device():
    logits, options = random_logits(3, 33), everything(3, 33)
    with torch.cuda.device(0):
        got = sample_tokens(logits.to("cuda:1"), **moved(options, "cuda:1"))
    assert got.tokens.tolist() == sample_tokens_reference(logits, **options).tokens.tolist()


GOOD = {
    "temperature": torch.ones(2),
    "seeds": torch.zeros(2, dtype=torch.int64),
    "positions": torch.zeros(2, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"temperature": torch.ones(2).double()}, TypeError, "temperature .*torch.float64"),
        ({"top_k": torch.ones(2)}, TypeError, "top_k must be torch.int32 or torch.int64, got"),
        ({"top_p": torch.ones(3)}, ValueError, r"top_p must have shape \(2,\), got \(3,\)"),
        ({"min_p": torch.ones(())}, ValueError, r"min_p must have shape \(2,\), got \(\)"),
        ({"top_p": torch.ones(2, device="meta")}, ValueError, "top_p must be on cpu.*got meta"),
        ({"top_p": torch.ones(4)[::2]}, ValueError, r"top_p .*stride 1, got strides \(2,\)"),
        ({"repetition_penalty": torch.ones(2).half()}, TypeError, "repetition_penalty"),
        ({"presence_penalty": torch.ones(2).half()}, TypeError, "presence_penalty"),
        ({"frequency_penalty": torch.ones(2).half()}, TypeError, "frequency_penalty"),
        ({"prompt_seen": torch.ones(2, 4)}, TypeError, "prompt_seen must be torch.bool"),
        ({"output_counts": torch.ones(2, 4)}, TypeError, "output_counts must be torch.int32"),
        ({"output_counts": torch.ones(2, 3).int()}, ValueError, r"output_counts .*\(2, 4\)"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \(4,\), got \(5,\)"),
        ({"bias": torch.ones(4, 2).t()}, ValueError, r"bias must have last stride 1"),
        ({"bias": torch.ones(4, requires_grad=True)}, RuntimeError, "no backward"),
        ({"seeds": None}, ValueError, "seeds must be given with temperature, got None"),
        ({"positions": None}, ValueError, "positions must be given"),
        ({"seeds": torch.zeros(2)}, TypeError, "seeds must be torch.int32 or torch.int64"),
        ({"logprobs": 5}, ValueError, "logprobs must be None or 0 to 4.*got 5"),
        ({"logprobs": -1}, ValueError, "logprobs .*got -1"),
    ],
)
def test_bad_options_are_named(options, error, says):
    with pytest.raises(error, match=f"^sample_tokens: .*{says}"):
        sample_tokens(torch.ones(2, 4), **(GOOD | options))


@pytest.mark.parametrize(
    ("logits", "error", "says"),
    [
        (torch.ones(2, 4, dtype=torch.int32), TypeError, "torch.int32"),
        (torch.ones(4), ValueError, r"got \(4,\)"),
        (torch.ones(2, 0), ValueError, r"got \(2, 0\)"),
        (torch.ones(4, 2).t(), ValueError, r"strides \(1, 2\); call .contiguous"),
        (torch.ones(1, 1).expand(1, MAX_VOCAB + 1), ValueError, "strides"),
        (torch.ones(1, MAX_VOCAB + 1), NotImplementedError, "at most 1048576, got 1048577"),
        (torch.ones(2, 4, requires_grad=True), RuntimeError, "no backward; call under"),
    ],
)
def test_bad_logits_are_named(logits, error, says):
    with pytest.raises(error, match=f"^sample_tokens: .*{says}"):
        sample_tokens(logits)


@pytest.mark.gpu
def test_float64_is_refused_on_cuda():
    with pytest.raises(TypeError, match=r"sample_tokens: logits must be float32.*float64 on cuda"):
        sample_tokens(torch.ones(2, 4, device="cuda", dtype=torch.float64))


def test_what_requires_grad_is_taken_under_no_grad():
    with torch.no_grad():
        assert sample_tokens(torch.ones(2, 4, requires_grad=True)).tokens.tolist() == [0, 0]


@pytest.mark.parametrize("n_rows", [1, 64])
@pytest.mark.parametrize("n_vocab", [1, 7, 512, 513, 32000, 128256, MAX_VOCAB])
def test_launch_fits(n_vocab, n_rows):
    launch = choose_launch(n_rows, n_vocab)
    for size in (launch.chunk, launch.max_chunks, launch.groups, launch.width, launch.small):
        assert size > 0 and size & (size - 1) == 0
    assert launch.chunk < 2 * n_vocab
    assert launch.chunk * launch.max_chunks >= n_vocab > launch.chunk * (launch.max_chunks // 2 - 1)
    assert launch.max_chunks <= 128
    assert launch.groups <= launch.chunk
    assert launch.chunk <= 32 * 32 * launch.num_warps  # a lane's scores stay in registers
    assert launch.num_warps in (1, 2, 4, 8) and launch.row_warps in (1, 2, 4, 8)
