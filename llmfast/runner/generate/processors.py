"""Sampling options from the processors and criteria that transformers prepared for a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..resident import MAX_STOP_TOKENS
from .batch import BatchSampling

_OUT = -float("inf")
_SUPPRESSING = 2
_ORDER: dict[type, int] = {
    RepetitionPenaltyLogitsProcessor: 1,
    MinLengthLogitsProcessor: _SUPPRESSING,
    MinNewTokensLengthLogitsProcessor: _SUPPRESSING,
    TemperatureLogitsWarper: 3,
    TopKLogitsWarper: 4,
    TopPLogitsWarper: 5,
    MinPLogitsWarper: 6,
}


def read_sampling(
    config: GenerationConfig,
    processors: Sequence[Any],
    criteria: Sequence[Any],
    padded: int,
    padding: list[int],
) -> BatchSampling | None:
    """Return how to sample on the device; None where the host must choose the tokens.

    Args:
        padded: tokens of each row of the input, with padding.
        padding: padding of each row.
    """
    stops: tuple[int, ...] = ()
    for criterion in criteria:
        if type(criterion) is EosTokenCriteria:
            stops += tuple(criterion.eos_token_id.flatten().tolist())
        elif type(criterion) is not MaxLengthCriteria:
            return None
    if len(stops) > MAX_STOP_TOKENS:
        return None
    options: dict[str, Any] = {"temperature": 1.0 if config.do_sample else 0.0}
    stage = 0
    for processor in processors:
        place = _ORDER.get(type(processor), 0)
        if place <= stage and not (place == stage == _SUPPRESSING):
            return None
        stage = place
        if type(processor) is RepetitionPenaltyLogitsProcessor:
            ignored = processor.prompt_ignore_length
            if isinstance(ignored, int) or (ignored is not None and ignored.tolist() != padding):
                return None
            options["repetition_penalty"] = float(processor.penalty)
        elif place == _SUPPRESSING:
            if set(processor.eos_token_id.flatten().tolist()) != set(stops):
                return None
            least = (
                processor.min_new_tokens - (padded - processor.prompt_length_to_skip)
                if type(processor) is MinNewTokensLengthLogitsProcessor
                else processor.min_length - padded
            )
            options["min_new_tokens"] = max(options.get("min_new_tokens", 0), least)
        elif not config.do_sample or getattr(processor, "filter_value", _OUT) != _OUT:
            return None
        elif type(processor) is TemperatureLogitsWarper:
            options["temperature"] = float(processor.temperature)
        elif type(processor) is TopKLogitsWarper:
            options["top_k"] = int(processor.top_k)
        elif processor.min_tokens_to_keep != 1:
            return None
        elif type(processor) is TopPLogitsWarper:
            options["top_p"] = float(processor.top_p)
        else:
            options["min_p"] = float(processor.min_p)
    return BatchSampling(stop_tokens=stops, pad_token=pad_of(config), **options)


def counts_padding(processors: Sequence[Any]) -> bool:
    """Return whether transformers' repetition penalty is on padding too, as in older versions."""
    penalties = [p for p in processors if type(p) is RepetitionPenaltyLogitsProcessor]
    return any(p.prompt_ignore_length is None for p in penalties)


def pad_of(config: GenerationConfig) -> int:
    """Return the token of a row that is done."""
    pad = config._pad_token_tensor
    return 0 if pad is None else int(pad)
