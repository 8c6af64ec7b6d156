"""The filters' kernels against the reference: what they keep, cut by cut."""

import pytest
import torch
import triton
import triton.language as tl

from llmfast_kernels.sampling import kernel
from llmfast_kernels.sampling.kernel import Launch, launch_sample_tokens
from llmfast_kernels.sampling.kernels.sample import filter_lists, filter_small_candidates
from llmfast_kernels.sampling.kernels.sample import kept_weights as kept_weights_of_chunk
from llmfast_kernels.sampling.reference import (
    kept_weights,
    sample_tokens_reference,
)
from sampling_cases import (
    INF,
    NAN,
    check_kernel,
    draw_options,
    each_filter,
    everything,
    filter_tensors,
    moved,
    on_cuda,
    random_logits,
)

LAUNCHES = {
    "wide": Launch(
        *(32, 32), groups=2, width=32, small=32, listed_by_row=True, num_warps=1, row_warps=4
    ),
    "narrow": Launch(
        *(8, 16), groups=2, width=2, small=4, listed_by_row=False, num_warps=1, row_warps=2
    ),
}


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
