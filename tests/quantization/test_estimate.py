"""The estimate before weights are rounded: the exact bytes, and times if bandwidth is known."""

from dataclasses import replace

import pytest
import torch

import llmfast
from llmfast.hardware import Gpu
from llmfast.quantization.driver import quantize
from llmfast.quantization.estimate import estimate_quantization
from llmfast.weights.registry import pack
from tiny_models import make


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("weights", "group"), [("int4", 32), ("int4", None), ("int8", None)])
def test_bytes_are_those_of_the_packed_weights(weights, group, symmetric):
    model = make("Llama", intermediate_size=256).bfloat16()
    found = quantize(model, weights=weights, group_size=group, symmetric=symmetric)
    packed = [pack(w, torch.bfloat16) for w in found.weights.values()]
    told = estimate_quantization(model, weights=weights, group_size=group, symmetric=symmetric)
    assert told.layers == len(packed) == 14
    assert told.packed == sum(w.nbytes for w in packed)
    assert told.dense == sum(2 * w.n * w.k for w in packed)
    embedding = model.get_input_embeddings().weight.nbytes
    assert told.step_dense == sum(p.nbytes for p in model.parameters()) - embedding
    assert told.step_dense - told.step_packed == told.dense - told.packed
    tied = make("Llama", intermediate_size=256, tie_word_embeddings=True).bfloat16()
    told = estimate_quantization(tied, weights="int4", group_size=32)
    assert told.step_dense == sum(p.nbytes for p in tied.parameters())


def test_the_lines_name_bytes_time_and_where_it_is_slower():
    told = estimate_quantization(make("Llama").bfloat16(), weights="int4", group_size=32)
    first, warning = told.lines()
    assert first.startswith("14 linear layers: 0.1 MiB of weights become 0.1 MiB.")
    assert "ms" not in first and "On the CPU it is slower" in warning
    big = replace(told, step_dense=15_000_000_000, step_packed=4_500_000_000, dense=2**34)
    h100 = Gpu("NVIDIA H100 80GB HBM3", "sm_90", 132, 80 * 2**30, bandwidth=3.35e12)
    l4 = Gpu("NVIDIA L4", "sm_89", 58, 24 * 2**30, bandwidth=3.0e11)
    first, warning = replace(big, gpu=h100).lines()
    assert "16.00 GiB of weights" in first and "1.49 ms" in first and "not 4.98 ms" in first
    assert "256 tokens or more" in warning and "1.2 times slower below 1,000" in warning
    for other in (replace(big, gpu=l4), replace(big, gpu=h100, format="int8")):
        assert "256 tokens or more" in other.warning() and "are slower than" in other.warning()
    first, _ = replace(big, gpu=replace(l4, bandwidth=None)).lines()
    assert "ms" not in first and "reads 4.19 GiB, not 13.97 GiB" in first
    _, warning = replace(big, gpu=l4, dtype=torch.float32).lines()
    assert "wants 16-bit inputs" in warning


def test_patch_says_it_before_it_starts(capsys):
    model = make("Llama")
    llmfast.patch(model, weights="int4", group_size=32)
    llmfast.unpatch(model)
    err = capsys.readouterr().err
    assert "llmfast: 14 linear layers: 0.2 MiB of weights become" in err
    assert "On the CPU it is slower" in err
    llmfast.patch(model, weights=quantize(model, weights="int8", group_size=32))
    assert "14 linear layers" in capsys.readouterr().err
    llmfast.unpatch(model)
    llmfast.patch(model)
    assert capsys.readouterr().err == ""
