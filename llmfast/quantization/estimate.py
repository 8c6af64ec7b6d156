"""Estimate what quantized weights do to a model's memory and speed, before they are found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..hardware import Gpu, gpu_of
from ..model.costs import weight_bytes
from ..model.decoder import decoder_layers, linears
from ..weights.registry import FORMATS

MANY_TOKENS = 256  # from here on 16-bit weights were as fast: docs/ops/quantized_linear.md


@dataclass(frozen=True)
class QuantizationEstimate:
    """Bytes of the decoder's linear layers, and of all weights that a step at batch 1 reads."""

    layers: int
    dense: int
    packed: int
    step_dense: int
    step_packed: int
    gpu: Gpu | None  # None: on the CPU
    dtype: torch.dtype
    format: str  # a key of FORMATS

    def lines(self) -> list[str]:
        """Return what to print, in full sentences; the last one warns."""
        text = (
            f"{self.layers} linear layers: {_size(self.dense)} of weights become "
            f"{_size(self.packed)}."
        )
        if self.gpu is not None:
            now = self.gpu.read_seconds(self.step_dense)
            then = self.gpu.read_seconds(self.step_packed)
            if now is not None and then is not None:
                text += (
                    f" A step at batch 1 on {self.gpu.name} should take {1e3 * then:.2f} ms or a "
                    f"little more to read its weights, not {1e3 * now:.2f} ms."
                )
            else:
                text += (
                    f" A step reads {_size(self.step_packed)}, not {_size(self.step_dense)}; the "
                    f"bandwidth of {self.gpu.name} is not known here."
                )
        return [text, self.warning()]

    def warning(self) -> str:
        """Return a sentence that says where quantized weights are slower."""
        if self.gpu is None:
            return (
                "On the CPU it is slower: the operations there unpack every code in every call, and"
                " the parameters stay."
            )
        if self.dtype == torch.float32:
            return "Nothing will be multiplied in these bits: on a GPU that wants 16-bit inputs."
        steps = f"Steps of {MANY_TOKENS} tokens or more (prompts, large batches) are"
        return f"{steps} {FORMATS[self.format].prefill_note(self.gpu.arch)}."


def estimate_quantization(
    model: PreTrainedModel, *, weights: str, group_size: int | None, symmetric: bool = True
) -> QuantizationEstimate:
    """QuantizationEstimate what :func:`llmfast.quantize` with these choices makes of ``model``.

    Raises:
        UserError: there is no list of decoder layers.
    """
    parts = [
        part for layer in decoder_layers("quantize", model)[1] for part in linears(layer).values()
    ]
    dense = sum(part.weight.nbytes for part in parts)
    packed_bytes = FORMATS[weights].packed_bytes
    shapes = [(part.out_features, part.in_features) for part in parts]
    packed = sum(packed_bytes(n, k, group_size, symmetric) for n, k in shapes)
    step = weight_bytes(model)
    gpu = gpu_of(model.device)
    return QuantizationEstimate(
        len(parts), dense, packed, step, step - dense + packed, gpu, model.dtype, weights
    )


def _size(nbytes: int) -> str:
    if nbytes < 2**30:
        return f"{nbytes / 2**20:.1f} MiB"
    return f"{nbytes / 2**30:.2f} GiB"
