"""The only module that replaces the values of a model's parameters, for a while or for good.

A parameter stays the same object: only its ``data`` changes, so optimizers, tied modules and
shadows of the model keep seeing it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn


def replace_value(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Give ``parameter`` another tensor for its values, without a copy."""
    parameter.data = value


@contextmanager
def replaced(values: Mapping[nn.Parameter, torch.Tensor]) -> Generator[None]:
    """Give parameters other values within the context, and their own ones at its end."""
    before = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            replace_value(parameter, value)
        yield
    finally:
        for parameter, value in before.items():
            replace_value(parameter, value)


def free_value(parameter: torch.Tensor) -> None:
    """Free the values of ``parameter``: it keeps shape, dtype and device over a single NaN."""
    value = parameter.data.new_full((1,) * parameter.ndim, float("nan"))
    replace_value(parameter, value.expand(parameter.shape))


class MergedParameters:
    """One tensor that holds the values of several parameters, which become views of it.

    Merging takes no memory beyond the moment of the copy, and modules work as before. Operations
    that move the parameters elsewhere (``.to()``, a deepcopy of the model) leave the tensor stale.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        """Concatenate ``parameters`` along their first dimension; a single one is not copied."""
        values = [parameter.data for parameter in parameters]
        self.tensor = torch.cat(values) if len(values) > 1 else values[0]
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []
        if len(values) > 1:
            views = torch.split(self.tensor, [len(value) for value in values])
            self._views = list(zip(parameters, views, strict=True))
        for parameter, view in self._views:
            replace_value(parameter, view)

    def restore(self) -> None:
        """Give each parameter a tensor of its own again, with the values that it has now."""
        for parameter, view in self._views:
            if parameter.data_ptr() == view.data_ptr():
                replace_value(parameter, view.clone())
