"""The work before and after the model in a decoding step, against plain PyTorch.

pytest bench/bench_decode_step.py
"""

import pytest
import torch

from harness import DEVICE, sized
from llmfast_kernels.decode_step import begin_step, end_step
from llmfast_kernels.decode_step.reference import begin_step_reference, end_step_reference

BLOCK_SIZE, MAX_BLOCKS, STOPS = 64, 16, 16


def make_inputs(rows):
    context = torch.full((rows,), 600, device=DEVICE, dtype=torch.int32)
    first_row = torch.zeros(rows, device=DEVICE, dtype=torch.int64)
    table = torch.randint(9999, (rows, MAX_BLOCKS), device=DEVICE, dtype=torch.int32)
    sampled = torch.randint(9999, (rows,), device=DEVICE)
    return context, first_row, table, sampled, torch.zeros_like(context)


def step_of(begin, end):
    """Return a function that begins and ends a step, without forward and sampling."""
    stops = torch.full((STOPS,), -1, device=DEVICE)
    pad = torch.zeros((), device=DEVICE, dtype=torch.int64)

    def run(context, first_row, table, sampled, status):
        positions, slots, context_len = begin(context, first_row, table, block_size=BLOCK_SIZE)
        host_tokens = torch.empty_like(sampled)
        end(
            sampled,
            status,
            context_len,
            stops,
            pad,
            tokens=torch.empty_like(sampled),
            host_tokens=host_tokens,
            context=torch.empty_like(context),
            generated=torch.empty_like(context),
        )
        return positions, slots, host_tokens

    return run


@pytest.mark.impls("llmfast", "eager")
@pytest.mark.parametrize("rows", sized([1, 64, 256], [1, 8]), ids=lambda n: f"{n}rows")
def bench_step(bench_op, rows):
    bench_op(
        "decode_step",
        f"rows={rows} op=begin_step+end_step",
        {
            "llmfast": step_of(begin_step, end_step),
            "eager": step_of(begin_step_reference, end_step_reference),
        },
        lambda: make_inputs(rows),
    )
