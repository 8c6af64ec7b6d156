"""A weight format is one class and one line in the registry: here float8, defined by this test."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn.functional import linear, silu

import llmfast
from generating import batch
from llmfast.weights.model_weights import set_quantized
from llmfast.weights.registry import FORMATS, pack
from tiny_models import make, tokens


@dataclass(frozen=True, eq=False)
class StoredFloat8:
    """Float8 values ``[n, k]`` with a scale for each output."""

    values: torch.Tensor
    scales: torch.Tensor
    format = "float8"
    label = "float8"

    @classmethod
    def of(cls, weight):
        scales = weight.abs().amax(1, keepdim=True) / 448
        return cls((weight / scales).to(torch.float8_e4m3fn), scales)

    @property
    def shape(self):
        return tuple(self.values.shape)

    def to(self, device):
        return replace(self, values=self.values.to(device), scales=self.scales.to(device))

    def dequantize(self, dtype=torch.float32):
        return (self.values.float() * self.scales).to(dtype)

    def concatenate(self, others):
        if any(not isinstance(other, StoredFloat8) for other in others):
            raise ValueError("layers with one input have weights of different forms")
        parts = [self, *others]
        values = torch.cat([part.values.view(torch.uint8) for part in parts])
        return StoredFloat8(
            values.view(torch.float8_e4m3fn), torch.cat([part.scales for part in parts])
        )


@dataclass(frozen=True, eq=False)
class Float8Weight:
    """The packed form, multiplied with in plain PyTorch."""

    stored: StoredFloat8
    dtype: torch.dtype
    calls: list
    format = label = form = "float8"
    description = "float8"

    @classmethod
    def pack(cls, stored, dtype):
        return cls(stored, dtype, [])

    @property
    def n(self):
        return self.stored.shape[0]

    @property
    def k(self):
        return self.stored.shape[1]

    @property
    def nbytes(self):
        return self.stored.values.nbytes + self.stored.scales.nbytes

    @property
    def device(self):
        return self.stored.values.device

    def linear(self, x, bias=None):
        self.calls.append(len(x))
        return linear(x, self.dequantize(), bias)

    def gated(self, x, bias, activation):
        assert activation == "silu"
        gate, up = self.linear(x, bias).chunk(2, -1)
        return silu(gate) * up

    def rows(self, start, stop):
        part = StoredFloat8(self.stored.values[start:stop], self.stored.scales[start:stop])
        return replace(self, stored=part)

    def dequantize(self):
        return self.stored.dequantize(self.dtype)


@pytest.mark.parametrize("kind", ["Llama", "Phi3"])
def test_a_new_format_runs_in_its_own_bits_with_one_line_in_the_registry(kind, monkeypatch):
    monkeypatch.setitem(FORMATS, "float8", Float8Weight)
    model = make(kind)
    layers = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
    weights = {name: StoredFloat8.of(layer.weight.detach()) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.weight.data = weights[name].dequantize()
    options = {**batch(torch.device("cpu")), "max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(**options)
    set_quantized(model, weights)
    report = llmfast.patch(model, ops="generate", weights="own")
    assert any("8 of their 8 linear layers in float8" in note for note in report.notes)
    assert torch.equal(model.generate(**options), wanted)
    llmfast.unpatch(model)
    engine = llmfast.LLM(model, weights="own", max_num_seqs=2)
    prompt = tokens(1, 12)[0].tolist()
    params = llmfast.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    (result,) = engine.generate([prompt], params)
    engine.close()
    wanted = model.generate(
        torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    assert list(result.outputs[0].token_ids) == wanted[0, 12:].tolist()


def test_layers_of_two_formats_are_not_put_side_by_side(monkeypatch):
    monkeypatch.setitem(FORMATS, "float8", Float8Weight)
    weight = torch.randn(8, 64)
    eight = StoredFloat8.of(weight)
    four = llmfast.quantize(make("Llama"), group_size=32).weights["model.layers.0.mlp.up_proj"]
    for first, other in ((eight, four), (four, eight)):
        with pytest.raises(ValueError, match="different forms"):
            first.concatenate([other])
    assert torch.equal(pack(eight, torch.float32).rows(2, 4).dequantize(), eight.dequantize()[2:4])
