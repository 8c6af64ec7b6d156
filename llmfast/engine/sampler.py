"""From logits and requests to tokens: the parameters of each row, as the kernel wants them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from llmfast_kernels import sample_tokens

from .logits import process, score
from .penalties import Counts
from .request import Answer
from .sampling_params import SamplingParams


class SampledToken(NamedTuple):
    """What a row got."""

    token: int
    status: int  # of llmfast_kernels.sample_tokens; 0: the token is good
    logprob: float | None
    top: list[tuple[int, float]]  # the most likely tokens, as many as were asked for
    error: str | None = None  # what a logits processor did wrong; the token means nothing then


def drawing(answers: Sequence[Answer]) -> tuple[bool, bool]:
    """Whether one of some answers is drawn, and whether one of them with filters."""
    drawn = [params for params in (answer.params for answer in answers) if not params.greedy]
    return bool(drawn), any(params.filters for params in drawn)


@torch.no_grad()
def choose(logits: torch.Tensor, answers: Sequence[Answer], counts: Counts) -> list[SampledToken]:
    """Choose a token for each answer from its row of ``logits``.

    A row depends on its own logits, parameters, tokens, seed and number alone.

    Args:
        logits: ``[len(answers), vocabulary]``, raw.
        counts: the same one in each step.

    Raises:
        whatever :func:`llmfast_kernels.sample_tokens` raises.
    """
    params = [answer.params for answer in answers]
    raw = logits
    logits, errors = process(raw, answers)
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
    answers: Sequence[Answer], params: Sequence[SamplingParams], device: torch.device
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
    answers: Sequence[Answer],
    params: Sequence[SamplingParams],
    logits: torch.Tensor,
    counts: Counts,
) -> dict[str, torch.Tensor]:
    penalised = [p.penalizes for p in params]
    if not any(penalised):
        return {}
    sequences = [a.sequence if wants else None for a, wants in zip(answers, penalised, strict=True)]
    seen, counted = counts.of(sequences, logits.shape[1], logits.device)
    return {
        "repetition_penalty": _column(params, lambda p: p.repetition_penalty, logits.device),
        "presence_penalty": _column(params, lambda p: p.presence_penalty, logits.device),
        "frequency_penalty": _column(params, lambda p: p.frequency_penalty, logits.device),
        "prompt_seen": seen,
        "output_counts": counted,
    }


def _bias(
    answers: Sequence[Answer], params: Sequence[SamplingParams], logits: torch.Tensor
) -> torch.Tensor | None:
    """The bias of each row: what may not follow is at -inf."""
    biases: dict[int, dict[int, float]] = {}
    for row, (answer, p) in enumerate(zip(answers, params, strict=True)):
        bias = dict(p.logit_bias or {})
        if answer.position < p.min_tokens:
            bias |= dict.fromkeys(answer.stop_tokens, -math.inf)
        if answer.bad_words:
            bias |= dict.fromkeys(_ends_of_bad_words(answer), -math.inf)
        if bias or p.allowed_token_ids or answer.matcher is not None:
            biases[row] = bias
    if not biases:
        return None
    result = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
    for row, bias in biases.items():
        if allowed := params[row].allowed_token_ids:
            result[row] = -math.inf
            result[row, torch.tensor(allowed, device=logits.device)] = 0
        if bias:
            tokens = torch.tensor(list(bias), device=logits.device)
            result[row, tokens] += torch.tensor(list(bias.values()), device=logits.device)
        matcher = answers[row].matcher
        if matcher is not None:
            result[row, matcher.masked_tokens().to(logits.device)] = -math.inf
    return result


def _ends_of_bad_words(answer: Answer) -> list[int]:
    """Tokens that would complete one."""
    sequence, ends = answer.sequence, []
    for *head, last in answer.bad_words:
        if len(head) <= answer.num_output and (not head or sequence.tokens[-len(head) :] == head):
            ends.append(last)
    return ends


def _column(
    params: Sequence[SamplingParams],
    value: Callable[[SamplingParams], float],
    device: torch.device,
) -> torch.Tensor:
    return torch.tensor([value(p) for p in params], dtype=torch.float32, device=device)
