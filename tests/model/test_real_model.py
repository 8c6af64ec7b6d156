"""The embedded model, patched: its answer, its perplexity, and the kernels' own code."""

import copy

import pytest
import torch

import llmfast
from llmfast.measure.quality import perplexity
from llmfast.measure.texts import read_text
from llmfast.model.demo import launchers, verify_first_block
from llmfast.model.patch import swap_in
from llmfast.runner.generate.override import override_of
from llmfast.runner.verify import run_sequences

QUESTION = "What is the capital of France?"


@pytest.fixture
def model(embedded, device):
    """Yield the trained model, and unpatch it after each test."""
    model = copy.deepcopy(embedded.model) if device.type == "cuda" else embedded.model
    yield model.to(device)
    if "_llmfast_patch" in vars(model):
        llmfast.unpatch(model)


@pytest.fixture
def question(embedded, device):
    messages = [{"role": "user", "content": QUESTION}]
    return embedded.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device)


DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_answers_paris(model, embedded, question, dtype):
    report = llmfast.patch(model.to(dtype), ops="all", strict=True)
    assert report.swapped == 61 + 30 + 30
    out = model.generate(**question, do_sample=False, max_new_tokens=20)
    answer = embedded.tokenizer.decode(
        out[0, question["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert answer == "The capital of France is Paris."
    assert not report.fallbacks


def test_256_greedy_tokens_are_those_of_transformers(model, embedded, device):
    ids = embedded.tokenizer(read_text("persuasion").text[:2000], return_tensors="pt").to(device)
    ids = {name: tensor[:, :200] for name, tensor in ids.items()}
    how = {"do_sample": False, "max_new_tokens": 256, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**ids, **how)
    llmfast.patch(model, ops="all", strict=True)
    assert override_of(model) is not None
    got = model.generate(**ids, **how)
    assert got.shape == expected.shape == (1, 456)
    assert torch.equal(got, expected)


@pytest.fixture
def persuasion(embedded):
    """Return the first 4,096 tokens of the text."""
    ids = embedded.tokenizer(read_text("persuasion").text[:40000], add_special_tokens=False)
    return torch.tensor(ids["input_ids"][:4096])


def test_perplexity_of_persuasion_is_that_of_transformers(model, persuasion):
    """Compare in float32, within 0.1%."""
    original = perplexity(model, persuasion, window=1024)
    report = llmfast.patch(model, ops="all", strict=True)
    swapped = perplexity(model, persuasion, window=1024)
    assert original.tokens == swapped.tokens == 4092
    assert 5 < original.perplexity.value < 100  # a trained model reading English
    assert abs(swapped.perplexity.value / original.perplexity.value - 1) < 1e-3
    assert not report.fallbacks


@pytest.mark.gpu
def test_log_probabilities_of_the_runner_in_bfloat16(model, persuasion, device):
    """Compare teacher-forced log-probabilities; the last 32 of each window are decoded singly.

    The relative rule holds: at most twice transformers' own error against float32.
    """
    windows = persuasion.view(4, 1024).to(device)

    def of_tokens(logits):
        chosen = logits[:, :-1].float().log_softmax(-1).gather(-1, windows[:, 1:, None])
        return chosen.double().flatten()

    with torch.no_grad():
        exact = of_tokens(model(windows).logits)
        original = of_tokens(model.bfloat16()(windows).logits)
        llmfast.patch(model, strict=True)
        steps = override_of(model).step_model
        ours = of_tokens(run_sequences(steps, windows.tolist(), 32).view(4, 1024, -1))
    assert exact.abs().mean() > 1  # nats: the model has not memorised the text
    error, own_error = ((x - exact).square().mean().sqrt() for x in (ours, original))
    assert 0 < error <= 2 * own_error


@pytest.mark.gpu
def test_perplexity_in_bfloat16_is_as_near_to_float32_s(model, persuasion):
    """Compare both with float32: transformers' own attentions differ by 0.1% in bfloat16."""
    exact = perplexity(model, persuasion, window=1024).perplexity.value
    original = perplexity(model.bfloat16(), persuasion, window=1024).perplexity.value
    report = llmfast.patch(model, strict=True)
    swapped = perplexity(model, persuasion, window=1024).perplexity.value
    assert abs(swapped / exact - 1) < max(1e-3, 2 * abs(original / exact - 1))
    assert not report.fallbacks


def test_a_whole_forward_through_the_kernels(model, question):
    """Run all 30 blocks: in Triton's interpreter on the CPU, compiled on a GPU."""
    ids = question["input_ids"][:, -7:]
    with torch.no_grad():
        expected = model(ids).logits
        report = swap_in(model, launchers(), strict=True)
        got = model(ids).logits
    assert report.swapped == 121 and not report.fallbacks
    # float32 sums in another order, over 30 blocks
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_the_first_block_is_verified(model, question):
    report = verify_first_block(model, question["input_ids"])
    swapped = {e.operation for e in report.entries if e.swapped}
    assert swapped == {"rms_norm", "silu_mul", "flash_attention"}
    assert "First block on the prompt's" in str(report)
    assert len(model.model.layers) == 30 and "_llmfast_patch" not in vars(model)
