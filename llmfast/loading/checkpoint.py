"""Read folders with weights of GPTQ, AWQ or compressed-tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..errors import UserError
from ..weights.checkpoint_formats import (
    PACK_QUANTIZED,
    from_awq,
    from_compressed_tensors,
    from_gptq,
)
from ..weights.quantized import QuantizedWeight

READABLE_METHODS = ("gptq", "awq", "compressed-tensors")  # values of quant_method

Read = Callable[[Mapping[str, torch.Tensor]], QuantizedWeight]


def load_folder(
    folder: Path,
    quantization_config: Mapping[str, Any],
    dtype: torch.dtype,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, QuantizedWeight], dict[str, torch.Tensor]]:
    """Read every tensor of ``folder``.

    Args:
        folder: holds the safetensors files.
        quantization_config: the field of its config.json.
        dtype: of the dequantized weights.
        on_progress: called as ``on_progress("loading weights", done, total)`` after each layer.

    Returns:
        The quantized weights by the names of their layers; and a state dict of the whole model with
        the dequantized weights.

    Raises:
        UserError: a format that cannot be read here, or a layer that does not follow it.
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
    """Return the model's safetensors files: some folders hold its weights in another form too."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if index.exists():
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(parts))]
    return sorted(folder.glob("*.safetensors"))


def _reader(where: str, config: Mapping[str, Any]) -> tuple[str, Read]:
    """Return the suffix of the tensors that hold codes, and the reader of a layer."""
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
    raise UserError(f"{where}: quant_method must be {', '.join(READABLE_METHODS)}; got {method!r}")


def _group_bits(where: str, config: Mapping[str, Any]) -> int:
    """Return the bits of the codes, which all groups of layers must share."""
    if config.get("format") != PACK_QUANTIZED:
        raise UserError(
            f"{where}: format {config.get('format')!r} cannot be read; {PACK_QUANTIZED!r} can"
        )
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
