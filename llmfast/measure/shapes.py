"""The models of benchmarks: named shapes with random weights, or real models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..model.sizes import ModelSizes

EMBEDDED_NAME = "smollm2-135m"
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}  # of --dtype

# transformers' model type, and the configuration of the model that has this shape
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "qwen3-8b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "qwen3-0.6b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": True,
        },
    ),
    "mistral-7b": (
        "mistral",
        {
            "vocab_size": 32768,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_window": None,
        },
    ),
    "smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True,
        },
    ),
}


def case_value(name: str) -> str:
    """Return the last part of a path or id as a case's value: lower case, no spaces, no "="."""
    return "-".join(Path(name).name.lower().replace("=", "-").split())


def model_name(model: str | None) -> str:
    """Return the name of a model in a results file. None is the embedded model."""
    return EMBEDDED_NAME if model in (None, "embedded") else case_value(str(model))


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type in a results file: ``bf16``, ``fp64``."""
    names = {**DTYPE_NAMES, torch.float64: "fp64"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Source:
    """The model of a benchmark: a shape of :data:`SHAPES`, or an argument of ``llmfast.load``."""

    shape: str | None = None
    model: str | None = None  # None, and no shape: the embedded model
    dtype: str | None = (
        None  # a name of DTYPE_NAMES; None: bf16 for a shape on a GPU, else the model's own
    )

    def check(self) -> None:
        """Refuse a source that names no model.

        Raises:
            UserError: an unknown shape or dtype, or a shape and a model.
        """
        if self.shape is not None and self.model is not None:
            raise UserError("give --shape or --model, not both")
        if self.shape is not None and self.shape not in SHAPES:
            raise UserError(f"--shape must be one of {', '.join(SHAPES)}; got {self.shape!r}")
        if self.dtype is not None and self.dtype not in DTYPE_NAMES.values():
            names = ", ".join(DTYPE_NAMES.values())
            raise UserError(f"--dtype must be one of {names}; got {self.dtype!r}")

    @property
    def case(self) -> dict[str, str]:
        """The pair of a results file's case that names the model."""
        if self.shape is not None:
            return {"shape": self.shape}
        return {"model": model_name(self.model)}

    def make(self, device: torch.device) -> Any:
        """Make the model in evaluation mode, without end tokens."""
        dtype = next((dtype for dtype, name in DTYPE_NAMES.items() if name == self.dtype), None)
        if self.shape is not None:
            model = random_model(self.shape, device, dtype)
        else:
            from ..loading.load import load

            model = load(self.model, device=device, dtype=dtype).model
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig(pad_token_id=0)
        return model


def random_model(shape: str, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Make a model with random weights on ``device``, by default bf16 on a GPU and fp32 on a CPU.

    The weights are normal with a standard deviation of 0.02, so activations stay small.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    with device:
        return AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype).eval()


@dataclass(frozen=True)
class LinearSizes:
    """(out_features, in_features) of the linear layers of a decoder, as the runner merges them."""

    qkv: tuple[int, int]
    out: tuple[int, int]
    gate_up: tuple[int, int]
    down: tuple[int, int]
    head: tuple[int, int]

    @property
    def block(self) -> tuple[tuple[int, int], ...]:
        """The layers of one block, in the order in which it runs them."""
        return self.qkv, self.out, self.gate_up, self.down


def linear_sizes(config: Any) -> LinearSizes:
    """Return the sizes of a transformers configuration with gated MLPs."""
    sizes = ModelSizes.from_config(config)
    width, middle = sizes.hidden, config.get_text_config().intermediate_size
    return LinearSizes(
        qkv=((sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim, width),
        out=(width, sizes.heads * sizes.head_dim),
        gate_up=(2 * middle, width),
        down=(width, middle),
        head=(sizes.vocabulary, width),
    )


def config_of(shape: str) -> Any:
    """Return the transformers configuration of a shape."""
    from transformers import AutoConfig

    kind, sizes = SHAPES[shape]
    no_ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return AutoConfig.for_model(kind, **sizes, **no_ends)
