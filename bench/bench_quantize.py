"""The time quantizing takes: four blocks of the Llama-3.1-8B shape, random weights and tokens.

pytest bench/bench_quantize.py

All blocks take as long, so 32 take eight times that; the memory beside the model is a block's.
"""

import copy
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmfast
from llmfast.measure.figures import make_row
from llmfast.measure.results import format_case
from llmfast.measure.shapes import config_of
from llmfast.measure.stats import Estimate

SHAPE, BLOCKS, GROUP_SIZE = "llama-3.1-8b", 4, 128
SEQUENCES, WINDOW = 128, 2048  # of the calibration


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
def bench_quantize(recorder, method):
    device = torch.device("cuda")
    model = make_model(SHAPE, BLOCKS, device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, started = torch.cuda.memory_allocated(), time.perf_counter()
    quantize(model, method, SEQUENCES, WINDOW)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    key = {"shape": SHAPE, "blocks": BLOCKS, "weights": f"int4-g{GROUP_SIZE}-{method}"}
    if method != "nearest":
        key |= {"sequences": SEQUENCES, "tokens": WINDOW}
    for metric, value in (("s", seconds), ("peak_over_weights_gib", peak)):
        row = make_row(format_case(key), "llmfast", metric, Estimate(value, value, value), 1)
        recorder.add("quantize", row)
    del model
    torch.cuda.empty_cache()
