"""What quantized weights will do to a model's memory and speed, said before the work starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .decoder import decoder_layers, linears

# GB/s of memory as vendors state it, by a part of a GPU's name; the first that fits counts
BANDWIDTHS = {
    "B200": 8000,
    "H200": 4800,
    "H100 PCIe": 2000,
    "H100 NVL": 3900,
    "H100": 3350,
    "A100-SXM4-40GB": 1555,
    "A100-PCIE-40GB": 1555,
    "A100 80GB PCIe": 1935,
    "A100": 2039,
    "L40S": 864,
    "L40": 864,
    "L4": 300,
    "A10G": 600,
    "RTX 5090": 1792,
    "RTX 4090": 1008,
    "RTX 3090": 936,
}
REACHED = 0.9  # of it by a copy, as on an H100: 3,019 of 3,350 GB/s
MANY_TOKENS = 256  # from here on 16-bit weights were faster, or as fast: docs/ops/linear.md


@dataclass(frozen=True)
class Estimate:
    """Bytes of the decoder's linear layers, and what a step at batch 1 reads of all weights."""

    layers: int
    dense: int
    packed: int
    step_dense: int
    step_packed: int
    device: torch.device
    gpu: str | None  # its name; None on the CPU
    dtype: torch.dtype
    bits: int

    def lines(self) -> list[str]:
        """What to print, in full sentences; the last one warns."""
        text = (
            f"{self.layers} linear layers: {_size(self.dense)} of weights become "
            f"{_size(self.packed)}."
        )
        bandwidth = bandwidth_of(self.gpu) if self.gpu else None
        if bandwidth is not None:
            now, then = (n / (REACHED * bandwidth * 1e6) for n in self._steps)
            text += (
                f" A step at batch 1 on {self.gpu} should take {then:.2f} ms or a little more to "
                f"read its weights, not {now:.2f} ms."
            )
        elif self.gpu:
            now, then = self._steps
            text += (
                f" A step reads {_size(then)}, not {_size(now)}; the bandwidth of {self.gpu} is not"
                " known here."
            )
        return [text, self.warning()]

    @property
    def _steps(self) -> tuple[int, int]:
        return self.step_dense, self.step_packed

    def warning(self) -> str:
        """Where it will be slower."""
        if self.gpu is None:
            return (
                "On the CPU it is slower: the operations there unpack every code in every call, and"
                " the parameters stay."
            )
        if self.dtype == torch.float32:
            return "Nothing will be multiplied in these bits: on a GPU that wants 16-bit inputs."
        steps = f"Steps of {MANY_TOKENS} tokens or more (prompts, large batches) are"
        if self.bits == 4 and self.gpu is not None and "H100" in self.gpu:
            return f"{steps} not faster than in 16 bits, and up to 1.2 times slower below 1,000."
        return f"{steps} slower than in 16 bits."


def estimate(
    model: PreTrainedModel, *, bits: int, group_size: int | None, symmetric: bool = True
) -> Estimate:
    """Count what :func:`llmfast.quantize` with these choices will make of ``model``.

    Raises:
        UserError: there is no list of decoder layers.
    """
    parts = [part for layer in decoder_layers(model)[1] for part in linears(layer).values()]
    dense = sum(part.weight.nbytes for part in parts)
    packed = 0
    for part in parts:
        n, k = part.weight.shape
        columns = -(-k // 128) * 64 if bits == 4 else -(-k // 16) * 16  # bytes, filled up
        groups = -(-k // (group_size or k))
        packed += n * (columns + groups * (2 if symmetric else 3))
    step = sum(parameter.nbytes for parameter in model.parameters()) - _only_looked_up(model)
    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None
    return Estimate(
        len(parts), dense, packed, step, step - dense + packed, model.device, gpu, model.dtype, bits
    )


def bandwidth_of(gpu: str) -> float | None:
    """GB/s of a GPU's memory, by its name; None for one that is not listed."""
    return next((speed for name, speed in BANDWIDTHS.items() if name in gpu), None)


def _only_looked_up(model: PreTrainedModel) -> int:
    """Bytes of an input embedding that is not the head too: a step reads a few rows."""
    embedding: nn.Module | None = model.get_input_embeddings()
    head: nn.Module | None = model.get_output_embeddings()
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, torch.Tensor) or getattr(head, "weight", None) is weight:
        return 0
    return weight.nbytes


def _size(nbytes: int) -> str:
    if nbytes < 2**30:
        return f"{nbytes / 2**20:.1f} MiB"
    return f"{nbytes / 2**30:.2f} GiB"
