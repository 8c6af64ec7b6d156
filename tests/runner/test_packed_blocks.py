"""Blocks over four-bit weights: against the model that holds the dequantized ones."""

import pytest
import torch
from torch import nn

import llmfast_kernels
from llmfast.model.trace import NotTraced
from llmfast.quantization.driver import quantize, simulate
from llmfast.quantization.methods import GptqSettings
from llmfast.runner.block_model import BlockModel
from llmfast.runner.verify import run_sequences
from llmfast.weights import int4
from llmfast.weights.dense import DenseWeight
from llmfast.weights.int4 import Int4Weight
from llmfast.weights.quantized import Quantized, QuantizedWeight
from tiny_models import make, tokens

IDS = tokens(8, 64)


# models are on the CPU in float32, which the kernel does not have: a test below runs it on a GPU


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0]


def assert_packed_is_simulated(model, found, packed=None):
    """Sums in another order through two blocks; some hundred roundings, as in test_blocks.py."""
    dense = logits(model, IDS[:1])
    with simulate(model, found):
        ours = BlockModel(model, 128, weights=found.weights)
        wanted = logits(model, IDS[:1])
    got = run_sequences(ours, IDS[:1].tolist(), 20, prefill=11)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(got, wanted, rtol=0, atol=200 * 2**-24 * scale)
    assert float((wanted - dense).abs().max()) > 1e-3 * scale  # or the test would show nothing
    everything = 4 * len(ours.built.blocks)
    assert len(ours.built.packed) == (everything if packed is None else packed)
    return ours


KINDS = ["Llama", "Qwen3", "Phi3", "Granite", "Olmo2", "Gemma2", "Gemma3", "SmolLM3", "Glm"]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_blocks_equal_the_simulated_model(kind, symmetric):
    model = make(kind)
    found = quantize(model, group_size=32, symmetric=symmetric)
    ours = assert_packed_is_simulated(model, found)
    assert "8 of their 8 linear layers in four bits" in ours.describe()
    assert ours.packed_bytes == sum(w.nbytes for w in ours.built.packed) > 0


def test_one_scale_an_output():
    model = make("Llama")
    ours = assert_packed_is_simulated(model, quantize(model, group_size=None))
    assert ours.built.blocks[0].feed_forward.down.weight.scales.shape == (64, 1)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
def test_eight_bits(symmetric):
    model = make("Llama")
    found = quantize(model, weights="int8", group_size=32, symmetric=symmetric)
    dense = logits(model, IDS[:1])
    with simulate(model, found):
        ours = BlockModel(model, 128, weights=found.weights)
        wanted = logits(model, IDS[:1])
    got = run_sequences(ours, IDS[:1].tolist(), 20, prefill=11)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(got, wanted, rtol=0, atol=200 * 2**-24 * scale)
    assert float((wanted - dense).abs().max()) > 1e-4 * scale
    assert "8 of their 8 linear layers in eight bits" in ours.describe()


def test_act_order():
    model = make("Llama")
    settings = GptqSettings(act_order=True, static_groups=False)
    found = quantize(model, method="gptq", group_size=32, calibration=IDS, gptq_settings=settings)
    ours = assert_packed_is_simulated(model, found)
    assert all(w.permutation is not None for w in ours.built.packed)


def test_awq_s_folded_norms_are_the_block_s():
    model = make("Llama")
    found = quantize(model, method="awq", group_size=32, calibration=IDS)
    assert found.folded
    with simulate(model, found):
        assert_model_is_run(model, found)


def assert_model_is_run(model, found):
    ours = BlockModel(model, 128, weights=found.weights)
    wanted = logits(model, IDS[:1])
    got = run_sequences(ours, IDS[:1].tolist(), 20, prefill=11)
    torch.testing.assert_close(got, wanted, rtol=0, atol=200 * 2**-24 * float(wanted.abs().max()))


