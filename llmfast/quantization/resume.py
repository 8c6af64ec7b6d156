"""Keep the finished layers of a quantization on disk, so that an interrupted one continues."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import pad

from ..errors import UserError
from ..weights.quantized import Quantized, QuantizedWeight

_FINGERPRINT = "fingerprint.json"
_FORMAT = "2"  # increment it when the files change, or the codes that methods find
_SAMPLES = 64  # values of each parameter, evenly spaced
_TENSORS = ("codes", "scales", "zeros", "minima", "g_idx")


class WorkFolder:
    """A folder with a file for each finished layer, of one model and one set of options."""

    def __init__(self, folder: str | os.PathLike[str], fingerprint: dict[str, Any]) -> None:
        """Create the folder, or continue with the layers in it.

        Raises:
            UserError: the folder holds something else, or layers of another model or other options,
                or cannot be written.
        """
        self.path = Path(folder)
        mark = self.path / _FINGERPRINT
        try:
            if not mark.exists():
                if self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir())):
                    raise UserError(f"quantize: {self.path} is there already, and no work folder")
                self.path.mkdir(exist_ok=True)
                self._put(mark, json.dumps(fingerprint, indent=1).encode())
                return
            before = json.loads(mark.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._failed(error) from error
        others = [key for key, value in fingerprint.items() if before.get(key) != value]
        if others:
            raise UserError(
                f"quantize: {self.path} holds finished layers of other work "
                f"(another {', another '.join(others)}); remove the folder to start over"
            )

    def load(self, index: int, device: torch.device) -> Quantized | None:
        """Return a finished layer; None if it is not finished."""
        try:
            with safe_open(self._file(index), framework="pt", device=str(device)) as file:
                layer = json.loads(file.metadata()["layer"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, SafetensorError):  # missing, or cut short by a crash
            return None
        found = Quantized(fallbacks=layer["fallbacks"])
        for name, form in layer["weights"].items():
            parts = {key: tensors.get(f"weights/{name}/{key}") for key in _TENSORS}
            codes = parts.pop("codes")
            assert codes is not None
            if form["bits"] == 4:
                codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)[:, : form["k"]]
            found.weights[name] = QuantizedWeight(
                codes=codes.contiguous(),
                bits=form["bits"],
                group_size=form["group_size"],
                **parts,  # type: ignore[arg-type]
            )
        for name in layer["folded"]:
            found.folded[name] = tensors[f"folded/{name}"]
        return found

    def save(self, index: int, found: Quantized) -> None:
        """Write a finished layer; its file is complete or does not exist.

        Raises:
            UserError: it cannot be written; the layers before it stay.
        """
        tensors = {f"folded/{name}": value.contiguous() for name, value in found.folded.items()}
        forms = {}
        for name, w in found.weights.items():
            forms[name] = {"bits": w.bits, "group_size": w.group_size, "k": w.shape[1]}
            for key in _TENSORS:
                tensor = getattr(w, key)
                if key == "codes" and w.bits == 4:
                    tensor = pad(tensor, (0, tensor.shape[1] % 2))
                    tensor = tensor[:, 0::2] | tensor[:, 1::2] << 4
                if tensor is not None:
                    tensors[f"weights/{name}/{key}"] = tensor.contiguous()
        layer = {"weights": forms, "folded": list(found.folded), "fallbacks": found.fallbacks}
        path = self._file(index)
        part = path.with_suffix(".part")
        try:
            save_file(tensors, part, metadata={"layer": json.dumps(layer)})
            part.replace(path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise self._failed(error) from error

    def _file(self, index: int) -> Path:
        return self.path / f"layer-{index:04}.safetensors"

    def _put(self, path: Path, data: bytes) -> None:
        part = path.with_suffix(".part")
        part.write_bytes(data)
        part.replace(path)

    def _failed(self, error: Exception) -> UserError:
        reason = getattr(error, "strerror", None) or str(error)
        return UserError(
            f"quantize: {self.path} cannot be used: {reason}; layers that are finished stay there, "
            "and the same call goes on from them"
        )


def fingerprint_of(model: nn.Module, **choices: Any) -> dict[str, Any]:
    """Return everything that finished layers depend on, as comparable strings.

    For the model these are its class and each parameter's name, shape, dtype and a sample of its
    values; for the options their ``repr``, and all values of a tensor.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        step = max(1, len(flat) // _SAMPLES)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(flat[::step].double().cpu().numpy().tobytes())
    found = {"model": digest.hexdigest(), "format": _FORMAT}
    for name, value in choices.items():
        if isinstance(value, torch.Tensor):
            values = hashlib.sha256(value.cpu().contiguous().numpy().tobytes()).hexdigest()
            found[name] = f"{tuple(value.shape)} {values}"
        else:
            found[name] = repr(value)
    return found
