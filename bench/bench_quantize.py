"""The time that quantizing takes: four blocks of the Llama-3.1-8B shape, random weights and tokens.

pytest bench/bench_quantize.py

All blocks take equally long, so 32 take eight times as long as four. The memory beside the model is
that of one block.
"""

import copy
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmfast
from harness import DEVICE, ON_GPU, sized
from llmfast.measure.shapes import config_of

SHAPE, BLOCKS, GROUP_SIZE = sized(("llama-3.1-8b", 4, 128), ("smollm2-135m", 1, 64))
SEQUENCES, WINDOW = sized((128, 2048), (8, 256))  # of the calibration


def make_model(shape, blocks, device):
    config = copy.deepcopy(config_of(shape))
    config.num_hidden_layers = blocks
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def quantize(model, method, sequences, window):
    tokens = torch.randint(model.config.vocab_size, (sequences, window))
    calibration = None if method == "nearest" else tokens
    return llmfast.quantize(
        model, weights="int4", method=method, group_size=GROUP_SIZE, calibration=calibration
    )


@pytest.mark.parametrize("method", ["nearest", "gptq", "awq"])
def bench_quantize(bench_once, method):
    device = torch.device(DEVICE)
    model = make_model(SHAPE, BLOCKS, device)
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    quantize(model, method, SEQUENCES, WINDOW)
    peak = {}
    if ON_GPU:
        torch.cuda.synchronize()
        peak["peak_over_weights_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    seconds = time.perf_counter() - started
    key = {"shape": SHAPE, "blocks": BLOCKS, "weights": f"int4-g{GROUP_SIZE}-{method}"}
    if method != "nearest":
        key |= {"sequences": SEQUENCES, "tokens": WINDOW}
    bench_once("quantize", key, seconds, **peak)
    del model
    if ON_GPU:
        torch.cuda.empty_cache()
