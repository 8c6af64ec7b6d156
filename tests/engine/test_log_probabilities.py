"""On a GPU in bfloat16: what a request gets does not depend on its company, by the relative rule.

Against float32 the engine may be wrong by twice what transformers itself is in bfloat16.
"""

import copy

import pytest
import torch

import llmfast
from engines import executor_of
from llmfast.measure.texts import read_text

pytestmark = pytest.mark.gpu

TOKENS = 24
LENGTHS = [5, 17, 64, 65, 130, 250, 411, 700, 900, 31, 12, 88]  # of prompts; chunks and graphs


@pytest.fixture(scope="module")
def model(embedded):
    return copy.deepcopy(embedded.model).to("cuda", torch.bfloat16)


@pytest.fixture(scope="module")
def exact(embedded):
    return copy.deepcopy(embedded.model).to("cuda", torch.float32)


@pytest.fixture(scope="module")
def prompts(embedded):
    """Prompts of text, each from another place."""
    ids = embedded.tokenizer(read_text("persuasion").text[:40000], add_special_tokens=False)
    return [ids["input_ids"][400 * i :][:length] for i, length in enumerate(LENGTHS)]


def params(**changes):
    return llmfast.SamplingParams(temperature=0, ignore_eos=True, max_tokens=TOKENS, **changes)


def distributions(model, prompt, answer):
    """Return the model's own log-probabilities for each token of an answer: ``[n, vocabulary]``."""
    ids = torch.tensor([prompt + answer], device="cuda")
    with torch.no_grad():
        return model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


class Errors:
    """Errors of log-probabilities against float32: the engine's, and transformers' in bfloat16."""

    def __init__(self, model, exact):
        self.model, self.exact = model, exact
        self.ours, self.own = [], []

    def add(self, prompt, output):
        answer = output.outputs[0].token_ids
        assert len(answer) == TOKENS and output.outputs[0].error is None
        chosen = torch.tensor(answer, device="cuda")[:, None]
        right = distributions(self.exact, prompt, answer).gather(1, chosen)
        own = distributions(self.model, prompt, answer).gather(1, chosen)
        steps = zip(output.outputs[0].logprobs, answer, strict=True)
        found = [step[token].logprob for step, token in steps]
        self.ours.append(torch.tensor(found, device="cuda", dtype=torch.float64)[:, None] - right)
        self.own.append(own - right)

    def check(self):
        ours, own = (torch.cat(errors).square().mean().sqrt() for errors in (self.ours, self.own))
        assert 0 < ours <= 2 * own


def test_alone_and_in_company(model, exact, prompts):
    together, alone = Errors(model, exact), Errors(model, exact)
    with llmfast.LLM(model, max_model_len=1024, max_num_batched_tokens=256) as llm:
        for prompt, output in zip(prompts, llm.generate(prompts, params(logprobs=1)), strict=True):
            together.add(prompt, output)
    options = {"enable_prefix_caching": False, "max_num_batched_tokens": 1024}
    with llmfast.LLM(model, max_model_len=1024, **options) as llm:
        for prompt in prompts:
            alone.add(prompt, llm.generate([prompt], params(logprobs=1))[0])
    together.check()
    alone.check()


def test_prefixes_cold_and_warm(model, exact, prompts):
    cold, warm = Errors(model, exact), Errors(model, exact)
    prefix = prompts[7]
    asked = [prefix + prompt for prompt in prompts[:4]]
    with llmfast.LLM(model, max_model_len=1024) as llm:
        for errors in (cold, warm):
            for prompt, output in zip(asked, llm.generate(asked, params(logprobs=1)), strict=True):
                errors.add(prompt, output)
                assert errors is cold or output.metrics.cached_tokens >= len(prefix) - 64
    cold.check()
    warm.check()


def test_tokens_of_graphs(model, exact, prompts):
    """Steps that are graphs give no log-probabilities: their tokens are as likely as the likeliest.

    Two logits, each with at most twice transformers' own largest error, decide.
    """
    with llmfast.LLM(model, max_model_len=1024, max_num_batched_tokens=256) as llm:
        assert executor_of(llm).num_graphs
        outputs = llm.generate(prompts, params())
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = output.outputs[0].token_ids
        right = distributions(exact, prompt, answer)
        error = (distributions(model, prompt, answer) - right).abs().max()
        chosen = right.gather(1, torch.tensor(answer, device="cuda")[:, None])
        assert (right.amax(1, keepdim=True) - chosen).max() <= 4 * error
