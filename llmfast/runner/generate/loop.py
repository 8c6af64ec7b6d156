"""The decoding loops of ``generate``: tokens sampled on the device, or chosen by the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput, MaxLengthCriteria

from ...errors import UserError
from ..cache import BLOCK_SIZE
from ..results import StepHandle
from .batch import BatchSampling, StaticBatch
from .processors import counts_padding, pad_of, read_sampling

_AHEAD = 2  # steps in flight on a GPU at most


class BatchSource(Protocol):
    """Provides the batch that a call runs in: :class:`.override.GenerateOverride`."""

    def batch_for(self, rows: int, length: int, blocks: int) -> StaticBatch:
        """Return a batch with room for ``rows`` rows of ``length`` tokens in ``blocks`` blocks."""
        ...

    def log_once(self, reason: str) -> None:
        """Log why a call runs transformers' own loop, each reason once."""
        ...


def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    *,
    override: BatchSource,
    **model_kwargs: Any,
) -> Any:
    """Decode a call that transformers has prepared: the loop that the call brings."""
    config = generation_config
    rows, padded = input_ids.shape
    mask = model_kwargs.get("attention_mask")
    mask = (
        torch.ones(rows, padded, dtype=torch.bool, device="cpu")
        if mask is None
        else mask.cpu().bool()
    )
    if not bool(mask[:, -1:].all() & (mask[:, 1:] >= mask[:, :-1]).all()):
        override.log_once("the attention mask is not one of left padding")
        return type(model)._sample(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            config,
            synced_gpus,
            streamer,
            **model_kwargs,
        )
    host_ids = input_ids.cpu()
    lengths = mask.sum(1).tolist()
    max_length = min(c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria)
    padding = [padded - length for length in lengths]
    sampling = read_sampling(config, logits_processor, stopping_criteria, padded, padding)
    wants_dict = config.return_dict_in_generate
    if wants_dict and (config.output_scores or config.output_logits):
        sampling = None
    new_tokens = max(max_length - padded, 1)
    longest = max(lengths) + new_tokens
    blocks = sum(-(-(length + new_tokens) // BLOCK_SIZE) for length in lengths)
    batch = override.batch_for(rows, longest, blocks)
    seeds = padding_seen = None
    if config.do_sample and sampling is not None:
        # the same after the same torch.manual_seed
        seeds = torch.randint(2**63 - 1, (rows,), device="cpu")
    if counts_padding(logits_processor):
        padding_seen = ((~mask).nonzero()[:, 0], host_ids[~mask])
    try:
        first = batch.start(
            host_ids[mask],
            lengths,
            new_tokens,
            sampling,
            seeds,
            also_seen=padding_seen,
        )
        if sampling is None:
            return _host_loop(
                batch, first, input_ids, logits_processor, stopping_criteria, config, streamer
            )
        tokens = device_loop(batch, first, new_tokens, sampling, streamer)
    finally:
        batch.end()
    if streamer is not None:
        streamer.end()
    sequences = torch.cat([input_ids, tokens.to(input_ids.device)], dim=1)
    return GenerateDecoderOnlyOutput(sequences=sequences) if wants_dict else sequences


def device_loop(
    batch: StaticBatch, first: StepHandle, new_tokens: int, sampling: BatchSampling, streamer: Any
) -> torch.Tensor:
    """Step until every row is done, and return the tokens ``[rows, steps]``.

    On a GPU the host reads the tokens of a step while the next one runs.
    """
    in_flight = deque([first])
    stops = torch.tensor(sampling.stop_tokens, device="cpu")
    done = torch.zeros(first.num_sampled, dtype=torch.bool, device="cpu")
    columns: list[torch.Tensor] = []
    ahead = _AHEAD if batch.device.type == "cuda" else 1
    for launched in range(1, new_tokens + 1):
        while in_flight and (len(in_flight) >= ahead or launched == new_tokens):
            result = batch.collect(in_flight.popleft())
            if result.status is not None:
                _refuse(result.status != 0)
            column = result.tokens
            columns.append(column)
            if streamer is not None:
                streamer.put(column)
            done |= torch.isin(column, stops)
            if bool(done.all()):
                return torch.stack(columns, dim=1)
        if launched < new_tokens:
            in_flight.append(batch.step())
    return torch.stack(columns, dim=1)


def _host_loop(
    batch: StaticBatch,
    handle: StepHandle,
    input_ids: torch.Tensor,
    processors: Any,
    criteria: Any,
    config: GenerationConfig,
    streamer: Any,
) -> Any:
    """Step with the user's processors and criteria between the steps, as in transformers' loop."""
    rows = len(input_ids)
    has_stops = any(hasattr(c, "eos_token_id") for c in criteria)
    keeps_scores = config.return_dict_in_generate and config.output_scores
    unfinished = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
    all_scores: list[torch.Tensor] = []
    all_logits: list[torch.Tensor] = []
    while True:
        assert handle.logits is not None
        logits = handle.logits.to(torch.float32, copy=True)
        scores = processors(input_ids, logits)
        if keeps_scores:
            all_scores.append(scores)
        if config.output_logits:
            all_logits.append(logits)
        weights = torch.softmax(scores, dim=-1) if config.do_sample else scores
        _refuse(weights.isnan().any(-1))
        tokens = weights.multinomial(1)[:, 0] if config.do_sample else weights.argmax(-1)
        if has_stops:
            tokens = torch.where(unfinished, tokens, pad_of(config))
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished &= ~criteria(input_ids, tuple(all_scores) if keeps_scores else None)
        if not bool(unfinished.any()):
            break
        batch.feed(tokens)  # for rows that are done too: their scores may be wanted
        handle = batch.step()
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids,
        scores=tuple(all_scores) if keeps_scores else None,
        logits=tuple(all_logits) if config.output_logits else None,
    )


def _refuse(broken: torch.Tensor) -> None:
    """Raise if a row had no token to choose: bool ``[rows]``."""
    if bool(broken.any()):
        row = int(broken.nonzero()[0])
        raise UserError(f"generate: the logits of row {row} are NaN or infinite, or all are -inf")
