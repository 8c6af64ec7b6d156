"""The cost of a prompt's tokens, by their context."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llmfast.engine.chunking import ChunkSizer, chunk_sizer_of


@pytest.mark.parametrize("parity", [1.0, 300.0, 16000.0])
@pytest.mark.parametrize("context", [0, 5, 4000, 10**6])
@pytest.mark.parametrize("other", [0, 17, 3000])
def test_as_many_tokens_elsewhere_take_as_long(parity, context, other):
    def cost(tokens, behind):
        return sum(1 + (behind + i) / parity for i in range(tokens))

    tokens = 200
    found = ChunkSizer(parity).equal_cost_tokens(tokens, context, other)
    one = 1 + (other + found) / parity  # of another token
    assert abs(cost(found, other) - cost(tokens, context)) <= one


def test_without_a_parity_all_tokens_are_alike():
    assert ChunkSizer().equal_cost_tokens(7, 0, 10**9) == 7
    assert ChunkSizer(100.0).equal_cost_tokens(7, 5, 5) == 7


class Decoder(nn.Module):
    def __init__(self, **config):
        super().__init__()
        config = {"num_attention_heads": 8, "num_hidden_layers": 2, "hidden_size": 64, **config}
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**config))
        self.layers = nn.ModuleList(nn.Linear(64, 128) for _ in range(2))
        self.head = nn.Linear(64, 1000)

    def get_output_embeddings(self):
        return self.head


def test_the_parity_of_a_model_is_weights_against_heads():
    parity = chunk_sizer_of(Decoder()).attention_parity
    assert parity == 2 * 2 * 64 * 128 / (4 * 64 * 2) / 1.6
    assert chunk_sizer_of(Decoder(head_dim=16)).attention_parity == parity / 2
    half = Decoder(layer_types=["full_attention", "sliding_attention"], sliding_window=32)
    assert chunk_sizer_of(half).attention_parity == 2 * parity
    released = Decoder()
    for layer in released.layers:
        layer.weight.data = torch.empty(0)
    assert chunk_sizer_of(released).attention_parity == parity


@pytest.mark.parametrize(
    "config",
    [
        {"sliding_window": 32},
        {"layer_types": ["sliding_attention"] * 2, "sliding_window": 32},
        {"num_attention_heads": 0},
    ],
)
def test_windows_and_unknown_sizes_count_for_nothing(config):
    assert chunk_sizer_of(Decoder(**config)).attention_parity == math.inf
    bare = Decoder()
    bare.layers = nn.ModuleList()
    assert chunk_sizer_of(bare).attention_parity == math.inf
