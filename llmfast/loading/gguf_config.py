"""Make a transformers LlamaConfig from a GGUF file's metadata.

Every ``llama.*`` key is used, known to change nothing, or refused by name: a model that ignores a
key could compute something else without any sign of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf.quants import dequantize

from ..errors import UserError
from .gguf_tokenizer import token_id

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from .gguf_file import GgufFile

_USED = {
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
_NO_EFFECT = {
    "attention.layer_norm_epsilon",  # Llama has no such norm
    "pooling_type",  # for embeddings of texts
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "use_parallel_residual",
}
# accepted with the value that leaves a Llama model unchanged
_NEUTRAL = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.sliding_window": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0,
}


def llama_config(file: GgufFile, dtype: torch.dtype) -> LlamaConfig:
    """Build the config that ``file`` describes, for weights in ``dtype``.

    Raises:
        UserError: a key is missing or damaged, or a transformers Llama has no such property.
    """
    from transformers import LlamaConfig

    _check_keys(file)
    ids = {name: token_id(file, name) for name in ("bos", "eos", "eot", "eom", "padding")}
    heads = _count(file, "attention.head_count")
    kv_heads = _count(file, "attention.head_count_kv", heads)
    width = _count(file, "embedding_length")
    blocks = _count(file, "block_count")
    head_dim = _count(file, "attention.key_length", width // heads)
    tokens = len(file.metadata["tokenizer.ggml.tokens"])
    vocab = _count(file, "vocab_size", tokens)
    for wrong, what in (
        (tokens > vocab, f"{tokens} tokens do not fit a vocabulary of {vocab}"),
        (width % heads != 0, f"embedding_length {width} is no multiple of {heads} heads"),
        (heads % kv_heads != 0, f"{heads} heads cannot share {kv_heads} key and value heads"),
        (head_dim % 2 != 0, f"a head of {head_dim} cannot be rotated in pairs"),
        (blocks > len(file.tensors), f"{blocks} blocks, but only {len(file.tensors)} tensors"),
    ):
        if wrong:
            raise UserError(f"{file.path}: damaged metadata: {what}")
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := _count(file, key, head_dim)) != head_dim:
            raise UserError(
                f"{file.path}: llama.{key} is {value}, but transformers' Llama needs the head's"
                f" size, {head_dim}"
            )
    ends = dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None)
    context = _count(file, "context_length")
    return LlamaConfig(
        name_or_path=str(file.path),
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=_count(file, "feed_forward_length"),
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=_real(file, "attention.layer_norm_rms_epsilon"),
        rope_parameters=_rope(file, head_dim, context),
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=ids["bos"],
        eos_token_id=next(iter(ends), None) if len(ends) < 2 else list(ends),
        pad_token_id=ids["padding"],
    )


def _check_keys(file: GgufFile) -> None:
    for key, value in file.metadata.items():
        name = key.removeprefix("llama.")
        if name == key or name in _USED or name in _NO_EFFECT:
            continue
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            raise UserError(f"{file.path}: {key} = {value!r} is not supported for a Llama model")


def _rope(file: GgufFile, head_dim: int, context: int) -> dict[str, Any]:
    kind = file.metadata.get("llama.rope.scaling.type", "none")
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": _real(file, "rope.freq_base", 1e4),
    }
    if "rope_freqs.weight" in file.tensors:
        if kind != "none":
            raise UserError(
                f"{file.path}: tensor 'rope_freqs.weight' beside llama.rope.scaling.type"
                f" = {kind!r} is not supported"
            )
        return _llama3_rope(file, rope["rope_theta"], head_dim)
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise UserError(
            f"{file.path}: llama.rope.scaling.type = {kind!r} is not supported;"
            " none, linear and yarn are"
        )
    rope |= {"rope_type": kind, "factor": _real(file, "rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = _count(
            file, "rope.scaling.original_context_length", context
        )
        rope["beta_fast"] = _real(file, "rope.scaling.yarn_beta_fast", 32.0)
        rope["beta_slow"] = _real(file, "rope.scaling.yarn_beta_slow", 1.0)
    return rope


def _llama3_rope(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Find the parameters of Llama 3.1's scaling from the divisors of the frequencies.

    The file holds only the divisors. All published models share three constants, so the largest
    divisor determines the rest. The result must reproduce the divisors of the file.
    """
    info = file.tensors["rope_freqs.weight"]
    divisors = dequantize(file.raw(info.name), info.type)
    factor, low, high, trained = float(divisors.max(initial=0.0)), 1.0, 4.0, 8192
    turns = trained * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)  # 1: a fast frequency, left as it is
    if (
        info.shape != kept.shape
        or factor < 1
        or not np.allclose(divisors * (kept + (1 - kept) / factor), 1, rtol=1e-4)
    ):
        raise UserError(
            f"{file.path}: tensor 'rope_freqs.weight' is not supported: its {info.shape} values"
            " are not those of Llama 3's scaling"
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": trained,
    }


def _count(file: GgufFile, name: str, default: int | None = None) -> int:
    value = file.metadata.get(f"llama.{name}", default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _not_a(file, name, "a number of 1 or more", value)
    return value


def _real(file: GgufFile, name: str, default: float | None = None) -> float:
    value = file.metadata.get(f"llama.{name}", default)
    if not isinstance(value, float) or not 0 < value < float("inf"):
        raise _not_a(file, name, "a number above 0", value)
    return float(str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06


def _not_a(file: GgufFile, name: str, wanted: str, value: object) -> UserError:
    if value is None:
        return UserError(f"{file.path}: metadata key 'llama.{name}' is missing")
    return UserError(f"{file.path}: llama.{name} must be {wanted}; got {value!r}")
