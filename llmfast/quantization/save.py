"""Save a model with quantized weights as a folder of compressed-tensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..errors import UserError
from ..model.shadow import check_unpatched
from ..weights.checkpoint_formats import PACK_QUANTIZED, to_compressed_tensors
from ..weights.model_weights import replacements
from ..weights.quantized import GROUP_SIZES, Quantized, QuantizedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_quantized(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    quantized: Quantized,
    folder: str | os.PathLike[str],
) -> None:
    """Save ``model`` with quantized weights, as :func:`llmfast.load` and other engines read it.

    The weights are one safetensors file in the format ``pack-quantized`` of compressed-tensors;
    other tensors keep their dtype. The folder is complete or does not exist.

    Args:
        model: the model that ``quantized`` was found for; not patched.
        tokenizer: saved with it.
        quantized: the result of :func:`llmfast.quantize`.
        folder: must not exist, or be empty; its parent must exist.

    Raises:
        UserError: a folder that exists or cannot be written, a patched model, weights of another
            model, or weights that the format cannot hold: float minima, or groups or bits that
            differ between layers.
    """
    check_unpatched("save_quantized", model)
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"save_quantized: {folder} is there already, and not empty")
    quantization_config, state = _contents(model, quantized)
    part = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir()
        _write(part, model, tokenizer, quantization_config, state)
        part.rename(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"save_quantized: {folder} cannot be written: {reason}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # a full disk, for one
            raise
        raise UserError(f"save_quantized: {folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _contents(
    model: PreTrainedModel, quantized: Quantized
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the quantization_config, and the tensors by name."""
    what = "save_quantized"
    replacements(what, model, quantized)  # checks names and shapes
    weights = quantized.weights
    if not weights:
        raise UserError(f"{what}: no weight is quantized")
    symmetric = all(w.zeros is None for w in weights.values())
    state = _own_tensors(model.state_dict() | quantized.folded)
    for name, w in weights.items():
        state.pop(f"{name}.weight", None)
        if not symmetric:
            w = replace(w, zeros=w.zero_points()) if w.minima is None else w
        try:
            tensors = to_compressed_tensors(w)
        except ValueError as error:
            raise UserError(f"{what}: {name}: {error}") from None
        state |= {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}
    ordered = any(w.g_idx is not None for w in weights.values())
    scheme = _scheme(weights, symmetric, ordered)
    others = [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and name not in weights
    ]
    config = {
        "quant_method": "compressed-tensors",
        "format": PACK_QUANTIZED,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": scheme,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": others,
        "kv_cache_scheme": None,
    }
    return config, state


def _scheme(
    weights: Mapping[str, QuantizedWeight], symmetric: bool, ordered: bool
) -> dict[str, Any]:
    bits = {w.bits for w in weights.values()}
    sizes = {w.group_size for w in weights.values()}
    whole = all(w.group_size == w.shape[1] for w in weights.values())
    if len(bits) > 1 or (len(sizes) > 1 and not whole):
        raise UserError("save_quantized: the layers have groups or bits that differ")
    group_size = None if whole and not sizes <= set(GROUP_SIZES) else min(sizes)
    return {
        "num_bits": bits.pop(),
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "actorder": "group" if ordered else None,
        "dynamic": False,
    }


def _own_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return each tensor once, under its first name: loading ties it again."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    result = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place not in seen:
            seen.add(place)
            result[name] = tensor.detach().contiguous()
    return result


def _write(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    quantization_config: dict[str, Any],
    state: dict[str, torch.Tensor],
) -> None:
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["quantization_config"] = quantization_config
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes the file readable for its owner only
    (folder / "model.safetensors").chmod(path.stat().st_mode)
