"""Folders of GPTQ, AWQ and compressed-tensors: loaded, patched, and refused in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmfast
from generating import batch, tokenizer
from llmfast.errors import UserError
from llmfast.quantization.driver import simulate
from llmfast.weights.model_weights import quantized_weights_of
from quantized_folders import NAMES, change_config, logits, quantized_folder, simulated
from tiny_models import make

GREEDY = {"max_new_tokens": 8, "do_sample": False}


def refused(folder, says):
    with pytest.raises(UserError, match=says) as caught:
        llmfast.load(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_gives_the_reference_s_logits(name, tmp_path):
    model = make("Llama")
    folder, found = quantized_folder(tmp_path / "model", model, name)
    wanted, seen = simulated(model, found), []
    loaded = llmfast.load(folder, device="cpu", on_progress=lambda *args: seen.append(args))
    assert torch.equal(logits(loaded.model), wanted)
    assert not loaded.model.training and loaded.model.dtype == torch.float32
    assert loaded.tokenizer("a").input_ids == tokenizer()("a").input_ids
    assert seen[-1] == ("loading weights", 14, 14)
    read = quantized_weights_of(loaded.model)
    assert read.keys() == found.weights.keys()
    for layer, w in found.weights.items():
        assert torch.equal(read[layer].codes, w.codes)
        assert torch.equal(read[layer].scales, w.scales)


def test_a_folder_in_parts(tmp_path):
    model = make("Llama")
    folder, found = quantized_folder(tmp_path / "model", model, "gptq symmetric v1")
    wanted, state = simulated(model, found), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    assert torch.equal(logits(llmfast.load(folder, device="cpu").model), wanted)
    (folder / "gptq_model-4bit-32g.safetensors").unlink()
    halves = {"a.safetensors": list(state)[::2], "b.safetensors": list(state)[1::2]}
    for file, names in halves.items():
        save_file({name: state[name] for name in names}, folder / file)
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    save_file(other, folder / "consolidated.safetensors")
    where = {name: file for file, names in halves.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert torch.equal(logits(llmfast.load(folder, device="cpu").model), wanted)
    (folder / "b.safetensors").unlink()
    refused(folder, "No such file")


@pytest.mark.parametrize("name", NAMES)
def test_patch_runs_a_loaded_folder_in_its_own_bits(name, tmp_path):
    device = torch.device("cpu")  # in float32
    model = make("Llama")
    folder, found = quantized_folder(tmp_path / "model", model, name)
    loaded = llmfast.load(folder, device="cpu").model
    report = llmfast.patch(loaded, ops="generate", weights="own")
    bits = "eight" if name == "saved int8" else "four"
    assert any(f"8 of their 8 linear layers in {bits} bits" in note for note in report.notes)
    assert "weights: 14 linear layers were loaded quantized." in report.notes
    with simulate(model, found):
        wanted = model.generate(**batch(device), **GREEDY)
    assert torch.equal(loaded.generate(**batch(device), **GREEDY), wanted)
    llmfast.unpatch(loaded)
    assert quantized_weights_of(loaded) is not None  # they are the model's own
    with pytest.raises(UserError, match="has quantized weights already"):
        llmfast.patch(loaded, weights="int4")


def test_on_the_cpu_loaded_weights_run_dequantized_unless_asked_for(tmp_path):
    folder, _ = quantized_folder(tmp_path / "model", make("Llama"), "awq")
    loaded = llmfast.load(folder, device="cpu").model
    wanted = logits(loaded)
    report = llmfast.patch(loaded, ops="generate")
    assert any("run dequantized: on the CPU that is faster" in n for n in report.notes)
    assert loaded.generate.args[1].step_model.packed_bytes == 0
    assert torch.equal(logits(loaded), wanted)
    llmfast.unpatch(loaded)
    llmfast.patch(loaded, ops="generate", weights="own")
    assert loaded.generate.args[1].step_model.packed_bytes > 0
    llmfast.unpatch(loaded)
    llmfast.patch(loaded, ops="generate")  # weights='own' does not outlive a patch
    assert loaded.generate.args[1].step_model.packed_bytes == 0
    with pytest.raises(UserError, match="not loaded with quantized weights"):
        llmfast.patch(make("Llama"), weights="own")


def test_configs_that_cannot_be_read(tmp_path):
    model = make("Llama")
    folder, _ = quantized_folder(tmp_path / "gptq", model, "gptq symmetric v1")
    for config, says in (
        ({"quant_method": "gptq", "bits": 3}, "bits must be 4 or 8; got 3"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin' cannot be"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv' of AWQ cannot be read"),
        ({"quant_method": "awq", "bits": 8}, "bits of AWQ must be 4"),
        ({"quant_method": "compressed-tensors", "format": "dense"}, "format 'dense' cannot"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "num_bits must be 4"),
    ):
        change_config(folder, quantization_config=config)
        refused(folder, says)
    packed = {"num_bits": 4, "type": "int"}
    groups = {"group_0": {"weights": packed, "input_activations": {"num_bits": 8}}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    change_config(folder, quantization_config=config | {"config_groups": groups})
    refused(folder, "quantized activations")
    groups = {"group_0": {"weights": packed, "input_activations": None}}
    change_config(folder, quantization_config=config | {"config_groups": groups})
    refused(folder, "no layer is quantized")


def test_damaged_layers_are_named(tmp_path):
    folder, _ = quantized_folder(tmp_path / "gptq", make("Llama"), "gptq symmetric v1")
    path, layer = folder / "model.safetensors", "model.layers.1.mlp.up_proj"
    state = load_file(path)
    for key, change, says in (
        ("scales", None, "scales is missing"),
        ("scales", lambda t: t[:, :-8], "scales must have 96 columns"),
        ("scales", lambda t: torch.full_like(t, torch.inf), "scales must be finite"),
        ("qweight", lambda t: t.float(), "qweight must be int32"),
    ):
        changed = dict(state)
        tensor = changed.pop(f"{layer}.{key}")
        if change is not None:
            changed[f"{layer}.{key}"] = change(tensor).contiguous()
        save_file(changed, path, metadata={"format": "pt"})
        refused(folder, f"{layer}: .*{says}")
    changed = {key: t for key, t in state.items() if "up_proj" not in key}
    save_file(changed, path, metadata={"format": "pt"})
    refused(folder, "2 weights are missing, the first is 'model.layers.0.mlp.up_proj.weight'")
    save_file(state | {f"{layer}.bias": torch.ones(96)}, path, metadata={"format": "pt"})
    refused(folder, "up_proj.bias' has no place in LlamaForCausalLM")
    save_file(state | {f"{layer}.bias": torch.zeros(96)}, path, metadata={"format": "pt"})
    llmfast.load(folder, device="cpu")  # some programs write biases of zeros
