"""The tokens that penalties count, for each row of a table on the device."""

from __future__ import annotations

import torch


class TokenCounts:
    """For each row the tokens that were seen, and how often its output has each.

    Tokens are added by their places in the flat table: ``row * vocabulary + token``, int64.
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self.vocabulary = vocabulary
        self.seen = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)
        self._output: torch.Tensor | None = None  # int32 [rows, vocabulary], once something counts

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return self.seen.nbytes + (0 if self._output is None else self._output.nbytes)

    @property
    def output(self) -> torch.Tensor:
        """How often the output of each row has each token, int32 ``[rows, vocabulary]``."""
        if self._output is None:
            self._output = torch.zeros(self.seen.shape, dtype=torch.int32, device=self.seen.device)
        return self._output

    def clear(self, rows: torch.Tensor) -> None:
        """Forget the tokens of some rows."""
        self.seen.index_fill_(0, rows, False)
        if self._output is not None:
            self._output.index_fill_(0, rows, 0)

    def add_seen(self, places: torch.Tensor) -> None:
        """Mark tokens as seen."""
        self.seen.view(-1).index_fill_(0, places, True)

    def add_output(self, places: torch.Tensor) -> None:
        """Count tokens of the output, a place once for each time it is listed."""
        ones = torch.ones(len(places), dtype=torch.int32, device=places.device)
        self.output.view(-1).index_add_(0, places, ones)
