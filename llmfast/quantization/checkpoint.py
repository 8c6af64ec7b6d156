"""Whole checkpoints with quantized weights: folders of GPTQ, AWQ and compressed-tensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import UserError
from .driver import Quantized, check_unpatched, replaced_by
from .formats import from_awq, from_compressed_tensors, from_gptq, to_compressed_tensors
from .weights import GROUP_SIZES, QuantizedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHODS = ("gptq", "awq", "compressed-tensors")  # quant_method of what can be read here
FORMAT = "pack-quantized"

Read = Callable[[Mapping[str, torch.Tensor]], QuantizedWeight]

# ------------------------------------------------------------------------------------------ load


def load_folder(
    folder: Path,
    quantization_config: Mapping[str, Any],
    dtype: torch.dtype,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, QuantizedWeight], dict[str, torch.Tensor]]:
    """Read every tensor of ``folder``.

    Args:
        folder: holds the safetensors files.
        quantization_config: of its config.json.
        dtype: of the dequantized weights.
        on_progress: called as ``on_progress("loading weights", done, total)`` after each layer.

    Returns:
        The quantized weights by the names of their layers; and a state dict of the whole, with the
        dequantized weights in it.

    Raises:
        UserError: a format that cannot be read here, or a layer that is not of it.
    """
    where = f"{folder}: quantization_config"
    marker, read = _reader(where, quantization_config)
    state: dict[str, torch.Tensor] = {}
    for path in _files(folder):
        state |= load_file(path)
    names = sorted(key.removesuffix(marker) for key in state if key.endswith(marker))
    if not names:
        raise UserError(f"{folder}: no layer is quantized: no tensor is named *{marker}")
    weights = {}
    for done, name in enumerate(names, 1):
        prefix = f"{name}."
        parts = [key for key in state if key.startswith(prefix) and "." not in key[len(prefix) :]]
        tensors = {key[len(prefix) :]: state.pop(key) for key in parts if key != f"{name}.bias"}
        try:
            weights[name] = read(tensors)
        except (TypeError, ValueError) as error:
            raise UserError(f"{folder}: {name}: {error}") from None
        state[f"{name}.weight"] = weights[name].dequantize(dtype)
        if on_progress is not None:
            on_progress("loading weights", done, len(names))
    return weights, state


def _files(folder: Path) -> list[Path]:
    """The safetensors of the model: some folders hold its weights in another form as well."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if index.exists():
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(parts))]
    return sorted(folder.glob("*.safetensors"))


def _reader(where: str, config: Mapping[str, Any]) -> tuple[str, Read]:
    """The end of the name of each layer's codes, and what reads a layer."""
    method = config.get("quant_method")
    if method == "compressed-tensors":
        return ".weight_packed", partial(from_compressed_tensors, bits=_group_bits(where, config))
    bits = config.get("bits")
    if method == "gptq":
        stored = config.get("checkpoint_format", "gptq")
        if stored not in ("gptq", "gptq_v2"):
            raise UserError(f"{where}: checkpoint_format {stored!r} cannot be read; 'gptq' can")
        if bits not in (4, 8):
            raise UserError(f"{where}: bits must be 4 or 8; got {bits!r}")
        return ".qweight", partial(from_gptq, bits=bits, version=2 if stored == "gptq_v2" else 1)
    if method == "awq":
        layout = str(config.get("version", "gemm")).lower()
        if layout != "gemm":
            raise UserError(f"{where}: version {layout!r} of AWQ cannot be read; 'gemm' can")
        if bits != 4:
            raise UserError(f"{where}: bits of AWQ must be 4; got {bits!r}")
        return ".qweight", from_awq
    raise UserError(f"{where}: quant_method must be {', '.join(METHODS)}; got {method!r}")


def _group_bits(where: str, config: Mapping[str, Any]) -> int:
    """The bits of the codes, which all groups of layers must share."""
    if config.get("format") != FORMAT:
        raise UserError(f"{where}: format {config.get('format')!r} cannot be read; {FORMAT!r} can")
    bits = set()
    for group in config.get("config_groups", {}).values():
        if group.get("input_activations") is not None:
            raise UserError(f"{where}: quantized activations cannot be run")
        if group["weights"].get("type", "int") != "int":
            raise UserError(f"{where}: weights must be integers; got {group['weights']['type']!r}")
        bits.add(group["weights"]["num_bits"])
    if bits not in ({4}, {8}):
        raise UserError(f"{where}: num_bits must be 4 or 8 in all groups; got {sorted(bits)}")
    return int(bits.pop())


# ------------------------------------------------------------------------------------------ save


def save_quantized(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    quantized: Quantized,
    folder: str | os.PathLike[str],
) -> None:
    """Save ``model`` with quantized weights, as :func:`llmfast.load` and other engines read it.

    One safetensors file in the format ``pack-quantized`` of compressed-tensors; what is not
    quantized keeps its dtype. The folder appears when everything is written, or not at all.

    Args:
        model: what ``quantized`` was found for; not patched.
        tokenizer: saved along with it.
        quantized: what :func:`llmfast.quantize` gives.
        folder: must not exist, or be empty; its parent must exist.

    Raises:
        UserError: a folder that is in the way or cannot be written, a patched model, weights of
            another model, or weights that the format cannot hold: float minima, or groups or bits
            that differ from layer to layer.
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
    """The quantization_config and the tensors by name."""
    what = "save_quantized"
    replaced_by(what, model, quantized)  # names and shapes are the model's
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
        "format": FORMAT,
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
    """Each tensor once, under its first name: tied ones are tied again when they are loaded."""
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
    # safetensors writes a file that nobody else may read
    (folder / "model.safetensors").chmod(path.stat().st_mode)
