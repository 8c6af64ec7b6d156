"""The quality of a model: perplexity, KL divergence from a reference model, top-1 agreement.

A text is cut into windows, and each window is one forward pass without a cache. Window k starts at
token k * stride and holds ``window`` tokens. Each token is scored once, by the first window that
holds a token before it. So with disjoint windows (``stride == window``) the first token of each
window is only context. With a smaller stride every token but the text's first is scored, most of
them with more context.

Sums are taken in float64 from the model's logits. Intervals are from a seeded bootstrap, over
documents if there are several, else over windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UserError
from ..model.sizes import ModelSizes
from .stats import Estimate, bootstrap_means, percentile_estimate

CHUNK_BYTES = 2**26  # of float64 logits at a time, so that memory does not grow with the vocabulary

Progress = Callable[[int, int], None]  # windows done, windows in total


@dataclass(frozen=True)
class Window:
    """One forward pass: the tokens from ``start`` to ``end`` of a document."""

    document: int
    start: int
    end: int
    score_from: int  # the first token that this window predicts

    @property
    def scored(self) -> int:
        """The number of tokens that this window scores."""
        return self.end - self.score_from


@dataclass(frozen=True)
class Perplexity:
    """The exponential of the mean negative log-likelihood per token."""

    perplexity: Estimate
    tokens: int  # scored tokens
    windows: int


@dataclass(frozen=True)
class Quality:
    """The quality of a model beside its reference, on the same tokens."""

    perplexity: Estimate
    reference_perplexity: Estimate
    perplexity_ratio: Estimate  # the model's over the reference's, paired
    kl: Estimate  # mean KL(reference || model) per token, in nats
    top1_agreement: Estimate  # share of tokens for which both predict the same token
    tokens: int
    windows: int


def cut_windows(lengths: Sequence[int], window: int, stride: int | None = None) -> list[Window]:
    """Cut documents of these lengths into windows, none of them across two documents.

    Raises:
        UserError: window is less than 2, or stride is not in 1 to window.
    """
    stride = window if stride is None else stride
    if window < 2:
        raise UserError(f"window must be at least 2 tokens, got {window}")
    if not 1 <= stride <= window:
        raise UserError(f"stride must be from 1 to the window of {window} tokens, got {stride}")
    windows = []
    for document, length in enumerate(lengths):
        done = 0
        for start in range(0, length, stride):
            end = min(start + window, length)
            score_from = max(done, start + 1)
            if score_from < end:
                windows.append(Window(document, start, end, score_from))
                done = end
            if end == length:
                break
    return windows


def perplexity(
    model: Any,
    ids: torch.Tensor | Sequence[torch.Tensor],
    *,
    window: int,
    stride: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure a causal language model's perplexity on token ids.

    Args:
        model: in eval mode; called as ``model(input_ids=..., use_cache=False).logits``.
        ids: token ids of one text ``(n,)`` or of several documents.
        window: tokens of one forward pass.
        stride: tokens from one window's start to the next. None: ``window``, disjoint windows.
        seed: of the bootstrap.
        progress: is called after each window.

    Raises:
        UserError: a bad window or stride, ids that are not token ids of the model, too few tokens
            for two units of the bootstrap, a model in training mode, logits that hold NaN.
    """
    scores = _score("perplexity", [model], ids, window, stride, progress)
    return Perplexity(_exp(scores, seed, 0), scores.tokens, len(scores.windows))


