"""The interface between a model and the runner, and a shadow's forward over a step."""

from __future__ import annotations

from typing import Protocol

import torch
from transformers import PreTrainedModel

from ..model.verify import Verification
from .cache import LayerCache, PagedCache
from .step import Step


class StepModel(Protocol):
    """A model that runs steps over a paged cache."""

    layer_caches: list[LayerCache]
    vocabulary: int
    dtype: torch.dtype
    device: torch.device
    verification: Verification  # of the whole model's logits
    packed_bytes: int  # bytes of packed weights, which the user's model does not have
    dense_bytes: int  # bytes of the dense weights that they replace

    def __call__(self, step: Step, cache: PagedCache, rows: torch.Tensor) -> torch.Tensor:
        """Write the step's keys and values to the cache and compute logits.

        Args:
            step: T tokens.
            cache: of :attr:`layer_caches`.
            rows: int64 [n], the tokens to compute logits for.

        Returns:
            Logits ``[n, vocabulary]`` in the dtype of the model's own.
        """
        ...

    def admit(self, length: int) -> int:
        """Return the offset of the positions of a sequence that may reach ``length`` tokens."""
        ...

    def resize(self, max_length: int) -> None:
        """Resize for sequences of ``max_length`` tokens; invalidates captured graphs."""
        ...

    def restore(self) -> None:
        """Undo every change to the user's model."""
        ...

    def describe(self) -> str:
        """Return a description for the report."""
        ...


class ShadowForward:
    """The forward of a shadow over the flat tokens of a step."""

    def __init__(self, shadow: PreTrainedModel) -> None:
        self._shadow = shadow
        # transformers passes on a mask of four dimensions as it is, and builds none
        self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=shadow.device)

    def __call__(self, step: Step, rows: torch.Tensor) -> torch.Tensor:
        output = self._shadow(
            input_ids=step.token_ids[None],
            position_ids=step.positions[None],
            attention_mask=self._mask,
            use_cache=False,
            logits_to_keep=rows,
        )
        logits: torch.Tensor = output.logits[0]
        return logits
