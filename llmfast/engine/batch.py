"""From scheduled sequences to the inputs of a step, written on the host."""

from __future__ import annotations

from collections import abc

import numpy as np

from ..runner.inputs import SamplingOps, StepInputs
from .request import Answer, Sequence
from .scheduler_output import SchedulerOutput


class BatchBuilder:
    """Writes the inputs of steps.

    At hundreds of sequences a step is prepared in less time than a GPU takes for it only if
    nothing is written number by number: columns are assigned at once, the parameters of answers
    are kept while the answers stay the same, and only new blocks are copied.
    """

    def __init__(
        self,
        new_step: abc.Callable[..., StepInputs],
        *,
        rows: int,
        width: int,
        block_size: int,
        first_position: int,
        groups: int = 1,
    ) -> None:
        """
        Args:
            new_step: return the inputs of a step to fill: ``Executor.new_step``.
            rows, width: sequences of a step, and blocks of a sequence, at most.
            block_size: tokens per block.
            first_position: of the rotary tables.
            groups: cache groups.
        """
        self._new_step = new_step
        self._block_size = block_size
        self._first_position = first_position
        self._tables = [_BlockTable(rows, width) for _ in range(groups)]
        self._answers: list[Answer] = []
        self._columns: dict[str, np.ndarray] = {}

    def build(
        self,
        scheduled: SchedulerOutput,
        answers: abc.Sequence[Answer],
        previous: abc.Mapping[Sequence, int],
        scored: abc.Mapping[Sequence, int],
        sampling: SamplingOps | None,
    ) -> StepInputs:
        """Return the inputs of a step.

        Args:
            scheduled: how many tokens of each sequence are computed, and the blocks to copy.
            answers: those whose next token is sampled, in the order of ``scheduled``.
            previous: the row in the step before of each sequence whose last token is unknown.
            scored: for some sequences, how many of their first tokens give logits, too.
            sampling: None: the host chooses all tokens.
        """
        counts_of = scheduled.num_scheduled_tokens
        rows, ready = len(counts_of), len(answers)
        counts = np.fromiter(counts_of.values(), np.int64, rows)
        starts = np.fromiter((sequence.computed for sequence in counts_of), np.int64, rows)
        inputs = self._new_step(
            num_tokens=int(counts.sum()),
            num_rows=rows,
            max_query_len=int(counts.max()),
            num_prompts=int((counts > 1).sum()),
            max_context_len=int((starts + counts).max()),
            num_logits=ready + sum(scored.values()),
            sampling=sampling,
            num_sampled=0 if sampling is None else ready,
            num_copies=len(scheduled.block_copies),
        )
        arrays = inputs.arrays
        ends = inputs.place(
            starts,
            counts,
            [table.write(counts_of, group) for group, table in enumerate(self._tables)],
            block_size=self._block_size,
            first_position=self._first_position,
        )
        self._write_tokens(arrays, counts_of, previous, ends)
        if scheduled.block_copies:
            arrays["block_copies"][:] = scheduled.block_copies
        last = ends - 1
        if ready < rows:
            row_of = dict(zip(counts_of, range(rows), strict=True))
            last = last[[row_of[answer.sequence] for answer in answers]]
        arrays["logit_tokens"][:ready] = last
        if scored:
            arrays["logit_tokens"][ready : ready + sum(scored.values())] = [
                token
                for sequence, start in zip(counts_of, ends - counts, strict=True)
                for token in range(start, start + scored.get(sequence, 0))
            ]
        if sampling is not None:
            arrays["draws"][:ready] = [answer.position for answer in answers]
            for name, column in self._parameters(answers).items():
                arrays[name][:ready] = column
        return inputs

    def _write_tokens(
        self,
        arrays: dict[str, np.ndarray],
        counts: abc.Mapping[Sequence, int],
        previous: abc.Mapping[Sequence, int],
        ends: np.ndarray,
    ) -> None:
        """Write the known tokens, and the rows that sampled those the host does not know."""
        known: list[int] = []
        unknown: list[int] = []
        sources: list[int] = []
        for row, (sequence, count) in enumerate(counts.items()):
            start = sequence.computed
            own = sequence.tokens[start : start + count]
            known += own
            if len(own) < count:  # the last one is sampled by the step before
                known.append(0)
                unknown.append(row)
                sources.append(previous[sequence])
        arrays["token_ids"][: len(known)] = known
        if unknown:
            arrays["source_row"][ends[unknown] - 1] = sources

    def _parameters(self, answers: abc.Sequence[Answer]) -> dict[str, np.ndarray]:
        """Return the columns of sampling parameters, by name; an answer's never change."""
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


class _BlockTable:
    """The blocks of a step's rows in a cache group, as an array."""

    def __init__(self, rows: int, width: int) -> None:
        self._array = np.zeros((rows, width), np.int64)
        # for each row the list whose blocks it has, and how many of them
        self._lists: list[list[int]] = [[] for _ in range(rows)]
        self._lengths = [0] * rows

    def write(self, sequences: abc.Iterable[Sequence], group: int) -> np.ndarray:
        """Return the blocks of each sequence, ``[len(sequences), width]``."""
        array, lists, lengths = self._array, self._lists, self._lengths
        row = -1
        for row, sequence in enumerate(sequences):
            blocks = sequence.block_tables[group]
            known, length = lengths[row], len(blocks)
            # a sequence's list only grows; other blocks are another list
            if lists[row] is not blocks or length < known:
                lists[row], known = blocks, 0
                array[row] = 0
            if known != length:
                array[row, known:length] = blocks[known:]
                lengths[row] = length
        return array[: row + 1]
