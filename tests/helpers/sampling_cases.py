"""Inputs of the sampling tests, and the comparison of kernels and reference."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmfast_kernels.sampling.kernel import launch_sample_tokens
from llmfast_kernels.sampling.reference import (
    sample_tokens_reference,
)

VOCABS = [1, 7, 128, 1009]
FILTERS = {  # as in transformers: None is off
    "none": (None, None, None),
    "top-k": (5, None, None),
    "top-p": (None, 0.75, None),
    "min-p": (None, None, 0.05),
    "top-k top-p": (20, 0.875, None),
    "top-p min-p": (None, 0.9375, 0.1),
    "all": (40, 0.96875, 0.02),
    "one by top-k": (1, None, None),
    "one by top-p": (None, 0.0, None),
    "one by min-p": (None, None, 1.0),
    "more than there is": (5000, 0.999, 1e-9),
}
INF, NAN = float("inf"), float("nan")

on_cuda = torch.cuda.is_available()
each_filter = pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
each_vocab = pytest.mark.parametrize("n_vocab", VOCABS)


def random_logits(n_rows, n_vocab, seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(n_rows, n_vocab, generator=gen)).to(dtype)


def per_row(value, n_rows, dtype=torch.float32):
    return None if value is None else torch.full((n_rows,), value, dtype=dtype)


def filter_tensors(filters, n_rows):
    k, p, m = filters
    return {
        "top_k": per_row(k, n_rows, torch.int32),
        "top_p": per_row(p, n_rows),
        "min_p": per_row(m, n_rows),
    }


def transformers_filters(filters):
    warpers = zip((TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper), filters, strict=True)
    return LogitsProcessorList([warper(value) for warper, value in warpers if value is not None])


def draw_options(n_rows, temperature=1.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return {
        "temperature": torch.full((n_rows,), temperature),
        "seeds": torch.randint(-(2**62), 2**62, (n_rows,), generator=gen),
        "positions": torch.randint(0, 2**40, (n_rows,), generator=gen),
    }


def everything(n_rows, n_vocab, seed=0):
    """Return every option, each row with another mixture of greedy, off and on."""
    gen = torch.Generator().manual_seed(seed)

    def pick(*values, dtype=torch.float32):
        return torch.tensor([values[i % len(values)] for i in range(n_rows)], dtype=dtype)

    return {
        **draw_options(n_rows, seed=seed),
        "temperature": pick(0.7, 1.0, 0.0, 1.5, 0.2, 3.0),
        "top_k": pick(0, 5, 3, 50, 1, 20000, -1, dtype=torch.int32),
        "top_p": pick(0.9, 1.0, 0.5, 0.8, 0.0),
        "min_p": pick(0.0, 0.05, 0.3),
        "repetition_penalty": pick(1.3, 1.0, 0.8),
        "presence_penalty": pick(0.5, 0.0),
        "frequency_penalty": pick(0.2, -0.1, 0.0),
        "prompt_seen": torch.rand(n_rows, n_vocab, generator=gen) < 0.3,
        "output_counts": torch.randint(0, 3, (n_rows, n_vocab), generator=gen, dtype=torch.int32),
        "bias": torch.randn(n_rows, n_vocab, generator=gen),
    }


def moved(options, device):
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}


def check_kernel(logits, device, **options):
    """Assert equal scores bit for bit; exp may differ in its last bits, and sums as little."""
    got = launch_sample_tokens(logits.to(device), **moved(options, device))
    wanted = sample_tokens_reference(logits, **options)
    for name, actual, expected in zip(got._fields, got, wanted, strict=True):
        if expected is None:
            assert actual is None, name
            continue
        assert actual.dtype == expected.dtype, name
        if expected.is_floating_point():
            torch.testing.assert_close(
                actual.cpu(), expected, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name
            )
        else:
            assert actual.tolist() == expected.tolist(), name
    return got
