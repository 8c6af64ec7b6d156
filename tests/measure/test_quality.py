"""Quality, against plain formulas in float64 and against known answers."""

import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from llmfast.errors import UserError
from llmfast.measure import quality
from llmfast.measure.quality import Window, compare, cut_windows, perplexity
from llmfast.measure.texts import TEXTS, read_text

VOCAB = 61


class FixedLogits:
    """A model that looks a position's logits up in a table, by the token there."""

    training = False
    config = SimpleNamespace(get_text_config=SimpleNamespace)

    def __init__(self, table):
        self.table = table

    def get_input_embeddings(self):
        return SimpleNamespace(weight=self.table)

    def __call__(self, *, input_ids, use_cache):
        assert use_cache is False
        return SimpleNamespace(logits=self.table[input_ids])


def llama(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def blurred(model):
    """Return a copy with noise on its weights, which does not always agree."""
    twin, generator = deepcopy(model), torch.Generator().manual_seed(2)
    for weight in twin.parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        weight.data += 0.1 * noise
    return twin


def tokens(n, seed=0):
    return torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


def scored_log_probs(model, ids, window, stride):
    """Compute the oracle: each scored token's position and the log-probabilities before it."""
    out, done = [], 0
    for start in range(0, len(ids), stride):
        part = ids[start : start + window]
        with torch.no_grad():
            rows = F.log_softmax(model(input_ids=part[None]).logits[0].double(), dim=-1)
        for i in range(1, len(part)):
            if start + i >= done:
                out.append((start + i, rows[i - 1]))
                done = start + i + 1
        if start + window >= len(ids):
            break
    return [position for position, _ in out], torch.stack([row for _, row in out])


def test_disjoint_windows_leave_each_first_token_unscored():
    assert cut_windows([10], 4) == [Window(0, 0, 4, 1), Window(0, 4, 8, 5), Window(0, 8, 10, 9)]
    assert cut_windows([9], 4) == [Window(0, 0, 4, 1), Window(0, 4, 8, 5)]  # one token: no context
    assert cut_windows([3, 1, 0, 5], 4) == [Window(0, 0, 3, 1), Window(3, 0, 4, 1)]


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_overlapping_windows_score_every_token_but_the_first_once(stride):
    windows = cut_windows([11], 4, stride)
    assert [t for w in windows for t in range(w.score_from, w.end)] == list(range(1, 11))
    assert all(w.end - w.start <= 4 and w.score_from > w.start for w in windows)


@pytest.mark.parametrize(("window", "stride"), [(1, None), (4, 0), (4, 5)])
def test_bad_windows_are_named(window, stride):
    with pytest.raises(UserError, match=r"window|stride"):
        cut_windows([10], window, stride)


@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 5), (64, 30), (16, 15)])
def test_perplexity_is_the_formula(window, stride):
    model, ids = llama(0), tokens(101)
    found = perplexity(model, ids, window=window, stride=stride)
    positions, rows = scored_log_probs(model, ids, window, stride or window)
    nll = -rows.gather(1, ids[positions, None]).mean()
    assert found.tokens == len(positions)
    assert found.perplexity.value == pytest.approx(math.exp(nll), rel=1e-12)
    assert found.perplexity.low < found.perplexity.value < found.perplexity.high


@pytest.mark.parametrize("chunk_bytes", [1, 8 * VOCAB * 7, quality.CHUNK_BYTES])
def test_comparison_is_the_formula_in_chunks_of_any_size(monkeypatch, chunk_bytes):
    monkeypatch.setattr(quality, "CHUNK_BYTES", chunk_bytes)
    reference, ids = llama(0), tokens(70)
    model = blurred(reference)
    found = compare(reference, model, ids, window=16, stride=11)
    positions, p = scored_log_probs(reference, ids, 16, 11)
    _, q = scored_log_probs(model, ids, 16, 11)
    nll_p, nll_q = (-rows.gather(1, ids[positions, None]).mean() for rows in (p, q))
    kl = F.kl_div(q, p, reduction="batchmean", log_target=True)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert found.reference_perplexity.value == pytest.approx(math.exp(nll_p), rel=1e-12)
    assert found.perplexity.value == pytest.approx(math.exp(nll_q), rel=1e-12)
    assert found.perplexity_ratio.value == pytest.approx(math.exp(nll_q - nll_p), rel=1e-12)
    assert found.kl.value == pytest.approx(float(kl), rel=1e-12)
    assert found.top1_agreement.value == pytest.approx(float(agreement), rel=1e-12)
    for estimate in (found.kl, found.top1_agreement, found.perplexity_ratio):
        assert estimate.low < estimate.value < estimate.high


def test_kl_is_from_the_reference_not_to_it():
    reference = FixedLogits(torch.tensor([[0.9, 0.1]]).log().repeat(2, 1))
    model = FixedLogits(torch.tensor([[0.5, 0.5]]).log().repeat(2, 1))
    ids = torch.zeros(8, dtype=torch.long)
    found = compare(reference, model, ids, window=4)
    assert found.kl.value == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-6)
    # all windows are alike, so nothing varies
    assert found.kl.high - found.kl.low < 1e-12
    assert found.perplexity.value == pytest.approx(2.0)
    assert found.reference_perplexity.value == pytest.approx(1 / 0.9, rel=1e-6)


