"""The calls of a throughput script that was written for vLLM or one of its small relatives."""

from random import Random

import pytest

from generating import tokenizer
from llmfast import LLM, SamplingParams
from tiny_models import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make("Qwen3", max_position_embeddings=4096).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def test_a_warm_up_and_many_drawn_requests(folder):
    random = Random(0)
    prompts = [[random.randint(3, 100) for _ in range(random.randint(5, 60))] for _ in range(12)]
    params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=random.randint(5, 40))
        for _ in prompts
    ]
    llm = LLM(folder, enforce_eager=False, max_model_len=4096)
    llm.generate(["Benchmark: "], SamplingParams())
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, wanted, output in zip(prompts, params, outputs, strict=True):
        (answer,) = output.outputs
        assert output.prompt_token_ids == prompt
        assert (len(answer.token_ids), answer.finish_reason) == (wanted.max_tokens, "length")
    llm.close()
