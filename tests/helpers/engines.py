"""Engines on a tiny model in float64, and the check that they are empty afterwards."""

from __future__ import annotations

import functools
from typing import Any

import torch

from block_books import check_books
from generating import tokenizer
from llmfast import LLM, AsyncLLM
from llmfast.runner.executor import Executor
from tiny_models import make, tokens

LONG = tokens(1, 60)[0].tolist()
VOCABULARY = 101


@functools.cache
def model_of(kind: str = "Llama") -> Any:
    """Make the model on the CPU: float64 has no kernels, so the references judge the engine."""
    return make(kind).double()


def options(**changes: Any) -> dict[str, Any]:
    return {"num_blocks": 40, "block_size": 16, **changes}


def engine(**changes: Any) -> LLM:
    return LLM(changes.pop("model", None) or model_of(), **options(**changes))


def text_engine(**changes: Any) -> LLM:
    """Make an engine with a tokenizer of one byte per token."""
    return engine(tokenizer=tokenizer(), **changes)


def executor_of(llm: LLM | AsyncLLM) -> Executor:
    """Return what runs the engine's steps and has the cache and the graphs."""
    return llm.core.model_runner.executor


def check_empty(llm: LLM | AsyncLLM) -> None:
    """Assert that nothing is left of any request."""
    assert llm.core.idle
    for blocks in llm.core.scheduler.groups:
        check_books(blocks, [])
        assert blocks.num_free == blocks.num_blocks


def logits_of(token_ids: list[int], model: Any = None) -> torch.Tensor:
    """Return the model's own logits, ``[len(token_ids), vocabulary]``."""
    with torch.no_grad():
        return (model or model_of())(torch.tensor([token_ids])).logits[0]
