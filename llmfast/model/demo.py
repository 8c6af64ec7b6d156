"""A demonstration: the first block of a model through the Triton kernels."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from .patch import swap_in, swap_out
from .report import Report
from .swap import Operations


def launchers() -> Operations:
    """Return the kernels' launchers, which take CPU tensors under Triton's interpreter."""
    from llmfast_kernels.activation.kernel import (
        launch_gelu_mul,
        launch_gelu_tanh_mul,
        launch_silu_mul,
    )
    from llmfast_kernels.attention.kernel import launch_flash_attention
    from llmfast_kernels.norm.kernel import launch_rms_norm

    return Operations(
        rms_norm=launch_rms_norm,
        silu_mul=launch_silu_mul,
        gelu_tanh_mul=launch_gelu_tanh_mul,
        gelu_mul=launch_gelu_mul,
        flash_attention=launch_flash_attention,
    )


def verify_first_block(model: PreTrainedModel, token_ids: torch.Tensor) -> Report:
    """Run the first block of ``model`` on ``token_ids`` through the Triton kernels.

    Each kernel is verified as in :func:`llmfast.patch`; then the block's output on the real
    prompt is compared with the original block's, and the largest difference is noted.

    Args:
        model: float32 or float16, on a GPU or on the CPU under Triton's interpreter. Its other
            blocks are removed while this runs.
        token_ids: int64 [1, length].
    """
    backbone = model.base_model
    blocks = backbone.layers
    backbone.layers = nn.ModuleList(blocks[:1])
    try:
        with torch.no_grad():
            original = backbone(input_ids=token_ids, use_cache=False).last_hidden_state
            report = swap_in(model, launchers())
            try:
                ours = backbone(input_ids=token_ids, use_cache=False).last_hidden_state
            finally:
                swap_out(model)
    finally:
        backbone.layers = blocks
    difference = float((ours - original).abs().max() / original.abs().max())
    report.notes = [
        f"First block on the prompt's {token_ids.shape[1]} tokens: largest difference from "
        f"PyTorch's output {difference:.1e} of its largest value."
    ]
    return report
