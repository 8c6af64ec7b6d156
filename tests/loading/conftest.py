"""Tiny GGUF files, written by the gguf library."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# a vocabulary of CONTROL, one token per byte, and the results of these merges
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
TOKENS = [*CONTROL, *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """``tiny_llama(**config)``: a random Llama in float32, with every norm weight drawn too."""

    def make(**config: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "vocab_size": len(TOKENS),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
        }
        model = LlamaForCausalLM(LlamaConfig(**(sizes | config))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # large enough that a head's rows in a wrong order show in the logits
                parameter.copy_(torch.randn(parameter.shape) * 0.3 + (parameter.dim() == 1))
        return model

    return make


@pytest.fixture
def write_gguf() -> Callable[..., Path]:
    """``write_gguf(path, model, kind="F32", *, kind_of={}, metadata={}, drop=(), extra={})``.

    ``kind_of`` gives single tensors another type, ``metadata`` replaces keys (None removes one),
    ``drop`` leaves tensors out and ``extra`` adds some. Matrices get ``kind``, vectors F32.
    """
    return _write_gguf


def _write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    kind: str = "F32",
    *,
    kind_of: dict[str, str] | None = None,
    metadata: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    writer = gguf.GGUFWriter(path, arch="llama")
    for key, value in (_metadata(model.config) | (metadata or {})).items():
        _write_value(writer, key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    tensors = {
        names.get_name(name, try_suffixes=(".weight", ".bias")): _as_gguf_orders(name, p, model)
        for name, p in model.named_parameters()
    }
    for name, values in (tensors | (extra or {})).items():
        if name not in drop:
            chosen = (kind_of or {}).get(name, kind if values.ndim > 1 else "F32")
            qtype = gguf.GGMLQuantizationType[chosen]
            writer.add_tensor(name, gguf.quants.quantize(values, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_gguf_orders(name: str, parameter: torch.Tensor, model: LlamaForCausalLM) -> np.ndarray:
    """Put the rows that rotate together, half a head apart, side by side."""
    values = parameter.detach().numpy()
    if "q_proj" in name or "k_proj" in name:
        heads = values.shape[0] // model.config.head_dim
        halves = values.reshape(heads, 2, -1, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
    return values


def _metadata(config: LlamaConfig) -> dict[str, Any]:
    return {
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }


def _write_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    add = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    add[type(value)](key, value)
