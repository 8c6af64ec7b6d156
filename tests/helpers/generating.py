"""A patched model beside its unpatched twin, and inputs for the ``generate`` of both."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LogitsProcessor, PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import llmfast
from tiny_models import make, tokens

EOS = [12, 92]  # each is in the 12 greedy tokens of one row of a batch(); the third row has neither


def make_pair(kind: str, device: torch.device, ops: Any = "all", **changes: Any) -> tuple[Any, Any]:
    model, twin = make(kind, device, **changes), make(kind, device, **changes)
    llmfast.patch(model, ops=ops)
    assert "generate" in vars(model)
    return model, twin


@functools.cache
def shared_pair(device: torch.device, ops: Any = "all") -> tuple[Any, Any]:
    """Make a pair that tests share and leave unchanged, so that calls of all kinds alternate."""
    return make_pair("Llama", device, ops)


def batch(
    device: torch.device,
    padding: tuple[int, ...] = (4, 9, 0),
    length: int = 12,
    side: str = "left",
) -> dict[str, torch.Tensor]:
    """Make token ids, padded with 0, and their attention mask."""
    ids = tokens(len(padding), length, device)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, slice(count) if side == "left" else slice(length - count, None)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def assert_same(ours: Any, theirs: Any) -> None:
    """Assert equal tokens and types, and scores equal but for the order of float32 sums."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        assert torch.equal(ours, theirs)
        return
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, its in ((ours.scores, theirs.scores), (ours.logits, theirs.logits)):
        assert type(mine) is type(its)
        for a, b in zip(mine or (), its or (), strict=True):
            scale = float(b[b.isfinite()].abs().max())
            torch.testing.assert_close(a, b, rtol=0, atol=400 * 2**-24 * scale)


def check(model: Any, twin: Any, *args: Any, **kwargs: Any) -> Any:
    """Assert that both give the same, each with its own copy of the arguments."""
    torch.manual_seed(5)
    theirs = twin.generate(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    torch.manual_seed(5)
    ours = model.generate(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    assert_same(ours, theirs)
    return ours


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.chunks: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.chunks.append((value.device.type, value.dtype, value.tolist()))

    def end(self) -> None:
        self.chunks.append("end")


class NoRepeat(LogitsProcessor):
    """A processor that masks the last token in place, as some processors do."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter_(1, input_ids[:, -1:], -torch.inf)


class StopAtEven(StoppingCriteria):
    """A criterion met while a row's last token is even: without an eos, not for good."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return input_ids[:, -1] % 2 == 0


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token per byte."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet())[:101])}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
