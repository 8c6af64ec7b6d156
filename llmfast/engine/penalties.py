"""The sequences whose tokens penalties count, each with a row of a table on the device."""

from __future__ import annotations

import weakref
from collections import abc

import torch

from ..runner.token_counts import TokenCounts
from .request import Sequence


class _Slot:
    """A sequence's row of the table."""

    def __init__(self, row: int, returned: weakref.finalize[..., Sequence]) -> None:
        self.row = row
        self.counted = 0  # tokens of the sequence that the row counts
        self.returned = returned  # frees the row when the sequence is gone


class Counts:
    """The tokens of each sequence's prompt, and how often its output has each.

    A step adds the token that the step before has sampled. The rows belong to the sequences of the
    latest steps; a sequence whose row was taken meanwhile is counted from its first token again.
    """

    def __init__(self, rows: int) -> None:
        """
        Args:
            rows: sequences of a step at most.
        """
        self._rows = rows
        self._slots: weakref.WeakKeyDictionary[Sequence, _Slot] = weakref.WeakKeyDictionary()
        self._free = list(range(rows))
        self._table: TokenCounts | None = None

    def of(
        self, sequences: abc.Sequence[Sequence | None], vocabulary: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the new tokens of some sequences, and return all counts.

        Args:
            sequences: None for a row without counts.

        Returns:
            bool and int32, ``[len(sequences), vocabulary]``: the tokens of each prompt, and how
            often each output has each.
        """
        if self._table is None:  # its last row stays empty
            self._table = TokenCounts(self._rows + 1, vocabulary, device)
        wanted = {sequence for sequence in sequences if sequence is not None}
        rows: list[int] = []
        new: list[int] = []
        seen: list[int] = []
        counted: list[int] = []
        for sequence in sequences:
            if sequence is None:
                rows.append(self._rows)
                continue
            slot = self._slots.get(sequence)
            if slot is None:
                slot = self._take(sequence, wanted)
                new.append(slot.row)
            first = slot.row * vocabulary
            tokens, prompt = sequence.tokens, sequence.prompt_len
            seen += [first + token for token in tokens[slot.counted : prompt]]
            counted += [first + token for token in tokens[max(slot.counted, prompt) :]]
            slot.counted = len(tokens)
            rows.append(slot.row)

        def on_device(numbers: list[int]) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=device)

        if new:
            self._table.clear(on_device(new))
        if seen:
            self._table.add_seen(on_device(seen))
        if counted:
            self._table.add_output(on_device(counted))
        of_rows = on_device(rows)
        return self._table.seen[of_rows], self._table.output[of_rows]

    def _take(self, sequence: Sequence, wanted: abc.Iterable[Sequence]) -> _Slot:
        """Give a sequence a row: a free one, or that of a sequence that is not wanted now."""
        if not self._free:
            other = next(known for known in self._slots if known not in wanted)
            slot = self._slots.pop(other)
            slot.returned.detach()
            self._free.append(slot.row)
        row = self._free.pop()
        slot = self._slots[sequence] = _Slot(
            row, weakref.finalize(sequence, self._free.append, row)
        )
        return slot
