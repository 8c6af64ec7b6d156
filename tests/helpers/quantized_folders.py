"""Folders with quantized weights in each format, written as other programs write them."""

import json

import torch
from safetensors.torch import save_file

from generating import tokenizer
from llmfast.quantization.driver import quantize, simulate
from llmfast.quantization.methods import GptqSettings
from llmfast.quantization.save import save_quantized
from llmfast.weights.checkpoint_formats import to_awq, to_gptq
from tiny_models import tokens

IDS = tokens(2, 20)
CALIBRATION = tokens(8, 64)
ACT_ORDER = GptqSettings(act_order=True, static_groups=False)

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


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def simulated(model, found):
    with simulate(model, found):
        return logits(model)


def write(folder, model, layers, config):
    """Write a folder as another program does; ``layers`` has the tensors of each layer."""
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
    """Write a folder of format ``name``; return it and the quantized weights."""
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
