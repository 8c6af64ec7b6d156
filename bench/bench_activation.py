"""The gated activations against eager PyTorch and torch.compile, at the width of Llama-3.1-8B.

pytest bench/bench_activation.py
"""

import pytest
import torch

from harness import DEVICE, sized
from llmfast_kernels.activation import gelu_mul, gelu_tanh_mul, silu_mul
from llmfast_kernels.activation.reference import (
    gelu_mul_reference,
    gelu_tanh_mul_reference,
    silu_mul_reference,
)

WIDTH = sized(14336, 64)
DTYPE = torch.bfloat16
OPS = {
    "silu_mul": (silu_mul, silu_mul_reference),
    "gelu_tanh_mul": (gelu_tanh_mul, gelu_tanh_mul_reference),
    "gelu_mul": (gelu_mul, gelu_mul_reference),
}
CASES = [
    ("silu_mul", "merged"),
    ("silu_mul", "apart"),
    ("gelu_tanh_mul", "merged"),
    ("gelu_mul", "merged"),
]


@pytest.mark.impls("llmfast", "eager", "torch.compile")
@pytest.mark.parametrize("tokens", sized([1, 64, 4096, 16384], [1, 8]), ids=lambda n: f"{n}tokens")
@pytest.mark.parametrize(("op", "layout"), CASES)
def bench_activation(bench_op, op, layout, tokens):
    ours, reference = OPS[op]

    def make_inputs():
        widths = [2 * WIDTH] if layout == "merged" else [WIDTH, WIDTH]
        return tuple(torch.randn(tokens, w, device=DEVICE, dtype=DTYPE) for w in widths)

    bench_op(
        "activation",
        f"tokens={tokens} width={WIDTH} dtype=bf16 layout={layout} op={op}",
        {
            "llmfast": ours,
            "eager": reference,
            "torch.compile": torch.compile(reference, dynamic=False),
        },
        make_inputs,
        # reads gate and up, writes the product
        3 * tokens * WIDTH * DTYPE.itemsize,
    )
