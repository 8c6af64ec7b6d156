"""What a step reads: filled on the host in one buffer, so that one copy brings it to the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..runner.step import Step

_ALIGNMENT = 16  # bytes, of each part of the buffer


@dataclass(frozen=True)
class Size:
    """Of a step: what its tensors, and so its CUDA graph, depend on."""

    tokens: int
    rows: int  # sequences
    width: int  # blocks of a row of the table
    prompts: int = 0  # no more sequences have several tokens; 0: all have one


@dataclass
class Inputs:
    """T tokens of B sequences, in the order of a step, and how the rows that are ready draw."""

    token_ids: torch.Tensor  # int64 [T]
    source: torch.Tensor  # int64 [T]: row of the step before whose draw the token is; -1: known
    positions: torch.Tensor  # int64 [T], rows of the rotary tables
    slots: torch.Tensor  # int64 [T], where in the cache; -1: nowhere
    last: torch.Tensor  # int64 [B], of each row that is ready, its last token
    seeds: torch.Tensor  # int64 [B], this and the rest of the rows that are ready
    numbers: torch.Tensor  # int64 [B], of the token that is drawn
    query_start: torch.Tensor  # int32 [B + 1]
    context_len: torch.Tensor  # int32 [B]; 0: no sequence
    block_table: torch.Tensor  # int32 [B, W]
    top_k: torch.Tensor  # int32 [B]
    temperature: torch.Tensor  # float32 [B]
    top_p: torch.Tensor  # float32 [B]
    min_p: torch.Tensor  # float32 [B]

    def arrays(self) -> dict[str, np.ndarray]:
        """The tensors as arrays that write to them; on the CPU only."""
        return {name: tensor.numpy() for name, tensor in vars(self).items()}


def buffer_bytes(size: Size) -> int:
    """Bytes of the buffer of a step."""
    return _lay_out(size)[1]


def views(buffer: torch.Tensor, size: Size) -> Inputs:
    """A step's tensors in a uint8 buffer; equal sizes lie alike, wherever the buffer is."""
    places, _ = _lay_out(size)
    return Inputs(
        **{
            name: buffer[start : start + count * dtype.itemsize].view(dtype).view(shape)
            for name, (start, count, dtype, shape) in places.items()
        }
    )


def _lay_out(
    size: Size,
) -> tuple[dict[str, tuple[int, int, torch.dtype, tuple[int, ...]]], int]:
    tokens, rows = size.tokens, size.rows
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        **dict.fromkeys(("token_ids", "source", "positions", "slots"), (torch.int64, (tokens,))),
        **dict.fromkeys(("last", "seeds", "numbers"), (torch.int64, (rows,))),
        "query_start": (torch.int32, (rows + 1,)),
        "context_len": (torch.int32, (rows,)),
        "block_table": (torch.int32, (rows, size.width)),
        "top_k": (torch.int32, (rows,)),
        **dict.fromkeys(("temperature", "top_p", "min_p"), (torch.float32, (rows,))),
    }
    places, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        count = int(np.prod(shape))
        places[name] = (end, count, dtype, shape)
        end += -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return places, end


def step_of(
    inputs: Inputs, sampled: torch.Tensor, max_query_len: int, max_prompts: int | None
) -> Step:
    """The step, its unknown tokens taken from ``sampled``, what the step before has drawn."""
    drawn = sampled[inputs.source.clamp(min=0)]
    return Step(
        token_ids=torch.where(inputs.source < 0, inputs.token_ids, drawn),
        positions=inputs.positions,
        slots=inputs.slots,
        query_start=inputs.query_start,
        context_len=inputs.context_len,
        block_table=inputs.block_table,
        max_query_len=max_query_len,
        max_prompts=max_prompts,
    )
