"""The model and its paged cache: runs the steps that the scheduler plans."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..errors import UserError
from ..model.patch import evaluating
from ..model.trace import NotTraced
from ..runner.cache import PagedCache
from ..runner.model import StepModel, make_step_model
from ..runner.step import Chunk, make_step
from .request import Sequence as Tokens
from .scheduler import Plan

logger = logging.getLogger("llmfast")

CPU_CACHE_BYTES = 2**30  # no GPU's memory is there to be filled
_SAMPLING_COPIES = 8  # of the logits in float32: what a choice with every parameter may hold


class Executor:
    """Runs steps eagerly, on the model's device."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_model_len: int | None,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        utilization: float,
        block_size: int,
        num_blocks: int | None,
    ) -> None:
        """Arguments and errors are those of :class:`.llm.LLM`."""
        longest = _longest(model, max_model_len)
        name = type(model).__name__
        try:
            with torch.inference_mode(False), evaluating(model):
                self._model = make_step_model(model)
        except NotTraced as error:
            raise UserError(f"LLM: {name} cannot be run: {error}") from None
        try:
            if num_blocks is None:
                num_blocks = count_blocks(
                    self._model,
                    block_size=block_size,
                    utilization=utilization,
                    max_model_len=longest,
                    max_num_seqs=max_num_seqs,
                    max_num_batched_tokens=max_num_batched_tokens,
                )
            if max_model_len is None:
                longest = min(longest, num_blocks * block_size)
            self._model.resize(longest)
            # one choice for all requests, so that they can share blocks
            self._first_row = self._model.admit(longest)
            self.cache = _make_cache(self._model, num_blocks, block_size)
        except BaseException as error:
            self._model.restore()
            if isinstance(error, NotTraced):
                raise UserError(f"LLM: {name} cannot be run: {error}") from None
            raise
        self.num_blocks = num_blocks
        self.max_model_len = longest
        self.vocabulary = self._model.vocabulary
        logger.info("llmfast: a cache of %d blocks of %d tokens", num_blocks, block_size)

    def run(self, plan: Plan, ready: Sequence[Tokens]) -> torch.Tensor:
        """Copy what the plan wants copied, then run its step.

        Args:
            ready: those of the plan's sequences whose logits are wanted.

        Returns:
            Logits ``[len(ready), vocabulary]`` of the last token that is computed of each.
        """
        device = self._model.device
        if plan.copies:
            source, target = torch.tensor(plan.copies, device=device).T
            for tensor in (*self.cache.keys, *self.cache.values):
                tensor[target] = tensor[source]
        chunks, last, end = [], {}, 0
        for sequence, count in plan.counts.items():
            start = sequence.computed
            own = sequence.tokens[start : start + count]
            chunks.append(Chunk(own, start, sequence.blocks, self._first_row))
            end += count
            last[sequence] = end - 1
        width = max(len(chunk.blocks) for chunk in chunks)
        step = make_step(chunks, self.cache.block_size, width, device)
        step.max_context_len = max(c.start + len(c.token_ids) for c in chunks)
        rows = torch.tensor([last[s] for s in ready], dtype=torch.int64, device=device)
        return self._model(step, self.cache, rows)

    def close(self) -> None:
        """Let go of the cache, and of what was changed of the user's model."""
        device = self._model.device
        self._model.restore()
        del self._model
        self.cache.keys.clear()  # whoever still has the cache, has no memory of it
        self.cache.values.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _longest(model: PreTrainedModel, wanted: int | None) -> int:
    made_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if made_for is not None and wanted is not None and wanted > made_for:
        raise UserError(f"LLM: max_model_len is {wanted}; the model was made for {made_for} tokens")
    longest: int = wanted or made_for or 2048
    return longest


def _make_cache(model: StepModel, num_blocks: int, block_size: int) -> PagedCache:
    try:
        return PagedCache(model.cache_shapes, num_blocks, model.dtype, model.device, block_size)
    except RuntimeError:  # the allocator's
        raise UserError(
            f"LLM: a cache of {num_blocks} blocks of {block_size} tokens does not fit in the "
            f"memory of {model.device}; lower num_blocks or gpu_memory_utilization"
        ) from None


def count_blocks(
    model: StepModel,
    *,
    block_size: int,
    utilization: float,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> int:
    """Blocks that fit beside the weights and the largest step.

    On a GPU the largest step is run once and its peak taken from ``utilization`` of all memory,
    as is what others hold. On the CPU it is what ``max_num_seqs`` sequences of ``max_model_len``
    may need, 1 GiB at most.

    Raises:
        UserError: not one block fits.
    """
    heads = sum(2 * heads * dim for heads, dim in model.cache_shapes)
    each = heads * block_size * model.dtype.itemsize
    if model.device.type != "cuda":
        wanted = max_num_seqs * -(-max_model_len // block_size)
        return max(1, min(wanted, CPU_CACHE_BYTES // each))
    device = model.device
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _largest_step(model, block_size, max_model_len, max_num_seqs, max_num_batched_tokens)
    activations = torch.cuda.max_memory_allocated(device) - before
    sampling = _SAMPLING_COPIES * max_num_seqs * model.vocabulary * 4
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    room = int(free - (1 - utilization) * total - activations - sampling)
    if room < each:
        raise UserError(
            f"LLM: no memory is left for the cache: {free / 2**30:.1f} GiB of "
            f"{total / 2**30:.1f} are free, a step takes {(activations + sampling) / 2**30:.1f} "
            f"and gpu_memory_utilization is {utilization}; raise it, or lower max_num_seqs or "
            "max_num_batched_tokens"
        )
    return room // each


def _largest_step(
    model: StepModel, block_size: int, max_model_len: int, max_num_seqs: int, tokens: int
) -> None:
    model.resize(max_model_len)
    first_row = model.admit(max_model_len)
    chunks = []
    blocks = 0
    while tokens:
        count = min(tokens, max_model_len)
        own = -(-count // block_size)
        chunks.append(Chunk([0] * count, 0, range(blocks, blocks + own), first_row))
        blocks += own
        tokens -= count
    cache = PagedCache(model.cache_shapes, blocks, model.dtype, model.device, block_size)
    table = max(len(chunk.blocks) for chunk in chunks)
    step = make_step(chunks, block_size, table, model.device)
    rows = torch.arange(max_num_seqs, device=model.device) % len(step.token_ids)
    model(step, cache, rows)
