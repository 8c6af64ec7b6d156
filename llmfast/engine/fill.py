"""What a step reads, written on the host. What stays from step to step is kept, not made anew."""

from __future__ import annotations

from collections import abc

import numpy as np
import torch

from .inputs import Size, buffer_bytes, views
from .request import Answer, Sequence


class Filler:
    """Writes the buffers of steps.

    At hundreds of sequences a step is prepared in less time than a GPU takes for it only if
    nothing is written number by number: columns are assigned at once, the parameters of answers
    are kept as long as the answers are the same, and of the blocks only new ones are copied.
    """

    def __init__(
        self, rows: int, width: int, *, block_size: int, first_row: int, pinned: bool
    ) -> None:
        """
        Args:
            rows, width: sequences of a step, and blocks of a sequence, at most.
            block_size: tokens of a block.
            first_row: of the rotary tables.
            pinned: make buffers that a GPU can read while the host goes on.
        """
        self._block_size = block_size
        self._first_row = first_row
        self._pinned = pinned
        self._table = np.zeros((rows, width), np.int64)
        # of each row of the table: the list whose blocks it has, and how many of them
        self._lists: list[list[int]] = [[] for _ in range(rows)]
        self._lengths = [0] * rows
        self._answers: list[Answer] = []
        self._columns: dict[str, np.ndarray] = {}

    def fill(
        self,
        size: Size,
        counts: abc.Mapping[Sequence, int],
        answers: abc.Sequence[Answer],
        previous: abc.Mapping[Sequence, int],
    ) -> torch.Tensor:
        """The buffer of a step; rows past the plan's are idle.

        Args:
            size: of the step, at least that of the plan.
            counts: how many tokens of each sequence are computed, as the plan has them.
            answers: of the sequences whose next token is chosen, in the plan's order.
            previous: the row in the step before of each sequence whose last token is unknown.

        Returns:
            uint8 ``[buffer_bytes(size)]``, on the CPU.
        """
        buffer = torch.zeros(buffer_bytes(size), dtype=torch.uint8, pin_memory=self._pinned)
        of = views(buffer, size).arrays()
        rows, ready = len(counts), len(answers)
        tokens_of = np.fromiter(counts.values(), np.int64, rows)
        starts = np.fromiter((s.computed for s in counts), np.int64, rows)
        ends = np.cumsum(tokens_of)
        total = int(tokens_of.sum())
        table = self._blocks(counts)

        of["query_start"][1 : rows + 1] = ends
        # an idle row has a token as long as there are some; what is left belongs to no row
        idle = total + np.arange(1, size.rows - rows + 1)
        of["query_start"][rows + 1 :] = np.minimum(idle, size.tokens)
        of["context_len"][:rows] = starts + tokens_of
        of["block_table"][:rows] = table[:, : size.width]

        owners, places = np.arange(rows), starts
        if total != rows:
            owners = np.repeat(owners, tokens_of)
            places = np.arange(total) + np.repeat(starts - (ends - tokens_of), tokens_of)
        blocks, within = np.divmod(places, self._block_size)
        of["positions"][:total] = self._first_row + places
        of["slots"][:total] = table[owners, blocks] * self._block_size + within
        of["slots"][total:] = -1
        self._tokens(of, counts, previous, ends)

        last = ends - 1
        if ready < rows:
            row_of = dict(zip(counts, range(rows), strict=True))
            last = last[[row_of[answer.sequence] for answer in answers]]
        of["last"][:ready] = last
        of["numbers"][:ready] = [answer.position for answer in answers]
        for name, column in self._drawing(answers).items():
            of[name][:ready] = column
        return buffer

    def _tokens(
        self,
        of: dict[str, np.ndarray],
        counts: abc.Mapping[Sequence, int],
        previous: abc.Mapping[Sequence, int],
        ends: np.ndarray,
    ) -> None:
        """The tokens, and where those come from that the host does not know."""
        known: list[int] = []
        unknown: list[int] = []
        sources: list[int] = []
        for row, (sequence, count) in enumerate(counts.items()):
            start = sequence.computed
            own = sequence.tokens[start : start + count]
            known += own
            if len(own) < count:  # the last is what the step before chooses
                known.append(0)
                unknown.append(row)
                sources.append(previous[sequence])
        of["token_ids"][: len(known)] = known
        of["source"].fill(-1)
        if unknown:
            of["source"][ends[unknown] - 1] = sources

    def _blocks(self, counts: abc.Mapping[Sequence, int]) -> np.ndarray:
        """The blocks of each sequence, ``[len(counts), width]``."""
        lists, lengths = self._lists, self._lengths
        for row, sequence in enumerate(counts):
            blocks = sequence.blocks
            known, length = lengths[row], len(blocks)
            if lists[row] is not blocks:  # a sequence's list only grows; other blocks, other list
                lists[row], known = blocks, 0
                self._table[row] = 0
            if known != length:
                self._table[row, known:length] = blocks[known:]
                lengths[row] = length
        return self._table[: len(counts)]

    def _drawing(self, answers: abc.Sequence[Answer]) -> dict[str, np.ndarray]:
        """The columns of parameters, by name; an answer's never change."""
        if answers != self._answers or not self._columns:
            self._answers = list(answers)
            params = [answer.params for answer in answers]
            most = 2**31 - 1
            self._columns = {
                "seeds": np.array([answer.seed for answer in answers], np.int64),
                "temperature": np.array([p.temperature for p in params], np.float32),
                "top_k": np.array([min(max(p.top_k, 0), most) for p in params], np.int32),
                "top_p": np.array([p.top_p for p in params], np.float32),
                "min_p": np.array([p.min_p for p in params], np.float32),
            }
        return self._columns
