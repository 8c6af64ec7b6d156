"""sample_tokens: its kernels against the reference, its contract and its errors."""

import pytest
import torch

from llmfast_kernels.sampling import sample_tokens
from llmfast_kernels.sampling.kernel import choose_launch, launch_sample_tokens
from llmfast_kernels.sampling.op import MAX_VOCAB
from llmfast_kernels.sampling.reference import (
    ALL_MASKED,
    NOT_FINITE,
    OK,
    kept_weights,
    sample_tokens_reference,
)
from sampling_cases import (
    FILTERS,
    INF,
    NAN,
    check_kernel,
    draw_options,
    each_filter,
    each_vocab,
    everything,
    filter_tensors,
    moved,
    on_cuda,
    random_logits,
)


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
    logits[1, 2] = -INF  # -inf / inf is NaN
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
