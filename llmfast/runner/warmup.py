"""Compiling and capturing before the first call, so that no call waits for it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from rich.progress import track
from transformers import PreTrainedModel

from ..errors import UserError
from .cache import BLOCK_SIZE
from .executor import Executor
from .generate.batch import BatchSampling, StaticBatch
from .generate.override import override_of
from .graphs import MIXED_TOKENS
from .inputs import MAX_STEP_TOKENS, SamplingOps

MANY_PROMPTS = 15  # enough rows for the layout that sampling uses for many
# lengths of prompts that between them reach every kernel variant of a prefill
_PROMPTS = (1, 3, 6, 12, 40, 200, 2500)


@dataclass(frozen=True)
class WarmUp:
    """The result of a warm-up, to print: its time, and the memory that is taken from now on."""

    seconds: float
    graphs: int  # CUDA graphs that exist now
    memory: dict[str, int]  # bytes, by purpose

    def __str__(self) -> str:
        parts = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in self.memory.items())
        total = sum(self.memory.values()) / 2**30
        return (
            f"warmed up in {self.seconds:.1f} s: {self.graphs} CUDA graphs\n"
            f"memory: {parts} = {total:.2f} GiB"
        )


def warmup(
    model: PreTrainedModel,
    *,
    batches: Sequence[int] = (1,),
    max_length: int = 1024,
    sampling: bool = False,
    progress: bool = True,
) -> WarmUp:
    """Compile and capture what ``model.generate`` will need, ahead of its first call.

    Calls of up to the largest batch and ``max_length`` then wait for nothing. A kernel that is
    compiled all the same is logged as a warning.

    Args:
        model: patched, its ``generate`` taken over.
        batches: numbers of sequences that calls will have.
        max_length: tokens of a sequence at most, prompt and answer. The cache is made for it.
        sampling: prepare for calls that draw tokens, too, not for greedy ones alone.
        progress: show a bar.

    Raises:
        UserError: ``generate`` is not taken over, or the cache does not fit into the memory.
    """
    override = override_of(model)
    if override is None:
        raise UserError("warmup: generate of this model is not taken over; see llmfast.patch")
    if not batches or min(batches) < 1 or max_length < 2:
        raise UserError(
            f"warmup: batches must be at least 1 and max_length at least 2, "
            f"got {tuple(batches)} and {max_length}"
        )
    with override.entered() as free, torch.inference_mode(False), torch.no_grad():
        reason = override.refresh(model) if free else "it is in the middle of a call"
        if reason is not None:
            raise UserError(f"warmup: generate is transformers' own now: {reason}")
        blocks = max(batches) * -(-max_length // BLOCK_SIZE)
        batch = override.batch_for(max(batches), max_length, blocks)
        samplings = [BatchSampling(), BatchSampling(temperature=1.0)]
        done = warm_up(batch, batches, samplings[: 1 + sampling], progress=progress)
        weights = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
        packed = override.step_model.packed_bytes if override.step_model is not None else 0
    memory = {"weights": packed + sum(s.nbytes() for s in weights.values()), **done.memory}
    return dataclasses.replace(done, memory=memory)


def compile_steps(executor: Executor, max_tokens: int) -> None:
    """Run steps of every kind without graphs, so that no kernel compiles in front of a request.

    No sequence may be running. Nobody reads what the steps leave in the cache.

    Args:
        max_tokens: the tokens of the largest step.
    """
    greedy, draws = SamplingOps(), SamplingOps(draws=True)
    all_ops = (greedy, draws, SamplingOps(draws=True, filters=True))
    small = min(MIXED_TOKENS, max_tokens)
    for tokens, prompts, ops in (
        (max_tokens, 1, greedy),
        *((small, 1, ops) for ops in all_ops),
        *((small, MANY_PROMPTS, ops) for ops in all_ops),
    ):
        longest = max(1, min(executor.max_length, -(-tokens // prompts)))
        counts = [1]  # a row that decodes, and prompts: more than asked for if they get too long
        while (left := tokens - sum(counts)) > 0:
            counts.append(min(left, longest))
        run_step(executor, counts, ops)


def run_step(
    executor: Executor,
    counts: Sequence[int],
    sampling: SamplingOps | None,
    width: int | None = None,
) -> None:
    """Run one step without a graph, of as many rows as there is room for.

    Args:
        counts: tokens of each row. A row of one token decodes: it has a context.
        sampling: None: the step ends at the logits.
        width: blocks per row of the table; None: as many as the longest row takes.
    """
    size = executor.cache.block_size
    starts, blocks = [], [0]
    for count in counts[: executor.max_rows]:
        start = int(count == 1)
        end = blocks[-1] - (-(start + count) // size)
        if end > executor.cache.smallest_group:
            break
        starts.append(start)
        blocks.append(end)
    rows = len(starts)
    if not rows:
        return
    computed, known = np.array(counts[:rows], np.int64), np.array(starts, np.int64)
    longest = int((computed + known).max())
    inputs = executor.new_step(
        num_tokens=int(computed.sum()),
        num_rows=rows,
        max_query_len=int(computed.max()),
        num_prompts=int((computed > 1).sum()),
        max_context_len=longest,
        num_logits=rows,
        sampling=sampling,
        num_sampled=0 if sampling is None else rows,
        width=width,
        eager=True,
    )
    table = np.zeros((rows, executor.width), np.int64)
    for row, (first, end) in enumerate(pairwise(blocks)):
        table[row, : end - first] = range(first, end)
    tables = [table] * executor.cache.num_groups
    ends = inputs.place(known, computed, tables, block_size=size, first_position=0)
    inputs.arrays["logit_tokens"][:] = ends - 1
    for name, value in {"temperature": 1.0, "top_k": 8, "top_p": 1.0}.items():
        inputs.arrays[name][:] = value
    executor.collect(executor.launch(inputs))


def warm_up(
    batch: StaticBatch,
    rows: Sequence[int],
    samplings: Iterable[BatchSampling] = (BatchSampling(),),
    *,
    progress: bool = False,
) -> WarmUp:
    """Capture the graphs of some batch sizes, and run prompts of every kind of length.

    Args:
        batch: idle.
        rows: sizes of batches.
        samplings: ways of sampling. Those that differ only in numbers share a graph.
        progress: show a bar.
    """
    started = time.perf_counter()
    executor, longest = batch.executor, min(batch.max_length, MAX_STEP_TOKENS)
    # captures first: each frees the memory that the allocator has kept for a prefill
    samplings = tuple(samplings)
    jobs = [
        partial(_start, batch, n, sampling) for n in sorted({1, *rows}) for sampling in samplings
    ]
    prompts = [[n] for n in _PROMPTS if 1 < n < longest] + [_largest_prefill(batch, max(rows))]
    jobs += [partial(run_step, executor, counts, None, executor.width) for counts in prompts]
    for job in track(
        jobs, description="compiling and capturing", disable=not progress, transient=True
    ):
        job()
    if batch.device.type == "cuda":
        torch.cuda.synchronize(batch.device)
    batch.warm = True
    return WarmUp(time.perf_counter() - started, executor.num_graphs, executor.memory)


def _start(batch: StaticBatch, rows: int, sampling: BatchSampling) -> None:
    """Start a batch of prompts of one token, and end it."""
    ids, seeds = (torch.zeros(rows, dtype=torch.int64, device="cpu") for _ in range(2))
    try:
        batch.start(ids, [1] * rows, 1, sampling, seeds)
    finally:
        batch.end()


def _largest_prefill(batch: StaticBatch, rows: int) -> list[int]:
    """Return the tokens per row of the step that takes the most memory, as far as cache reaches."""
    room = batch.num_blocks // rows * BLOCK_SIZE
    tokens = min(MAX_STEP_TOKENS // rows, room, batch.max_length) - 1
    return [max(tokens, 1)] * rows