def compare(
    reference: Any,
    model: Any,
    ids: torch.Tensor | Sequence[torch.Tensor],
    *,
    window: int,
    stride: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Quality:
    """Measure a model beside a reference on the same tokens. Arguments as in :func:`perplexity`.

    The logits of both are held for one window at a time. The models may be on different devices.

    Raises:
        UserError: as in :func:`perplexity`, or vocabularies of different sizes.
    """
    scores = _score("compare", [model, reference], ids, window, stride, progress)
    means = scores.means
    resampled = scores.resample(seed)
    ratio = resampled[:, 0].sub(resampled[:, 1]).exp()
    return Quality(
        perplexity=_exp(scores, seed, 0),
        reference_perplexity=_exp(scores, seed, 1),
        perplexity_ratio=percentile_estimate(math.exp(means[0] - means[1]), ratio),
        kl=percentile_estimate(means[2], resampled[:, 2]),
        top1_agreement=percentile_estimate(means[3], resampled[:, 3]),
        tokens=scores.tokens,
        windows=len(scores.windows),
    )


@dataclass(frozen=True)
class _Scores:
    """Totals of each window, one column per quantity."""

    windows: list[Window]
    sums: torch.Tensor  # [n_windows, n_quantities] float64
    by_document: bool

    @property
    def tokens(self) -> int:
        return sum(window.scored for window in self.windows)

    @property
    def means(self) -> list[float]:
        return [float(total) / self.tokens for total in self.sums.sum(0)]

    def resample(self, seed: int) -> torch.Tensor:
        counts = torch.tensor([window.scored for window in self.windows], dtype=torch.float64)
        sums = self.sums
        if self.by_document:
            document = torch.tensor([window.document for window in self.windows])
            unit = torch.unique(document, return_inverse=True)[1]
            n_units = int(unit.max()) + 1
            sums = torch.zeros(n_units, sums.shape[1], dtype=sums.dtype).index_add_(0, unit, sums)
            counts = torch.zeros(n_units, dtype=counts.dtype).index_add_(0, unit, counts)
        return bootstrap_means(sums, counts, seed=seed)


def _exp(scores: _Scores, seed: int, column: int) -> Estimate:
    resampled = scores.resample(seed)[:, column].exp()
    return percentile_estimate(math.exp(scores.means[column]), resampled)


def _score(
    what: str,
    models: list[Any],
    ids: torch.Tensor | Sequence[torch.Tensor],
    window: int,
    stride: int | None,
    progress: Progress | None,
) -> _Scores:
    documents = [ids] if isinstance(ids, torch.Tensor) else list(ids)
    for model in models:
        _check_model(what, model, window)
    for document in documents:
        _check_ids(what, document, models)
    windows = cut_windows([len(document) for document in documents], window, stride)
    units = {w.document for w in windows} if len(documents) > 1 else windows
    if len(units) < 2:
        raise UserError(
            f"{what}: an interval needs at least 2 windows (of one text) or documents with 2 "
            f"tokens or more; got {len(units)} from {sum(map(len, documents))} tokens with a "
            f"window of {window}"
        )
    sums = []
    for done, part in enumerate(windows, start=1):
        tokens = documents[part.document][part.start : part.end]
        sums.append(_window_sums(what, models, tokens, part))
        if progress is not None:
            progress(done, len(windows))
    return _Scores(windows, torch.stack(sums), by_document=len(documents) > 1)


@torch.no_grad()
def _window_sums(what: str, models: list[Any], tokens: torch.Tensor, part: Window) -> torch.Tensor:
    """Return a window's totals: each model's negative log-likelihood; of two, KL and agreement."""
    first = part.score_from - part.start  # position of the first scored token in the window
    logits = []
    for model in models:
        input_ids = tokens[None].to(_device(model))
        logits.append(model(input_ids=input_ids, use_cache=False).logits[0, first - 1 : -1])
    if len({rows.shape[-1] for rows in logits}) > 1:
        raise UserError(
            f"{what}: model and reference must have one vocabulary, got logits of "
            f"{logits[0].shape[-1]} and {logits[1].shape[-1]} tokens"
        )
    device = logits[0].device
    targets = tokens[first:].to(device)
    totals = torch.zeros(len(models) + (2 if len(models) == 2 else 0), dtype=torch.float64)
    for rows in _chunks(len(targets), logits[0].shape[-1]):
        log_probs = [part_[rows].to(device).double().log_softmax(-1) for part_ in logits]
        nll = [-lp.gather(1, targets[rows, None]).sum() for lp in log_probs]
        found = list(nll)
        if len(models) == 2:
            ours, reference = log_probs
            found.append(_kl(reference, ours))
            found.append((ours.argmax(-1) == reference.argmax(-1)).sum().double())
        totals += torch.stack(found).cpu()
    if totals.isnan().any():
        raise UserError(
            f"{what}: the logits hold NaN in the window at token {part.start} of document "
            f"{part.document}"
        )
    return totals


def _kl(reference: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Sum KL(reference || model) over rows of log-probabilities."""
    probability = reference.exp()
    # a token of probability 0 in the reference adds 0, whatever the model's probability is
    terms = torch.where(probability > 0, probability * (reference - model), 0.0)
    return terms.sum()


def _chunks(n_rows: int, vocab: int) -> Iterator[slice]:
    rows = max(1, CHUNK_BYTES // (8 * vocab))
    for start in range(0, n_rows, rows):
        yield slice(start, min(start + rows, n_rows))


def _device(model: Any) -> torch.device:
    """Return the device of a model's input embedding, which takes its token ids."""
    weight: torch.Tensor = model.get_input_embeddings().weight
    return weight.device


def _check_model(what: str, model: Any, window: int) -> None:
    if model.training:
        raise UserError(f"{what}: the model is in training mode; call model.eval() first")
    longest = ModelSizes.of(model).context_length
    if longest is not None and window > longest:
        raise UserError(
            f"{what}: window must be at most the model's context of {longest} tokens, got {window}"
        )


def _check_ids(what: str, ids: torch.Tensor, models: list[Any]) -> None:
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UserError(
            f"{what}: ids must be a vector of integers (or a list of such), got shape "
            f"{tuple(ids.shape)} of {ids.dtype}"
        )
    vocab = min(ModelSizes.of(model).vocabulary for model in models)
    if len(ids) and not (0 <= int(ids.min()) and int(ids.max()) < vocab):
        raise UserError(
            f"{what}: ids must be from 0 to {vocab - 1}, the model's vocabulary; got "
            f"{int(ids.min())} to {int(ids.max())}"
        )