@pytest.mark.parametrize("vocab", [2, 50, 128256])
def test_uniform_logits_have_the_vocabulary_as_perplexity(vocab):
    model = FixedLogits(torch.full((2, vocab), 3.5, dtype=torch.bfloat16))
    found = perplexity(model, torch.tensor([0, 1] * 6), window=4)
    assert found.perplexity.value == pytest.approx(vocab, rel=1e-12)


def test_a_certain_model_has_perplexity_1():
    table = torch.full((3, 3), -1e4)
    table[[0, 1, 2], [1, 2, 0]] = 0.0
    found = perplexity(FixedLogits(table), torch.tensor([0, 1, 2] * 4), window=6)
    assert found.perplexity.value == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_agrees_with_itself(dtype):
    model = llama(0, dtype)
    found = compare(model, model, tokens(64), window=16)
    assert (found.kl.value, found.kl.low, found.kl.high) == (0.0, 0.0, 0.0)
    assert (found.top1_agreement.value, found.top1_agreement.low) == (1.0, 1.0)
    assert found.perplexity_ratio.value == found.perplexity_ratio.high == 1.0


def test_a_token_that_the_reference_rules_out_adds_nothing():
    reference = FixedLogits(torch.tensor([[0.0, 0.0, -math.inf]]).repeat(3, 1))
    model = FixedLogits(torch.zeros(3, 3))
    found = compare(reference, model, torch.zeros(8, dtype=torch.long), window=4)
    assert found.kl.value == pytest.approx(math.log(1.5))


def test_the_interval_is_over_documents_where_there_are_several():
    # windows of a document are alike; the documents differ
    table = torch.tensor([[0.9, 0.1], [0.4, 0.6]]).log()
    a, b = torch.zeros(16, dtype=torch.long), torch.ones(16, dtype=torch.long)
    found = perplexity(FixedLogits(table), [a, b], window=4)
    mean = -(math.log(0.9) + math.log(0.6)) / 2
    assert found.perplexity.value == pytest.approx(math.exp(mean), rel=1e-6)
    assert found.perplexity.low == pytest.approx(1 / 0.9, rel=1e-6)  # the first document twice
    assert found.perplexity.high == pytest.approx(1 / 0.6, rel=1e-6)  # the second document twice
    assert found.windows == 8


def test_a_seed_repeats_the_interval():
    model, ids = llama(0), tokens(200)
    one, same, other = (perplexity(model, ids, window=8, seed=s) for s in (1, 1, 2))
    assert one == same
    assert one.perplexity.value == other.perplexity.value
    assert one.perplexity != other.perplexity


def test_the_interval_covers_the_truth():
    """Draw texts from a known distribution: 95% of intervals hold its true perplexity."""
    probability = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    model = FixedLogits(probability.log().repeat(3, 1))
    truth = math.exp(-(probability * probability.log()).sum())
    generator = torch.Generator().manual_seed(0)
    held = 0
    for seed in range(100):
        ids = torch.multinomial(probability, 400, replacement=True, generator=generator)
        found = perplexity(model, ids, window=10, seed=seed).perplexity
        held += found.low <= truth <= found.high
    # 95 expected, a little less for 40 windows; four standard deviations of 100 draws are 9
    assert held >= 86


def test_progress_counts_the_windows():
    seen = []
    perplexity(llama(0), tokens(40), window=16, progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_unmeasurable_input_is_named():
    model, ids = llama(0), tokens(64)
    with pytest.raises(UserError, match="context of 64 tokens, got 65"):
        perplexity(model, ids, window=65)
    with pytest.raises(UserError, match=r"at least 2 windows .* got 1 from 64 tokens"):
        perplexity(model, ids, window=64)
    with pytest.raises(UserError, match=r"at least 2 windows .* or documents.* got 1 from 64"):
        perplexity(model, [ids, ids[:0]], window=16)
    with pytest.raises(UserError, match=r"shape \(1, 64\)"):
        perplexity(model, ids[None], window=16)
    with pytest.raises(UserError, match=r"torch.float32"):
        perplexity(model, ids.float(), window=16)
    with pytest.raises(UserError, match=f"from 0 to {VOCAB - 1}.*got {VOCAB} to {VOCAB}"):
        perplexity(model, torch.full((64,), VOCAB), window=16)
    with pytest.raises(UserError, match="training mode"):
        perplexity(llama(0).train(), ids, window=16)
    broken = FixedLogits(torch.full((VOCAB, VOCAB), math.nan))
    with pytest.raises(UserError, match="NaN in the window at token 0 of document 0"):
        perplexity(broken, ids, window=16)
    wider = FixedLogits(torch.zeros(VOCAB, VOCAB + 3))
    with pytest.raises(UserError, match=f"logits of {VOCAB} and {VOCAB + 3} tokens"):
        compare(wider, model, ids, window=16)


@pytest.mark.parametrize("name", TEXTS)
def test_the_texts_are_in_the_package(name):
    text = read_text(name)
    assert text.name == name and len(text.text) > 400_000
    assert "Jane Austen" in text.text[:100]


def test_a_file_is_read_as_it_stands_or_named(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text(" a\n")
    assert read_text(str(path)) == ("note", " a\n")
    with pytest.raises(UserError, match=r"persuasion or pride-and-prejudice or a file; .*No such"):
        read_text(str(tmp_path / "none.txt"))
    path.write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        read_text(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8"):
        read_text(str(path))
