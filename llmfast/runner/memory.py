"""How many blocks of the cache fit in a device's memory, and how cache groups share it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import UserError
from .cache import LayerCache, PagedCache, group_windows
from .step import Chunk, make_step
from .step_model import StepModel

CPU_CACHE_BYTES = 2**30  # on the CPU there is no memory that only the cache would use
_SAMPLING_COPIES = 8  # float32 copies of the logits that sampling with all parameters holds


def count_blocks(
    model: StepModel,
    *,
    block_size: int,
    utilization: float,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    eager: bool = False,
) -> int:
    """Return the number of blocks of the first cache group that fit.

    All groups, as :func:`group_blocks` sizes them, fit beside the weights and the largest step.

    On a GPU the largest step runs once, and its peak is taken from ``utilization`` of all memory:
    twice unless all steps are eager, since a CUDA graph of it has memory of its own. On the CPU the
    cache has what ``max_num_seqs`` sequences of ``max_model_len`` need, 1 GiB at most.

    Raises:
        UserError: not one block fits.
    """
    layers = model.layer_caches
    each = block_size * sum(layer.bytes_per_token for layer in layers)

    def fitting(room: int) -> int:
        return _fitting_blocks(
            layers,
            room,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )

    if model.device.type != "cuda":
        wanted = max_num_seqs * -(-max_model_len // block_size)
        return max(1, min(wanted, fitting(CPU_CACHE_BYTES)))
    device = model.device
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _run_largest_step(model, block_size, max_model_len, max_num_seqs, max_num_batched_tokens)
    activations = torch.cuda.max_memory_allocated(device) - before
    activations *= 1 if eager else 2
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
    return fitting(room)


def group_blocks(
    layers: Sequence[LayerCache],
    num_blocks: int,
    *,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> list[int]:
    """Return the blocks of each cache group, the first of which has ``num_blocks``.

    A sliding-window group has no more than ``max_num_seqs`` sequences can need: each its window,
    which may begin and end within a block, and a block that is freed late; and together the tokens
    of the step that runs and of the one behind it.
    """
    counts = [num_blocks]
    for window in group_windows(layers)[1:]:
        assert window is not None, "full attention is the first group"
        most = max_num_seqs * (-(-window // block_size) + 3)
        most += 2 * -(-max_num_batched_tokens // block_size)
        counts.append(min(num_blocks, most))
    return counts


def _fitting_blocks(
    layers: Sequence[LayerCache],
    room: int,
    *,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> int:
    """Return the most blocks of the first cache group with which all groups fit in ``room``."""
    bytes_of = [
        block_size * sum(layer.bytes_per_token for layer in layers if layer.window == window)
        for window in group_windows(layers)
    ]

    def taken(num_blocks: int) -> int:
        counts = group_blocks(
            layers,
            num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        return sum(count * each for count, each in zip(counts, bytes_of, strict=True))

    least, most = 0, room // bytes_of[0]
    while least < most:
        middle = -(-(least + most) // 2)
        least, most = (middle, most) if taken(middle) <= room else (least, middle - 1)
    return least


def _run_largest_step(
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
    cache = PagedCache(model.layer_caches, blocks, model.device, block_size)
    table = max(len(chunk.blocks) for chunk in chunks)
    step = make_step(chunks, block_size, table, model.device)
    rows = torch.arange(max_num_seqs, device=model.device) % len(step.token_ids)
    model(step, cache, rows)
