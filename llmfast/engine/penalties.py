"""What penalties count, kept on the device from step to step."""

from __future__ import annotations

import weakref
from collections import abc

import torch

from .request import Sequence


class _Slot:
    """A sequence's row of the tensors."""

    def __init__(self, row: int, returned: weakref.finalize[..., Sequence]) -> None:
        self.row = row
        self.counted = 0  # of the sequence's tokens
        self.returned = returned  # what gives the row back when nobody has the sequence


class Counts:
    """Which tokens the prompt of each sequence has, and how often its output has each.

    A step adds the token that the one before has chosen. Rows are of the sequences that were asked
    for last; one that comes back after others took its row is counted anew.
    """

    def __init__(self, rows: int) -> None:
        """``rows``: sequences of a step, at most."""
        self._rows = rows
        self._slots: weakref.WeakKeyDictionary[Sequence, _Slot] = weakref.WeakKeyDictionary()
        self._free = list(range(rows))
        self._seen = torch.empty(0)
        self._counts = torch.empty(0)

    def of(
        self, sequences: abc.Sequence[Sequence | None], vocabulary: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The counts of the known tokens of some sequences.

        Args:
            sequences: None for a row without counts.

        Returns:
            bool and int32, ``[len(sequences), vocabulary]``: the tokens of each prompt, and how
            often each output has each.
        """
        if not len(self._seen):  # the last row stays empty
            shape = (self._rows + 1, vocabulary)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=device)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=device)
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
            self._seen.index_fill_(0, on_device(new), False)
            self._counts.index_fill_(0, on_device(new), 0)
        if seen:
            self._seen.view(-1).index_fill_(0, on_device(seen), True)
        if counted:
            ones = torch.ones(len(counted), dtype=torch.int32, device=device)
            self._counts.view(-1).index_add_(0, on_device(counted), ones)
        of_rows = on_device(rows)
        return self._seen[of_rows], self._counts[of_rows]

    def _take(self, sequence: Sequence, wanted: abc.Iterable[Sequence]) -> _Slot:
        """A row for a sequence: a free one, or that of one that is not wanted now."""
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
