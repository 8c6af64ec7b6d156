"""Rotary tables: those of the model's own module, at every position and length."""

import pytest
import torch

from llmfast.model.swap import Operations
from llmfast.model.trace import trace
from llmfast.runner.block_model import BlockModel
from llmfast.runner.blocks.rope import RopeTable
from llmfast.runner.verify import run_sequences
from tiny_models import make, tokens

LENGTH = 96
ORIGINAL = 32
FACTORS = [1.0 + 0.25 * i for i in range(8)]
SCALED = {
    "default": {},
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": {
        "short_factor": FACTORS,
        "long_factor": [2 * f for f in FACTORS],
        "original_max_position_embeddings": ORIGINAL,
    },
    "dynamic": {"factor": 2.0},
}


def scaled_model(kind, device):
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **SCALED[kind]}
    longest = ORIGINAL if kind == "dynamic" else LENGTH
    return make("Llama", device, rope_parameters=parameters, max_position_embeddings=longest)


def fresh_tables(kind, length, device):
    """Return the tables of a forward over that many tokens, in a fresh model."""
    model = scaled_model(kind, device)
    x = torch.empty(1, 1, 1, dtype=model.dtype, device=device)
    cos, sin = model.model.rotary_emb(x, torch.arange(length, device=device)[None])
    return cos[0, :, :8], sin[0, :, :8]


@pytest.mark.parametrize("kind", SCALED)
def test_every_length_has_the_tables_of_a_forward_of_that_length(kind, device):
    model = scaled_model(kind, device)
    rotary = trace(model, Operations()).rotaries[0]
    table = RopeTable(rotary, LENGTH, model.dtype, model.device)
    for length in (5, ORIGINAL, ORIGINAL + 1, 50, LENGTH, 7, 40):
        first = table.admit(length)
        cos, sin = fresh_tables(kind, length, device)
        assert torch.equal(table.cos[first : first + length], cos)
        assert torch.equal(table.sin[first : first + length], sin)


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("length", [ORIGINAL - 3, 70])
def test_logits_are_those_of_one_forward(kind, length, device):
    """longrope's regime and dynamic's base are those of the whole sequence from its first token."""
    ours = BlockModel(scaled_model(kind, device), LENGTH)
    ids = tokens(1, length, device)
    with torch.no_grad():
        expected = scaled_model(kind, device)(ids, use_cache=False).logits[0]
    actual = run_sequences(ours, ids.tolist(), 4, prefill=17)
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=200 * 2**-24 * scale)


def test_the_tables_keep_their_place(device):
    """A captured graph reads them where they were."""
    model = scaled_model("dynamic", device)
    table = RopeTable(trace(model, Operations()).rotaries[0], LENGTH, model.dtype, model.device)
    table.admit(40)
    place = table.cos.data_ptr(), table.sin.data_ptr()
    before = table.cos.clone()
    table.admit(60)
    assert (table.cos.data_ptr(), table.sin.data_ptr()) == place
    assert not torch.equal(table.cos, before)
