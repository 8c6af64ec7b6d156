"""Verify a whole model: wiring errors do not show in single layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model.shadow import make_shadow
from ..model.sizes import ModelSizes
from ..model.trace import NotTraced
from ..model.verify import (
    Verification,
    cast_floats,
    compare,
    oracle_dtype,
    precise_copy,
    use_eager_experts,
)
from .cache import BLOCK_SIZE, PagedCache
from .step import Chunk, make_step
from .step_model import StepModel

_LENGTHS = (27, 19)  # tokens of the sequences
_STEPS = 2  # of one token, behind the prefill
CHECKED_LENGTH = max(_LENGTHS)


def verify_whole_model(model: PreTrainedModel, ours: StepModel) -> Verification:
    """Compare the logits of ``ours`` with the model's own; restore the model if they differ.

    Raises:
        NotTraced: the logits differ from the model's, or a step raised.
    """
    try:
        verification = check_model(model, ours)
        if not verification.holds:
            raise NotTraced(f"the whole model computes something else: {verification}")
    except BaseException as error:
        ours.restore()
        if isinstance(error, (NotTraced, torch.OutOfMemoryError, KeyboardInterrupt)):
            raise
        lines = str(error).splitlines() or [""]
        raise NotTraced(f"a step raised {type(error).__name__}: {lines[0]}") from error
    return verification


@torch.no_grad()
def check_model(model: PreTrainedModel, ours: StepModel) -> Verification:
    """Compare the logits of a prefill of two sequences and of two decoding steps.

    The oracle is the model one precision up, converted layer by layer, so that it takes the memory
    of one layer only.
    """
    vocabulary = ModelSizes.of(model).vocabulary
    generator = torch.Generator("cpu").manual_seed(1)
    rows = [
        torch.randint(vocabulary, (n,), generator=generator, device="cpu").to(model.device)
        for n in _LENGTHS
    ]

    def logits_of(model: nn.Module) -> torch.Tensor:
        return torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])

    mine = run_sequences(ours, [row.tolist() for row in rows], _STEPS)
    return compare(mine, logits_of(model), logits_of(_precise(model)))


def run_sequences(
    model: StepModel, sequences: Sequence[Sequence[int]], steps: int, prefill: int | None = None
) -> torch.Tensor:
    """Return the logits of all tokens of ``sequences``; the last ``steps`` are decoded one by one.

    Args:
        prefill: most tokens of a prefill chunk; None: one chunk.
    """
    model.resize(max(map(len, sequences)))
    blocks = [-(-len(s) // BLOCK_SIZE) for s in sequences]
    cache = PagedCache(model.layer_caches, sum(blocks), model.device)
    places = [cache.allocate(len(s)) for s in sequences]
    done = [0] * len(sequences)
    parts: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
        chunks, who = [], []
        for i, tokens in enumerate(sequences):
            first = done[i]
            until = len(tokens) - steps
            size = 1 if first >= until else min(until - first, prefill or until)
            if first < len(tokens):
                row = model.admit(max(map(len, sequences)))
                chunks.append(Chunk(tokens[first : first + size], first, places[i], row))
                who.append((i, size))
                done[i] += size
        step = make_step(chunks, cache.block_size, max(blocks), model.device)
        logits = model(step, cache, torch.arange(len(step.token_ids), device=model.device))
        for (i, _), part in zip(who, torch.split(logits, [size for _, size in who]), strict=True):
            parts[i].append(part)
    return torch.cat([torch.cat(p) for p in parts])


def _precise(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model one precision up: each part is converted for the length of its call."""
    twin = make_shadow(model)
    dtype = oracle_dtype(model.dtype)
    use_eager_experts(twin)
    for parent in list(twin.modules()):
        for name, child in list(parent._modules.items()):
            whole = child is not None and (isinstance(parent, nn.ModuleList) or not child._modules)
            if whole and not isinstance(child, nn.ModuleList):
                parent._modules[name] = _Precise(child, dtype)
    return twin


class _Precise(nn.Module):
    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.__dict__["module"] = module  # not a child: its parameters stay out of this module
        self.dtype = dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        precise = precise_copy(self.__dict__["module"], self.dtype)
        return precise(*cast_floats(args, self.dtype), **cast_floats(kwargs, self.dtype))
