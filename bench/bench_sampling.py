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

from llmfast_kernels.sampling import sample_tokens

VOCAB = 128256
PROMPT, OUTPUT = 1024, 512  # tokens that penalties count
TEMPERATURE, TOP_K, TOP_P, MIN_P = 0.8, 50, 0.9, 0.02

each_batch = pytest.mark.parametrize("batch", [1, 64], ids=lambda n: f"batch{n}")


def case(batch, filters):
    return f"vocab={VOCAB} batch={batch} filters={filters}"


def random_logits(batch):
    return 3 * torch.randn(batch, VOCAB, device="cuda")


def per_row(batch, value, dtype=torch.float32):
    return torch.full((batch,), value, device="cuda", dtype=dtype)


def drawing(batch):
    return {
        "temperature": per_row(batch, TEMPERATURE),
        "seeds": torch.arange(batch, device="cuda"),
        "positions": torch.arange(batch, device="cuda"),
    }


def filters(batch):
    return drawing(batch) | {
        "top_k": per_row(batch, TOP_K, torch.int32),
        "top_p": per_row(batch, TOP_P),
        "min_p": per_row(batch, MIN_P),
    }


def seen(batch):
    """Which tokens a prompt has, and how often each is in the output, of each row."""
    prompt = torch.zeros(batch, VOCAB, device="cuda", dtype=torch.bool)
    prompt.scatter_(1, torch.randint(VOCAB, (batch, PROMPT), device="cuda"), True)
    counts = torch.zeros(batch, VOCAB, device="cuda", dtype=torch.int32)
    output = torch.randint(VOCAB, (batch, OUTPUT), device="cuda")
    return prompt, counts.scatter_add_(1, output, torch.ones_like(output, dtype=torch.int32))


def softmax_multinomial(logits):
    return torch.softmax(logits / TEMPERATURE, dim=-1).multinomial(1)


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


@pytest.mark.parametrize("batch", [1, 8, 64, 256], ids=lambda n: f"batch{n}")
def bench_everything(bench_op, batch):
    """Penalties, temperature, all filters and the draw; no peer does all of it."""
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


@each_batch
def bench_greedy(bench_op, batch):
    bench_op(
        "sampling",
        case(batch, "greedy"),
        {"llmfast": sample_tokens, "torch": lambda logits: logits.argmax(dim=-1)},
        lambda: (random_logits(batch),),
    )
