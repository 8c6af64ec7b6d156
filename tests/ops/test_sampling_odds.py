"""sample_tokens' odds: the reference against transformers and exact probabilities."""

import pytest
import torch
import triton
import triton.language as tl
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

from llmfast_kernels.sampling import sample_tokens
from llmfast_kernels.sampling.reference import (
    kept_weights,
    penalise,
    philox,
)
from sampling_cases import (
    FILTERS,
    INF,
    check_kernel,
    draw_options,
    each_filter,
    each_vocab,
    filter_tensors,
    moved,
    on_cuda,
    random_logits,
    transformers_filters,
)


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
