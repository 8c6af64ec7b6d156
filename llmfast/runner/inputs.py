"""The inputs of a step: one host buffer, so that a single copy takes all of them to the GPU.

A field is declared once, in :class:`StepTensors`: its name, extent and dtype. The layout of the
buffer, the arrays that the host writes and the tensors that the device reads follow from that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from math import prod
from typing import Annotated, Any, NamedTuple, get_type_hints

import numpy as np
import torch

MAX_STEP_TOKENS = 4096  # default: more tokens cost memory for activations and gain no speed
_NUMPY = {torch.int64: np.int64, torch.int32: np.int32, torch.float32: np.float32}
_ALIGNMENT = 16  # bytes, of each field's start


class Extent(Enum):
    """How many elements a field has."""

    TOKEN = auto()  # one per token
    GROUP_TOKEN = auto()  # one per token, for each cache group
    ROW = auto()  # one per row: a row is a sequence of the step
    BOUNDARY = auto()  # one per row, and one more
    GROUP_TABLE = auto()  # ``width`` per row, for each cache group
    LOGITS = auto()  # one per row of logits
    COPY = auto()  # three per block copy

    @property
    def grouped(self) -> bool:
        """True if a field has one instance for each cache group."""
        return self in (Extent.GROUP_TOKEN, Extent.GROUP_TABLE)


@dataclass
class StepTensors:
    """The fields of a step. Its tokens are flat: those of row 0, then those of row 1, and so on."""

    token_ids: Annotated[torch.Tensor, Extent.TOKEN, torch.int64]
    # row of the latest step that sampled this token; -1: the token is in token_ids
    source_row: Annotated[torch.Tensor, Extent.TOKEN, torch.int64]
    positions: Annotated[torch.Tensor, Extent.TOKEN, torch.int64]  # rows of the rotary tables
    # places in the cache; -1: not written
    slots: Annotated[tuple[torch.Tensor, ...], Extent.GROUP_TOKEN, torch.int64]
    query_start: Annotated[torch.Tensor, Extent.BOUNDARY, torch.int32]  # a row's first token
    # tokens in the cache once the step has run; 0: the row is idle
    context_len: Annotated[torch.Tensor, Extent.ROW, torch.int32]
    block_tables: Annotated[tuple[torch.Tensor, ...], Extent.GROUP_TABLE, torch.int32]
    # tokens whose logits are wanted; several of a row verify several tokens
    logit_tokens: Annotated[torch.Tensor, Extent.LOGITS, torch.int64]
    # the sampling parameters of each row of logits, as sample_tokens takes them
    seeds: Annotated[torch.Tensor, Extent.LOGITS, torch.int64]
    draws: Annotated[torch.Tensor, Extent.LOGITS, torch.int64]  # index of the draw: its position
    temperature: Annotated[torch.Tensor, Extent.LOGITS, torch.float32]
    top_k: Annotated[torch.Tensor, Extent.LOGITS, torch.int32]
    top_p: Annotated[torch.Tensor, Extent.LOGITS, torch.float32]
    min_p: Annotated[torch.Tensor, Extent.LOGITS, torch.float32]
    # (group, source, target) of blocks to copy before the step. Last, so that it moves no other
    block_copies: Annotated[torch.Tensor, Extent.COPY, torch.int64]


@dataclass(frozen=True)
class StepShape:
    """The sizes of a step's fields."""

    tokens: int
    rows: int
    width: int  # blocks per row of a block table
    logit_rows: int
    max_query_len: int = 1  # tokens of a row at most
    max_prompts: int | None = None  # rows with several tokens at most; None: any number
    copies: int = 0
    groups: int = 1  # cache groups, each with a block table

    def of(self, extent: Extent) -> tuple[int, ...]:
        """Return the shape of a field, or of each of its instances."""
        match extent:
            case Extent.TOKEN | Extent.GROUP_TOKEN:
                return (self.tokens,)
            case Extent.ROW:
                return (self.rows,)
            case Extent.BOUNDARY:
                return (self.rows + 1,)
            case Extent.GROUP_TABLE:
                return (self.rows, self.width)
            case Extent.LOGITS:
                return (self.logit_rows,)
            case Extent.COPY:
                return (self.copies, 3)


@dataclass(frozen=True)
class SamplingOps:
    """The parts of sampling that a step runs on the device; parts left out cost nothing."""

    draws: bool = False  # temperatures; without it every row is greedy
    filters: bool = False  # top-k, top-p and min-p
    repetition_penalty: bool = False
    suppress_stop_tokens: bool = False


@dataclass(frozen=True)
class GraphKey:
    """Everything that a captured step is specialised for."""

    shape: StepShape
    sampling: SamplingOps | None  # None: the step ends at the logits
    self_advancing: bool = False  # each step's inputs follow on the device from the step before


