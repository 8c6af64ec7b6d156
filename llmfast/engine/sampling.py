"""Tokens that the host chooses, and the sampling parameters of each row.

Processors, masks, penalties, biases and log-probabilities need the host. All other tokens are
sampled on the device, inside the step.
"""

from __future__ import annotations

import math
from collections import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from llmfast_kernels import sample_tokens

from ..runner.inputs import SamplingOps
from ..runner.sampling import stop_token_bias
from .penalties import Counts
from .request import Answer
from .sampling_params import SamplingParams


class SampledToken(NamedTuple):
    """The token of a row."""

    token: int
    status: int  # as sample_tokens returns it; 0: the token is good
    logprob: float | None
    top: list[tuple[int, float]]  # the most likely tokens, as many as were asked for
    error: str | None = None  # raised by a logits processor; the token has no meaning then


def sampling_ops(answers: abc.Sequence[Answer]) -> SamplingOps:
    """Return the parts of sampling that some answers need on the device."""
    drawn = [params for params in (answer.params for answer in answers) if not params.greedy]
    return SamplingOps(draws=bool(drawn), filters=any(params.filters for params in drawn))


@torch.no_grad()
def choose(
    logits: torch.Tensor, answers: abc.Sequence[Answer], counts: Counts
) -> list[SampledToken]:
    """Choose a token for each answer from its row of ``logits``.

    A row depends only on its own logits, parameters, tokens, seed and position.

    Args:
        logits: ``[len(answers), vocabulary]``, raw.
        counts: what penalties count, kept from step to step.

    Raises:
        TypeError, ValueError: as :func:`llmfast_kernels.sample_tokens`.
    """
    params = [answer.params for answer in answers]
    raw = logits
    logits, errors = _process(raw, answers)
    wanted = [p.logprobs for p in params if p.logprobs is not None]
    sampled = sample_tokens(
        logits.contiguous(),
        **_drawing(answers, params, logits.device),
        **_penalties(answers, params, logits, counts),
        bias=_bias(answers, params, logits),
        logprobs=max(wanted) if wanted else None,
    )
    tokens, status = sampled.tokens.tolist(), sampled.status.tolist()
    own: list[Any] = [None] * len(answers)
    tops: list[list[tuple[int, float]]] = [[] for _ in answers]
    if sampled.logprobs is not None:
        own = sampled.logprobs.tolist()
    if sampled.top_tokens is not None and sampled.top_logprobs is not None:
        pairs = zip(sampled.top_tokens.tolist(), sampled.top_logprobs.tolist(), strict=True)
        tops = [
            list(zip(ids[: p.logprobs or 0], values, strict=False))
            for p, (ids, values) in zip(params, pairs, strict=True)
        ]
    if logits is not raw:  # log-probabilities are of the raw logits
        rows = [r for r, p in enumerate(params) if p.logits_processors and p.logprobs is not None]
        chosen = [tokens[row] for row in rows]
        found = score(raw[rows], chosen, [params[row].logprobs or 0 for row in rows])
        for row, (logprob, top) in zip(rows, found, strict=True):
            own[row], tops[row] = logprob, top
    failed = [errors.get(row) for row in range(len(answers))]
    return [SampledToken(*row) for row in zip(tokens, status, own, tops, failed, strict=True)]


def _drawing(
    answers: abc.Sequence[Answer], params: abc.Sequence[SamplingParams], device: torch.device
) -> dict[str, torch.Tensor]:
    if all(p.greedy for p in params):
        return {}
    given: dict[str, torch.Tensor] = {
        "temperature": _column(params, lambda p: p.temperature, device),
        "seeds": torch.tensor([a.seed for a in answers], device=device),
        "positions": torch.tensor([a.position for a in answers], device=device),
    }
    if any(p.top_k > 0 for p in params):
        most = 2**31 - 1
        given["top_k"] = torch.tensor([min(p.top_k, most) for p in params], device=device)
    if any(p.top_p < 1 for p in params):
        given["top_p"] = _column(params, lambda p: p.top_p, device)
    if any(p.min_p > 0 for p in params):
        given["min_p"] = _column(params, lambda p: p.min_p, device)
    return given