def test_float_minima():
    model = make("Llama")
    weights = {}
    for name, w in quantize(model, group_size=32, symmetric=False).weights.items():
        minima = -w.zeros.half() * w.scales
        weights[name] = QuantizedWeight(w.codes, 4, 32, w.scales, minima=minima)
    ours = assert_packed_is_simulated(model, Quantized(weights))
    assert all(w.minima is not None for w in ours.built.packed)


def test_biases_are_added():
    model = make("Llama", attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    assert_packed_is_simulated(model, quantize(model, group_size=32))


def test_layers_of_different_forms_run_dense():
    model = make("Llama")
    found = quantize(model, group_size=32)
    weights = dict(found.weights)
    eight = quantize(model, weights="int8", group_size=32).weights
    weights["model.layers.0.self_attn.k_proj"] = eight["model.layers.0.self_attn.k_proj"]
    weights["model.layers.1.mlp.down_proj"] = eight["model.layers.1.mlp.down_proj"]
    del weights["model.layers.1.mlp.up_proj"]
    ours = assert_packed_is_simulated(model, Quantized(weights), packed=6)
    first, second = ours.built.blocks
    assert isinstance(first.mixer.qkv.weight, DenseWeight)
    assert isinstance(first.feed_forward.gate_up.weight, Int4Weight)
    assert isinstance(second.mixer.qkv.weight, Int4Weight)
    assert isinstance(second.feed_forward.gate_up.weight, DenseWeight)


def test_layers_of_another_form_have_a_proof_of_their_own():
    model = make("Llama")
    weights = dict(quantize(model, group_size=32).weights)
    with simulate(model, Quantized(weights)):
        assert len(BlockModel(model, 64, weights=weights).built.verifications) == 1
    other = quantize(model, group_size=32, symmetric=False).weights
    weights |= {name: w for name, w in other.items() if ".layers.1." in name}
    with simulate(model, Quantized(weights)):
        assert len(BlockModel(model, 64, weights=weights).built.verifications) == 2


def test_the_model_s_parameters_are_left_alone():
    model = make("Qwen3")
    found = quantize(model, group_size=32)
    state = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    with simulate(model, found):
        ours = BlockModel(model, 64, weights=found.weights)
    ours.restore()
    for name, p in model.named_parameters():
        assert p.data_ptr() == state[name][0] and torch.equal(p, state[name][1])


def test_packed_layers_are_the_operations(monkeypatch):
    calls = []

    def counted(**arguments):
        calls.append(len(arguments["packed"]))
        return llmfast_kernels.int4_linear(**arguments)

    model = make("Llama")
    found = quantize(model, group_size=32)
    with simulate(model, found):
        ours = BlockModel(model, 64, weights=found.weights)
    monkeypatch.setattr(int4, "int4_linear", counted)
    run_sequences(ours, IDS[:1, :5].tolist(), 0)
    assert calls == [128, 64, 192, 64] * 2  # q, k, v; output; gate and up; down


def test_weights_that_the_model_does_not_hold_are_not_verified():
    model = make("Llama")
    found = quantize(model, group_size=32)
    with pytest.raises(NotTraced, match="is not what"):
        BlockModel(model, 64, weights=found.weights)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Phi3"])
@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_on_a_gpu_in_16_bits(weights, kind, dtype):
    """A step of all tokens goes through the workspace, one of few through the kernel."""
    model = make(kind, "cuda").to(dtype)
    found = quantize(model, weights=weights, group_size=32, symmetric=False, scale_dtype=dtype)
    ids = tokens(1, 200, "cuda")
    with simulate(model, found):
        ours = BlockModel(model, 256, weights=found.weights)
        wanted = logits(model, ids).double()
    assert ours.verification.holds and len(ours.built.packed) == 8
    for prefill in (None, 64):
        got = run_sequences(ours, ids.tolist(), 20, prefill=prefill).double()
        error = (got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert error <= 16 * torch.finfo(dtype).eps