class StepInputs:
    """One step as the host describes it: a buffer and a few integers, no objects of a caller."""

    def __init__(
        self,
        key: GraphKey,
        *,
        num_logits: int = 0,
        num_sampled: int = 0,
        num_copies: int = 0,
        max_context_len: int | None = None,
        captured: bool = False,
        pinned: bool = False,
    ) -> None:
        """
        Args:
            key: the sizes of the buffer, and how tokens are sampled.
            num_logits: rows of logits that are wanted.
            num_sampled: the first rows of logits, whose tokens are sampled on the device.
            num_copies: blocks that are copied before the step.
            max_context_len: the longest context, as a hint for the number of programs.
            captured: the step is replayed from the graph of ``key``.
            pinned: allocate memory that a GPU can read while the host goes on.
        """
        self.key = key
        self.num_logits, self.num_sampled = num_logits, num_sampled
        self.max_context_len = max_context_len
        self.captured = captured
        shape = key.shape
        self.shape = dataclasses.replace(shape, copies=num_copies) if num_copies else shape
        size = buffer_bytes(self.shape)
        self.buffer = torch.zeros(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        whole = self.buffer.numpy()
        self.arrays: dict[str, np.ndarray] = {}
        self.group_arrays: dict[str, list[np.ndarray]] = {}  # fields with one for each cache group
        for name, group, start, size, dtype, dims in _layout(self.shape)[0]:
            array = whole[start : start + size].view(_NUMPY[dtype]).reshape(dims)
            if group is None:
                self.arrays[name] = array
            else:
                self.group_arrays.setdefault(name, []).append(array)

    def make_idle(self) -> None:
        """Make every row idle."""
        none = np.zeros(0, np.int64)
        tables = [np.zeros((0, self.shape.width), np.int64)] * self.shape.groups
        self.place(none, none, tables, block_size=1, first_position=0)

    def place(
        self,
        starts: np.ndarray,
        counts: np.ndarray,
        block_tables: Sequence[np.ndarray],
        *,
        block_size: int,
        first_position: int | np.ndarray,
    ) -> np.ndarray:
        """Write where each token goes; rows and tokens that are left over are idle.

        Args:
            starts: int64, for each row how many of its tokens are in the cache already.
            counts: int64, for each row how many tokens of it the step computes.
            block_tables: for each cache group ``[rows, width]``, the blocks of each row in order.
            block_size: tokens per block.
            first_position: of the rotary tables, for all rows or for each.

        Returns:
            For each row the end of its tokens in the flat order.
        """
        arrays, shape = self.arrays, self.shape
        rows, total = len(counts), int(counts.sum())
        ends: np.ndarray = np.cumsum(counts)
        arrays["query_start"][1 : rows + 1] = ends
        # an idle row has one token while there are some; tokens beyond belong to no row
        idle = total + np.arange(1, shape.rows - rows + 1)
        arrays["query_start"][rows + 1 :] = np.minimum(idle, shape.tokens)
        arrays["context_len"][:rows] = starts + counts

        owners, places = np.arange(rows), starts
        if total != rows:
            owners = np.repeat(owners, counts)
            places = np.arange(total) + np.repeat(starts - (ends - counts), counts)
        blocks, within = np.divmod(places, block_size)
        if isinstance(first_position, np.ndarray):
            first_position = first_position[owners]
        arrays["positions"][:total] = first_position + places
        arrays["source_row"].fill(-1)
        groups = self.group_arrays
        for own, table, slots in zip(
            block_tables, groups["block_tables"], groups["slots"], strict=True
        ):
            table[:rows] = own[:, : shape.width]
            slots[:total] = own[owners, blocks] * block_size + within
            slots[total:] = -1
        return ends


def buffer_bytes(shape: StepShape) -> int:
    """Return the bytes of a step's buffer."""
    return _layout(shape)[1]


def views(buffer: torch.Tensor, shape: StepShape) -> StepTensors:
    """Return a step's fields in a uint8 buffer, on whatever device the buffer is."""
    fields: dict[str, Any] = {}
    for name, group, start, size, dtype, dims in _layout(shape)[0]:
        field = buffer[start : start + size].view(dtype).view(dims)
        fields[name] = field if group is None else (*fields.get(name, ()), field)
    return StepTensors(**fields)


@lru_cache(maxsize=1)
def _declared() -> dict[str, tuple[Extent, torch.dtype]]:
    hints = get_type_hints(StepTensors, include_extras=True)
    return {name: hint.__metadata__ for name, hint in hints.items()}


class _Place(NamedTuple):
    """The place of a field in the buffer, or of its instance for a cache group."""

    name: str
    group: int | None
    start: int
    size: int  # bytes
    dtype: torch.dtype
    dims: tuple[int, ...]


@lru_cache(maxsize=256)
def _layout(shape: StepShape) -> tuple[list[_Place], int]:
    """Return the places of all fields, and the bytes that they take."""
    places: list[_Place] = []
    end = 0
    for name, (extent, dtype) in _declared().items():
        dims = shape.of(extent)
        size = prod(dims) * dtype.itemsize
        for group in range(shape.groups) if extent.grouped else (None,):
            places.append(_Place(name, group, end, size, dtype, dims))
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places, end