def _penalties(
    answers: abc.Sequence[Answer],
    params: abc.Sequence[SamplingParams],
    logits: torch.Tensor,
    counts: Counts,
) -> dict[str, torch.Tensor]:
    penalized = [p.penalizes for p in params]
    if not any(penalized):
        return {}
    sequences = [a.sequence if wants else None for a, wants in zip(answers, penalized, strict=True)]
    seen, counted = counts.of(sequences, logits.shape[1], logits.device)
    return {
        "repetition_penalty": _column(params, lambda p: p.repetition_penalty, logits.device),
        "presence_penalty": _column(params, lambda p: p.presence_penalty, logits.device),
        "frequency_penalty": _column(params, lambda p: p.frequency_penalty, logits.device),
        "prompt_seen": seen,
        "output_counts": counted,
    }


def _bias(
    answers: abc.Sequence[Answer], params: abc.Sequence[SamplingParams], logits: torch.Tensor
) -> torch.Tensor | None:
    """Return the bias of each row, -inf at tokens that may not follow; None: there is none."""
    biases: dict[int, dict[int, float]] = {}
    suppressed = [a.position < p.min_tokens for a, p in zip(answers, params, strict=True)]
    for row, (answer, p) in enumerate(zip(answers, params, strict=True)):
        bias = dict(p.logit_bias or {})
        if answer.bad_words:
            bias |= dict.fromkeys(_ends_of_bad_words(answer), -math.inf)
        if bias or p.allowed_token_ids or answer.matcher is not None:
            biases[row] = bias
    if not biases and not any(suppressed):
        return None
    device = logits.device
    result = torch.zeros(logits.shape, dtype=torch.float32, device=device)
    for row, bias in biases.items():
        if allowed := params[row].allowed_token_ids:
            result[row] = -math.inf
            result[row, torch.tensor(allowed, device=device)] = 0
        if bias:
            tokens = torch.tensor(list(bias), device=device)
            result[row, tokens] += torch.tensor(list(bias.values()), device=device)
        matcher = answers[row].matcher
        if matcher is not None:
            result[row, matcher.masked_tokens().to(device)] = -math.inf
    if any(suppressed):
        most = max(len(answer.stop_tokens) for answer in answers)
        stops = [[*a.stop_tokens, *[-1] * (most - len(a.stop_tokens))] for a in answers]
        result += stop_token_bias(
            torch.tensor(stops, dtype=torch.int64, device=device),
            torch.tensor(suppressed, device=device),
            logits.shape[1],
        )
    return result


def _ends_of_bad_words(answer: Answer) -> list[int]:
    """Return the tokens that would complete a bad word."""
    sequence, ends = answer.sequence, []
    for *head, last in answer.bad_words:
        if len(head) <= answer.num_output and (not head or sequence.tokens[-len(head) :] == head):
            ends.append(last)
    return ends


def _column(
    params: abc.Sequence[SamplingParams],
    value: Callable[[SamplingParams], float],
    device: torch.device,
) -> torch.Tensor:
    return torch.tensor([value(p) for p in params], dtype=torch.float32, device=device)


# --------------------------------------------------------- processors and log-probabilities


def _process(
    logits: torch.Tensor, answers: abc.Sequence[Answer]
) -> tuple[torch.Tensor, dict[int, str]]:
    """Run each answer's logits processors on its row.

    Args:
        logits: ``[len(answers), vocabulary]``; not changed.

    Returns:
        The processed logits, ``logits`` itself if no answer has processors; and the error of each
        row whose processor failed. Such a row keeps its logits.
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
    """Return log-probabilities of given tokens, one for each row, and of the most likely ones.

    Args:
        logits: ``[len(tokens), vocabulary]``, raw.
        most: for each row, how many of the most likely tokens are wanted.

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
