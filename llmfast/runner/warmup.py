"""Compiling and capturing before the first call, so that no call waits for it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from rich.progress import track
from transformers import PreTrainedModel

from ..errors import UserError
from .cache import BLOCK_SIZE
from .executor import Executor
from .generate import takeover_of
from .graphs import MIXED_TOKENS
from .inputs import SamplingOps
from .runner import PREFILL_TOKENS, Runner, Sampling

MANY_PROMPTS = 15  # of a step: sampling lays out many rows in another way than few
# lengths of prompts that between them reach every kernel variant of a prefill

_PROMPTS = (1, 3, 6, 12, 40, 200, 2500)


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up did, and what the model takes from now on. ``print`` it for a line each."""

    seconds: float
    graphs: int  # that there are now
    memory: dict[str, int]  # bytes, by what they are for

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

    Calls of up to the largest batch and ``max_length`` then wait for nothing; a kernel that is
    compiled all the same is logged as a warning.

    Args:
        model: patched, its ``generate`` taken over.
        batches: numbers of sequences that calls will have.
        max_length: tokens of a sequence at most, prompt and answer. The cache is made for it.
        sampling: for calls that draw tokens too, not greedy ones alone.
        progress: show a bar.

    Raises:
        UserError: ``generate`` is not taken over, or the cache does not fit into the memory.
    """
    takeover = takeover_of(model)
    if takeover is None:
        raise UserError("warmup: generate of this model is not taken over; see llmfast.patch")
    if not batches or min(batches) < 1 or max_length < 2:
        raise UserError(
            f"warmup: batches must be at least 1 and max_length at least 2, "
            f"got {tuple(batches)} and {max_length}"
        )
    with takeover.entered() as free, torch.inference_mode(False), torch.no_grad():
        reason = takeover.follow(model) if free else "it is in the middle of a call"
        if reason is not None:
            raise UserError(f"warmup: generate is transformers' own now: {reason}")
        blocks = max(batches) * -(-max_length // BLOCK_SIZE)
        runner = takeover.runner_for(max(batches), max_length, blocks)
        ways = [Sampling(), Sampling(temperature=1.0)] if sampling else [Sampling()]
        done = warm_up(runner, batches, ways, progress=progress)
        weights = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
        packed = takeover.blocks.packed_bytes if takeover.blocks is not None else 0
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


def run_step(executor: Executor, counts: Sequence[int], sampling: SamplingOps | None) -> None:
    """Run one step without a graph, of as many rows as there is room for.

    Args:
        counts: tokens of each row. A row of one token decodes: it has a context.
    """
    size = executor.cache.block_size
    starts, blocks = [], [0]
    for count in counts[: executor.max_rows]:
        start = int(count == 1)
        end = blocks[-1] - (-(start + count) // size)
        if end > executor.cache.num_blocks:
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
        eager=True,
    )
    table = np.zeros((rows, executor.width), np.int64)
    for row, (first, end) in enumerate(pairwise(blocks)):
        table[row, : end - first] = range(first, end)
    ends = inputs.place(known, computed, table, block_size=size, first_position=0)
    inputs.arrays["logit_tokens"][:] = ends - 1
    for name, value in {"temperature": 1.0, "top_k": 8, "top_p": 1.0}.items():
        inputs.arrays[name][:] = value
    executor.collect(executor.launch(inputs))


def warm_up(
    runner: Runner,
    rows: Sequence[int],
    samplings: Iterable[Sampling] = (Sampling(),),
    *,
    progress: bool = False,
) -> WarmUp:
    """Capture the graphs of some batch sizes, and run prompts of every kind of length.

    Args:
        runner: idle.
        rows: sizes of batches.
        samplings: ways of choosing tokens; those that differ in numbers alone share a graph.
        progress: show a bar.
    """
    started = time.perf_counter()
    lengths = [n for n in _PROMPTS if n + 1 <= min(runner.max_length, PREFILL_TOKENS)]
    # captures first: each gives back the memory that the allocator has kept for a prefill
    jobs = [(n, 1) for n in sorted({1, *rows})] + [(1, n) for n in lengths[1:]]
    jobs.append(_largest_prefill(runner, max(rows)))
    samplings = tuple(samplings)
    todo = [(sampling, *job) for job in jobs for sampling in samplings]
    for sampling, batch, length in track(
        todo, description="compiling and capturing", disable=not progress, transient=True
    ):
        ids = torch.zeros(batch * length, dtype=torch.int64, device=runner.device)
        seeds = torch.zeros(batch, dtype=torch.int64, device=runner.device)
        try:
            runner.start(ids, [length] * batch, 1, sampling, seeds)
        finally:
            runner.end()
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
    runner.warm = True
    return WarmUp(time.perf_counter() - started, runner.num_graphs, runner.memory)


def _largest_prefill(runner: Runner, rows: int) -> tuple[int, int]:
    """(rows, tokens of each) of the step that takes the most memory, as far as there is cache."""
    room = runner.cache.num_blocks // rows * BLOCK_SIZE
    tokens = min(PREFILL_TOKENS // rows, room, runner.max_length) - 1
    return rows, max(tokens, 1)
