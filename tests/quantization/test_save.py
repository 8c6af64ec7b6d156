"""Saved folders: complete and readable by other engines, or not there at all."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import llmfast
from generating import tokenizer
from llmfast.errors import UserError
from llmfast.quantization import save
from llmfast.quantization.driver import quantize
from llmfast.quantization.save import save_quantized
from llmfast.weights.quantized import Quantized, QuantizedWeight
from quantized_folders import CALIBRATION, logits, simulated
from tiny_models import make


@pytest.mark.parametrize("kind", ["Qwen3", "Phi3", "Gemma3"])
def test_other_families_with_biases_and_tied_embeddings(kind, tmp_path):
    changes = {"tie_word_embeddings": True}
    model = make(kind, **(changes | ({"attention_bias": True} if kind == "Qwen3" else {})))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    found = quantize(model, method="awq", group_size=32, calibration=CALIBRATION)
    assert found.folded
    save_quantized(model, tokenizer(), found, tmp_path / "model")
    loaded = llmfast.load(tmp_path / "model", device="cpu").model
    assert torch.equal(logits(loaded), simulated(model, found))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_other_engines_can_read_the_folder(tmp_path):
    model = make("Llama").half()
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    found = quantize(model, group_size=32)
    save_quantized(model, tokenizer(), found, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float16"
    written = config["quantization_config"]
    assert written["quant_method"] == "compressed-tensors"
    assert written["format"] == "pack-quantized" and written["ignore"] == ["lm_head"]
    group = written["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"] and group["input_activations"] is None
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    wanted |= {"group_size": 32, "actorder": None}
    assert {key: group["weights"][key] for key in wanted} == wanted
    modes = {path.stat().st_mode for path in (tmp_path / "model").glob("*.*s*")}
    assert len(modes) == 1  # the files have the same readers
    state = load_file(tmp_path / "model/model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    assert state[f"{layer}.weight_packed"].shape == (96, 64 // 8)
    assert state[f"{layer}.weight_scale"].dtype == torch.float16
    assert state[f"{layer}.weight_shape"].tolist() == [96, 64]
    assert f"{layer}.weight" not in state and f"{layer}.weight_zero_point" not in state
    assert state["lm_head.weight"].dtype == torch.float16
    loaded = llmfast.load(tmp_path / "model", device="cpu", dtype="auto").model
    assert loaded.dtype == torch.float16 and loaded.generation_config.temperature == 0.5


def test_zero_points_are_written_for_all_layers_or_none(tmp_path):
    model = make("Llama")
    weights = dict(quantize(model, group_size=32).weights)
    other = quantize(model, group_size=32, symmetric=False).weights
    weights |= {name: w for name, w in other.items() if ".layers.1." in name}
    save_quantized(model, tokenizer(), Quantized(weights), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["symmetric"] is False
    state = load_file(tmp_path / "model/model.safetensors")
    assert sum(name.endswith("weight_zero_point") for name in state) == len(weights)
    loaded = llmfast.load(tmp_path / "model", device="cpu").model
    assert torch.equal(logits(loaded), simulated(model, Quantized(weights)))


def test_a_full_disk_leaves_no_folder(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    model = make("Llama")
    found = quantize(model, group_size=32)
    monkeypatch.setattr(save, "save_file", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        save_quantized(model, tokenizer(), found, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_no_folder(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    model = make("Llama")
    found = quantize(model, group_size=32)
    monkeypatch.setattr(save, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_quantized(model, tokenizer(), found, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_models_and_folders_that_cannot_be_saved(tmp_path):
    model = make("Llama", intermediate_size=128)
    found = quantize(model, group_size=32)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    first, w = next(iter(found.weights.items()))
    minima = QuantizedWeight(w.codes, 4, 32, w.scales, minima=w.scales)
    for weights, folder, says in (
        (found.weights, full, "there already, and not empty"),
        (found.weights, tmp_path / "no" / "model", "cannot be written: No such file"),
        ({}, tmp_path / "model", "no weight is quantized"),
        (found.weights | {first: minima}, tmp_path / "model", "float minima"),
        (
            found.weights | {first: quantize(model, group_size=64).weights[first]},
            tmp_path / "model",
            "groups or bits that differ",
        ),
        ({"nothing": w}, tmp_path / "model", "no parameter 'nothing.weight'"),
    ):
        with pytest.raises(UserError, match=f"^save_quantized: .*{says}"):
            save_quantized(model, tokenizer(), Quantized(dict(weights)), folder)
    llmfast.patch(model, ops="norm")
    with pytest.raises(UserError, match="patched"):
        save_quantized(model, tokenizer(), found, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (full / "mine").read_text() == "mine"
