"""Tiny models with random weights, one for each kind."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

COMMON = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# additions and changes of a kind to COMMON
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 8, "head_dim": 16},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Phi3": {},
    "Gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "Gemma3": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "Olmo2": {},
    "Granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "SmolLM3": {},
    "GPTNeoX": {},
    "Cohere": {},
    "StableLm": {},
    "Starcoder2": {},
    "Falcon": {},
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "DeepseekV3": {
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "Glm": {"head_dim": 16},
    "Nemotron": {},
    "Bamba": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "Mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16},
}
_CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def make(
    kind: str = "Llama", device: torch.device | str = "cpu", **changes: Any
) -> PreTrainedModel:
    """Make a model of ``kind`` in evaluation mode and float32, with random norm weights too."""
    config_class = getattr(transformers, _CONFIGS.get(kind, f"{kind}Config"))
    config = config_class(**{**COMMON, **KINDS[kind], **changes})
    return from_config(kind, config, device)


def from_config(kind: str, config: Any, device: torch.device | str = "cpu") -> PreTrainedModel:
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(device).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        else:  # transformers initialises with 0.02, where attention and gates are almost linear
            parameter.data.mul_(5)
    model.generation_config.eos_token_id = None
    return model


def tokens(batch: int, length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, 101, (batch, length), generator=generator).to(device)
