"""LLM on models with sliding windows: layers of one window share blocks, which are freed behind it.

The models are float64, and what is freed or never written is NaN, so a wrong read shows.
"""

import functools

import pytest
import torch

from engines import check_empty, executor_of
from llmfast import LLM, SamplingParams
from tiny_models import make, tokens

pytestmark = pytest.mark.usefixtures("how")
WINDOW, BLOCK = 8, 16
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
KINDS = {
    "mixed": ("Gemma3", MIXED, [None, WINDOW]),
    "windows alone": ("Gemma3", {}, [WINDOW]),
    "two windows": ("Gemma2", {}, [None, WINDOW]),
    "no window": ("Llama", {}, [None]),
    "own layers": ("Starcoder2", {"sliding_window": WINDOW}, [WINDOW]),
}


@functools.cache
def model_of(kind):
    name, changes, _ = KINDS[kind]
    return make(name, **changes).double()


def engine(kind, **changes):
    options = {"num_blocks": 40, "block_size": BLOCK, "max_num_seqs": 4, **changes}
    llm = LLM(model_of(kind), **options)
    cache = executor_of(llm).cache
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(torch.nan)
    return llm


def greedy_of(kind, prompt, count):
    output = model_of(kind).generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return output[0, len(prompt) :].tolist()


def in_use(llm):
    """Blocks with a user, of each cache group."""
    return [group.num_blocks - group.num_free for group in llm.core.scheduler.groups]


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_answer_is_transformers_and_keeps_the_blocks_of_its_window_alone(kind):
    (prompt,) = tokens(1, 50).tolist()
    params = SamplingParams(temperature=0, max_tokens=150)
    with engine(kind, max_num_batched_tokens=24) as llm:
        windows = [group.window for group in llm.core.scheduler.groups]
        assert windows == KINDS[kind][2]
        used = []
        for output in llm.stream(prompt, params):
            if not output.finished:
                used.append(in_use(llm))
        assert output.outputs[0].token_ids == greedy_of(kind, prompt, 150)
        check_empty(llm)
    for group, window in enumerate(windows):
        most = max(counts[group] for counts in used)
        if window is None:
            assert most >= 199 // BLOCK
        else:  # the window, and where it begins and ends; group 0 holds the prompt from the start
            late = max(counts[group] for counts in used[20:])
            assert late <= 3 and (group == 0 or most <= 3)


@pytest.mark.parametrize("kind", ["mixed", "windows alone", "two windows"])
def test_many_requests_prefixes_forks_and_preemptions_change_no_answer(kind):
    prefix = tokens(1, 70)[0].tolist()
    prompts = [[*prefix[:n], 5 + i] for i, n in enumerate((69, 40, 33, 69, 16, 64))]
    params = SamplingParams(temperature=0, max_tokens=40, n=2)
    with engine(kind, num_blocks=13, max_num_batched_tokens=20) as llm:
        for _ in range(2):  # the second time prefixes are found
            outputs = llm.generate(prompts, params, use_tqdm=False)
            check_empty(llm)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = greedy_of(kind, prompt, 40)
        assert [answer.token_ids for answer in output.outputs] == [expected] * 2
    assert any(output.metrics.cached_tokens for output in outputs)


def test_prompts_without_chunks():
    prompts = [tokens(1, n)[0].tolist() for n in (90, 40, 7)]
    params = SamplingParams(temperature=0, max_tokens=30)
    with engine("mixed", max_num_batched_tokens=20, enable_chunked_prefill=False) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        check_empty(llm)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy_of("mixed", prompt, 30)


def test_num_blocks_are_those_of_full_attention():
    with engine("mixed", num_blocks=400, max_num_batched_tokens=32) as llm:
        cache = executor_of(llm).cache
        full, windowed = llm.core.scheduler.groups
        assert cache.num_blocks == full.num_blocks == 400
        assert windowed.num_blocks == 4 * (1 + 3) + 2 * 2
        assert [len(keys) for keys in cache.keys] == [windowed.num_blocks, full.num_blocks]
