"""GGUF files in their own bits: the weights that a model carries, and results with them."""

import copy
import pickle

import pytest
import torch

import llmfast
from engines import executor_of
from llmfast.errors import UserError
from llmfast.quantization.driver import quantize
from llmfast.runner.verify import run_sequences
from llmfast.weights.model_weights import attach, quantized_weights_of

IDS = torch.arange(3, 35)
KINDS = ["Q4_0", "Q4_1", "Q8_0"]
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def load(tmp_path, tiny_llama, write_gguf):
    def load(kind, **options):
        path = write_gguf(tmp_path / f"{kind}.gguf", tiny_llama(), kind)
        return llmfast.load(path, device="cpu", **options).model

    return load


@torch.no_grad()
def logits(model):
    return model(IDS[None]).logits[0]


@each_kind
def test_a_model_carries_the_weights_of_its_parameters(kind, load):
    """Rows of q and k in transformers' order, with their scales and minima."""
    model = load(kind)
    weights = quantized_weights_of(model)
    names = {f"{name}.weight" for name in weights}
    decoder = {n for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}
    assert names == decoder and len(names) == len(list(weights)) > 0
    for name, w in weights.items():
        assert torch.equal(w.dequantize(), model.get_parameter(f"{name}.weight"))
        assert w.bits == (8 if kind == "Q8_0" else 4) and w.group_size == 32
        assert (w.minima is not None) == (kind == "Q4_1")


@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_plain_files_carry_none(kind, load):
    assert quantized_weights_of(load(kind)) is None


@each_kind
def test_codes_give_the_logits_of_the_dequantized_weights(kind, load):
    """Sums in another order through two blocks; some hundred roundings, as in test_blocks.py."""
    model = load(kind)
    wanted = logits(model)
    report = llmfast.patch(model, ops="generate", weights="own")
    bits = "eight" if kind == "Q8_0" else "four"
    assert any(f"8 of their 8 linear layers in {bits} bits" in note for note in report.notes)
    steps = model.generate.args[1].step_model
    got = run_sequences(steps, [IDS.tolist()], 20, prefill=7)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(got, wanted, rtol=0, atol=200 * 2**-24 * scale)
    assert torch.equal(logits(model), wanted)


@each_kind
def test_in_16_bits_scales_are_rounded_as_weights_are(kind, load):
    """Both forms round once, to bfloat16: scales and minima here, weights there.

    With minima the two parts of a weight are each larger than it: the error is nearly doubled.
    """
    exact = logits(load(kind, dtype="float64"))
    model = load(kind, dtype="bfloat16")
    llmfast.patch(model, ops="generate", weights="own")
    ours = run_sequences(model.generate.args[1].step_model, [IDS.tolist()], 20)
    error, own = ((x.double() - exact).square().mean().sqrt() for x in (ours, logits(model)))
    assert error <= 2 * own


def test_on_the_cpu_nothing_is_multiplied_in_its_own_bits_by_default(load):
    model = load("Q4_1")
    llmfast.patch(model, ops="generate")
    assert model.generate.args[1].step_model.packed_bytes == 0
    llmfast.unpatch(model)
    with llmfast.LLM(model) as llm:
        assert executor_of(llm).model.packed_bytes == 0
    llmfast.patch(model, ops="generate", weights="own")
    assert model.generate.args[1].step_model.packed_bytes > 0
    llmfast.unpatch(model)
    llmfast.patch(model, ops="generate", weights="dequantized")
    assert model.generate.args[1].step_model.packed_bytes == 0


def test_copies_and_pickles_carry_them_too(load):
    model = load("Q8_0")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(quantized_weights_of(twin)) == len(quantized_weights_of(model))
        for name, w in quantized_weights_of(twin).items():
            assert torch.equal(w.dequantize(), twin.get_parameter(f"{name}.weight"))


def test_weights_of_a_file_may_be_quantized_again(load):
    model = load("Q8_0")
    before, own = logits(model), quantized_weights_of(model)
    llmfast.patch(model, ops="generate", weights="int4", group_size=32)
    assert all(w.bits == 4 for w in quantized_weights_of(model).values())
    assert not torch.equal(logits(model), before)
    llmfast.unpatch(model)
    assert torch.equal(logits(model), before) and quantized_weights_of(model) is own
    attach(model, quantize(model, group_size=32))  # attached weights may not
    with pytest.raises(UserError, match="has quantized weights already"):
        llmfast.patch(model, weights="int4")


def test_the_embedded_model_carries_its_210_layers(embedded):
    model = embedded.model
    weights = quantized_weights_of(model)
    assert len(weights) == 210
    for name in ("model.layers.7.self_attn.k_proj", "model.layers.29.mlp.down_proj"):
        w = weights[name]
        assert (w.bits, w.group_size) == (4, 32)
        assert torch.equal(w.dequantize(), model.get_parameter(f"{name}.weight"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@each_kind
def test_on_a_gpu_they_are_the_default(kind, dtype, load):
    model = load(kind, dtype=dtype).cuda()
    with torch.no_grad():
        wanted = model(IDS[None].cuda()).logits[0].double()
    report = llmfast.patch(model)
    assert any("8 of their 8 linear layers" in note for note in report.notes)
    got = run_sequences(model.generate.args[1].step_model, [IDS.tolist()], 20).double()
    error = (got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert error <= 16 * torch.finfo(model.dtype).eps
