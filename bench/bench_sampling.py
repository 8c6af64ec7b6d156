"""Sampling against transformers' warpers, and softmax with multinomial, at Llama-3's vocabulary.

pytest bench/bench_sampling.py
"""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from harness import DEVICE, sized
from llmfast_kernels.sampling import sample_tokens

VOCAB = sized(128256, 999)
PROMPT, OUTPUT = sized((1024, 512), (16, 8))  # tokens that penalties count
TEMPERATURE, TOP_K, TOP_P, MIN_P = 0.8, 50, 0.9, 0.02

each_batch = pytest.mark.parametrize("batch", sized([1, 64], [1, 3]), ids=lambda n: f"batch{n}")


def case(batch, filters):
    return f"vocab={VOCAB} batch={batch} filters={filters}"


def random_logits(batch):
    return 3 * torch.randn(batch, VOCAB, device=DEVICE)


def per_row(batch, value, dtype=torch.float32):
    return torch.full((batch,), value, device=DEVICE, dtype=dtype)


def drawing(batch):
    return {
        "temperature": per_row(batch, TEMPERATURE),
        "seeds": torch.arange(batch, device=DEVICE),
        "positions": torch.arange(batch, device=DEVICE),
    }


def filters(batch):
    return drawing(batch) | {
        "top_k": per_row(batch, TOP_K, torch.int32),
        "top_p": per_row(batch, TOP_P),
        "min_p": per_row(batch, MIN_P),
    }


def seen(batch):
    """Return, for each row, the prompt's tokens as a mask and the output's token counts."""
    prompt = torch.zeros(batch, VOCAB, device=DEVICE, dtype=torch.bool)
    prompt.scatter_(1, torch.randint(VOCAB, (batch, PROMPT), device=DEVICE), True)
    counts = torch.zeros(batch, VOCAB, device=DEVICE, dtype=torch.int32)
    output = torch.randint(VOCAB, (batch, OUTPUT), device=DEVICE)
    return prompt, counts.scatter_add_(1, output, torch.ones_like(output, dtype=torch.int32))


def softmax_multinomial(logits):
    return torch.softmax(logits / TEMPERATURE, dim=-1).multinomial(1)


@pytest.mark.impls("llmfast", "torch")
@each_batch
def bench_no_filters(bench_op, batch):
    options = drawing(batch)
    bench_op(
        "sampling",
        case(batch, "none"),
        {
            "llmfast": lambda logits: sample_tokens(logits, **options),
            "torch": softmax_multinomial,
        },
        lambda: (random_logits(batch),),
    )


@pytest.mark.impls("llmfast", "transformers", "torch")
@each_batch
def bench_all_filters(bench_op, batch):
    options = filters(batch)
    warpers = LogitsProcessorList(
        [
            TemperatureLogitsWarper(TEMPERATURE),
            TopKLogitsWarper(TOP_K),
            TopPLogitsWarper(TOP_P),
            MinPLogitsWarper(MIN_P),
        ]
    )
    bench_op(
        "sampling",
        case(batch, "all"),
        {
            "llmfast": lambda logits: sample_tokens(logits, **options),
            "transformers": lambda logits: warpers(None, logits).softmax(dim=-1).multinomial(1),
            "torch": softmax_multinomial,  # without any filter
        },
        lambda: (random_logits(batch),),
    )


@pytest.mark.impls("llmfast")
@pytest.mark.parametrize("batch", sized([1, 8, 64, 256], [1, 3]), ids=lambda n: f"batch{n}")
def bench_everything(bench_op, batch):
    """Time penalties, temperature, all filters and the draw: no peer does all of these."""
    options = filters(batch) | {
        "repetition_penalty": per_row(batch, 1.1),
        "presence_penalty": per_row(batch, 0.5),
        "frequency_penalty": per_row(batch, 0.2),
    }
    bench_op(
        "sampling",
        case(batch, "all") + " penalties=all",
        {
            "llmfast": lambda logits, prompt, counts: sample_tokens(
                logits, prompt_seen=prompt, output_counts=counts, **options
            )
        },
        lambda: (random_logits(batch), *seen(batch)),
    )


@pytest.mark.impls("llmfast", "torch")
@each_batch
def bench_greedy(bench_op, batch):
    bench_op(
        "sampling",
        case(batch, "greedy"),
        {"llmfast": sample_tokens, "torch": lambda logits: logits.argmax(dim=-1)},
        lambda: (random_logits(batch),),
    )
