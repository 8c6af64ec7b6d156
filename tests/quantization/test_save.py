"""Folders of each format: written, loaded, patched; and what is refused, with no half folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import llmfast
from generating import batch, tokenizer
from llmfast.errors import UserError
from llmfast.quantization import save
from llmfast.quantization.driver import quantize, simulate
from llmfast.quantization.methods import GptqSettings
from llmfast.quantization.save import save_quantized
from llmfast.weights.checkpoint_formats import to_awq, to_gptq
from llmfast.weights.model_weights import quantized_weights_of
from llmfast.weights.quantized import Quantized, QuantizedWeight
from tiny_models import make, tokens

IDS = tokens(2, 20)
CALIBRATION = tokens(8, 64)
ACT_ORDER = GptqSettings(act_order=True, static_groups=False)
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def simulated(model, found):
    with simulate(model, found):
        return logits(model)


def write(folder, model, layers, config):
    """A folder as another program writes it: ``layers`` are each layer's tensors."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    change_config(folder, quantization_config=config)
    state = {name: p.clone() for name, p in model.state_dict().items()}
    for name, tensors in layers.items():
        del state[f"{name}.weight"]
        state |= {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def find(model, name):
    options = {
        "gptq act-order": {"method": "gptq", "gptq_settings": ACT_ORDER, "symmetric": False},
        "gptq symmetric": {"method": "gptq", "symmetric": True},
        "awq": {"symmetric": False},
        "int8": {"weights": "int8", "symmetric": False},
        "per channel": {"group_size": None},
    }[name]
    return quantize(model, calibration=CALIBRATION, **({"group_size": 32} | options))


def quantized_folder(folder, model, name):
    """The folder, and what is in it."""
    if name.startswith("gptq"):
        found = find(model, name[:-3] if name.endswith((" v1", " v2")) else name)
        version = 2 if name.endswith("v2") else 1
        config = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 32,
            "desc_act": "act-order" in name,
            "checkpoint_format": "gptq_v2" if version == 2 else "gptq",
        }
        layers = {key: to_gptq(w, version=version) for key, w in found.weights.items()}
        return write(folder, model, layers, config), found
    if name == "awq":
        found = find(model, name)
        config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM"}
        return write(
            folder, model, {key: to_awq(w) for key, w in found.weights.items()}, config
        ), found
    found = find(model, name.removeprefix("saved "))
    save_quantized(model, tokenizer(), found, folder)
    return folder, found


NAMES = [
    "gptq act-order v1",
    "gptq act-order v2",
    "gptq symmetric v1",
    "awq",
    "saved gptq act-order",
    "saved gptq symmetric",
    "saved awq",
    "saved per channel",
    "saved int8",
]


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
    llmfast.patch(loaded, ops="generate")  # asked for once is not asked for twice
    assert loaded.generate.args[1].step_model.packed_bytes == 0
    with pytest.raises(UserError, match="not loaded with quantized weights"):
        llmfast.patch(make("Llama"), weights="own")


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


def test_what_is_written_is_what_other_engines_look_for(tmp_path):
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


# --------------------------------------------------------------------------------- what is refused


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


def test_what_cannot_be_saved(tmp_path):
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


def refused(folder, says):
    with pytest.raises(UserError, match=says) as caught:
        llmfast.load(folder, device="cpu")
    assert "\n" not in str(caught.value)


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
