"""The scheduler's result: the tokens and block copies of one step. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import Sequence


@dataclass
class SchedulerOutput:
    """One step."""

    # tokens to compute of each sequence
    num_scheduled_tokens: dict[Sequence, int] = field(default_factory=dict)
    # blocks to copy before the step: (cache group, source, target)
    block_copies: list[tuple[int, int, int]] = field(default_factory=list)
    # of prompts with log-probabilities, how many of a chunk's first tokens have their logits scored
    num_prompt_logits: dict[Sequence, int] = field(default_factory=dict)
