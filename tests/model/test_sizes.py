"""Sizes and costs of models, from their configurations."""

import math
from types import SimpleNamespace

import pytest
import torch

from llmfast.model.costs import (
    attention_flops,
    decode_step_bytes,
    kv_bytes,
    linear_flops,
    weight_bytes,
)
from llmfast.model.sizes import ModelSizes
from tiny_models import make


def test_sizes_of_a_model():
    sizes = ModelSizes.of(make("Llama"))
    assert sizes == ModelSizes(64, 4, 2, 16, 101, 256, (math.inf, math.inf))
    assert sizes.layers == sizes.full_layers == 2
    assert ModelSizes.of(make("Qwen3")).head_dim == 32  # its own, not hidden / heads


@pytest.mark.parametrize(
    ("kind", "windows"),
    [("Mistral", (8, 8)), ("Gemma2", (8, math.inf)), ("Llama", (math.inf, math.inf))],
)
def test_windows_of_layers(kind, windows):
    assert ModelSizes.of(make(kind)).windows == windows


def test_layers_without_attention_attend_to_nothing():
    sizes = ModelSizes.of(make("Mamba2"))
    assert sizes.windows == (0, 0) and sizes.full_layers == 0 and sizes.vocabulary == 101


def test_a_configuration_without_sizes():
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    assert ModelSizes.from_config(config) == ModelSizes(0, 0, 0, 0, 0, None, ())


def test_the_embedding_says_the_vocabulary():
    model = make("Llama")
    model.resize_token_embeddings(110)
    model.config.vocab_size = 101
    assert ModelSizes.of(model).vocabulary == 110


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_step(tied):
    model = make("Gemma2", tie_word_embeddings=tied).bfloat16()
    embedding = model.get_input_embeddings().weight.nbytes
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert weight_bytes(model) == parameters - (0 if tied else embedding)
    token = kv_bytes(2, 16, 16, torch.bfloat16)
    assert token == 2 * 2 * 16 * 2
    assert decode_step_bytes(model, 3, 100.0) == weight_bytes(model) + 3 * (8 + 100) * token


def test_operations_of_a_token():
    model = make("Llama")
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96
    assert linear_flops(model) == 2 * 2 * layer
    assert attention_flops(ModelSizes.of(model)) == 4 * 64 * 2
