"""Models without a recipe: their own layers over the paged cache, or a reason why not."""

import pytest
import torch

from llmfast.model.trace import NotTraced
from llmfast.runner.block_model import BlockModel
from llmfast.runner.forward_model import ForwardModel
from llmfast.runner.make_model import make_step_model
from llmfast.runner.verify import run_sequences
from tiny_models import make, tokens

OWN = ["GPTNeoX", "Cohere", "StableLm", "Starcoder2", "Mixtral", "Qwen3Moe", "Nemotron"]
ORIGINAL = {
    "Falcon": "forward",
    "DeepseekV3": "heads of 32 for keys and of 16 for values",
    "Bamba": "the whole model computes something else",
    "Mamba2": "not called through transformers' interface",
}


def assert_logits_equal(model, ours, ids, prefill):
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[0]
    actual = run_sequences(ours, ids.tolist(), 20, prefill=prefill)
    # sums in another order, through two blocks: some hundred roundings of the largest
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=200 * 2**-24 * scale)
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("kind", OWN)
def test_a_chunked_prefill_and_decoding_equal_the_models_forward(kind, device):
    model = make(kind, device)
    ours = make_step_model(model)
    assert isinstance(ours, ForwardModel)
    assert_logits_equal(model, ours, tokens(1, 64, device), prefill=11)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Gemma3", "Granite", "SmolLM3"])
def test_models_with_a_recipe_can_run_their_own_layers_too(kind, device):
    model = make(kind, device)
    assert isinstance(make_step_model(model), BlockModel)
    assert_logits_equal(model, ForwardModel(model), tokens(1, 64, device), prefill=11)


@pytest.mark.parametrize("kind", ORIGINAL)
def test_what_neither_way_computes_is_refused(kind, device):
    model = make(kind, device)
    with pytest.raises(NotTraced, match=ORIGINAL[kind]):
        make_step_model(model)


def test_frequencies_that_change_with_the_length_are_refused(device):
    model = make("Cohere", device, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(NotTraced, match="change with the sequence's length"):
        make_step_model(model)


def test_the_models_own_attention_is_untouched(device):
    model = make("GPTNeoX", device)
    ids = tokens(2, 9, device)
    with torch.no_grad():
        before = model(ids).logits
    make_step_model(model)
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
