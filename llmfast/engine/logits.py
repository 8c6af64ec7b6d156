"""What is done with logits beside sampling, when asked: processors, and scores of prompts."""

from __future__ import annotations

from collections import abc

import torch

from llmfast_kernels import sample_tokens

from .request import Answer, Sequence
from .scheduler import SchedulerOutput


def process(
    logits: torch.Tensor, answers: abc.Sequence[Answer]
) -> tuple[torch.Tensor, dict[int, str]]:
    """Run each answer's own logits processors on its row.

    Args:
        logits: ``[len(answers), vocabulary]``; not changed.

    Returns:
        The processed logits, ``logits`` itself if nobody has processors; and for each row whose
        processor failed, what it did. Such a row is as it was.
    """
    rows = [row for row, answer in enumerate(answers) if answer.params.logits_processors]
    if not rows:
        return logits, {}
    processed, errors = logits.clone(), {}
    for row in rows:
        answer = answers[row]
        changed = logits[row].clone()
        try:
            for processor in answer.params.logits_processors or ():
                changed = processor(answer.sequence.output, changed)
                if not isinstance(changed, torch.Tensor) or changed.shape != logits[row].shape:
                    wanted = f"a tensor of shape {tuple(logits[row].shape)}"
                    raise TypeError(f"it must return {wanted}, got {_kind(changed)}")
            processed[row] = changed
        except Exception as error:  # the user's own code: it may raise anything
            errors[row] = f"a logits processor failed: {type(error).__name__}: {error}"
            processed[row] = logits[row]
    return processed, errors


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return type(value).__name__


@torch.no_grad()
def score(
    logits: torch.Tensor, tokens: abc.Sequence[int], most: abc.Sequence[int]
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Log-probabilities of given tokens, one for each row, and of the most likely ones.

    Args:
        logits: ``[len(tokens), vocabulary]``, raw.
        most: how many of the most likely tokens are wanted of each row.

    Returns:
        For each row the token's log-probability, NaN where the logits hold NaN or infinity, and
        ``(token, log-probability)`` of the most likely ones, in their order.
    """
    if not tokens:
        return []
    exact = logits if logits.dtype == torch.float64 else logits.float()
    wanted = torch.tensor(tokens, device=logits.device)[:, None]
    own = exact.log_softmax(-1).gather(1, wanted)[:, 0].tolist()
    tops: list[list[tuple[int, float]]] = [[] for _ in tokens]
    if any(most):
        sampled = sample_tokens(logits.contiguous(), logprobs=max(most))
        assert sampled.top_tokens is not None and sampled.top_logprobs is not None
        pairs = zip(sampled.top_tokens.tolist(), sampled.top_logprobs.tolist(), strict=True)
        tops = [
            list(zip(ids[:n], values, strict=False))
            for n, (ids, values) in zip(most, pairs, strict=True)
        ]
    return list(zip(own, tops, strict=True))


def limit_scored(plan: SchedulerOutput, most_rows: int) -> dict[Sequence, int]:
    """Lower the plan's counts so that a step gives no more than ``most_rows`` rows of logits.

    Args:
        most_rows: no less than the plan has sequences.

    Returns:
        Of prompts whose log-probabilities are wanted, how many of a chunk's tokens give logits
        that a token of the prompt follows; they are its first ones.
    """
    scored: dict[Sequence, int] = {}
    spare = most_rows - len(plan.num_scheduled_tokens)
    for sequence, count in plan.num_scheduled_tokens.items():
        if not sequence.scores_prompt:
            continue
        assert sequence.scored is not None
        known = sequence.scored - 1 - sequence.computed  # scored before it was preempted
        if known > 0:
            plan.num_scheduled_tokens[sequence] = min(count, known)
            continue
        count = min(count, 1 + spare)
        spare -= count - 1
        plan.num_scheduled_tokens[sequence] = count
        scored[sequence] = min(count, sequence.prompt_len - 1 - sequence.computed)
    return scored
