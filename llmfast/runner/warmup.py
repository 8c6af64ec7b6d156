"""Compiling and capturing before the first call, so that no call waits for it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from rich.progress import track
from transformers import PreTrainedModel

from ..errors import UserError
from .cache import BLOCK_SIZE
from .generate import takeover_of
from .runner import PREFILL_TOKENS, Runner, Sampling

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
