"""Sampling parameters from command-line options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, UserError

if TYPE_CHECKING:
    from ..engine.sampling_params import SamplingParams


def sampling_params(**options: Any) -> SamplingParams:
    """Make parameters from options of the same names; None means not given.

    Without a temperature decoding is greedy, unless another sampling option is given.

    Raises:
        UserError: a value that is not allowed.
    """
    from ..engine.sampling_params import SamplingParams

    given = {name: value for name, value in options.items() if value is not None}
    if given.keys().isdisjoint({"temperature", "top_p", "top_k", "min_p", "seed"}):
        given["temperature"] = 0.0
    try:
        return SamplingParams(**given)
    except ArgumentError as error:
        raise UserError(f"--{error.argument.replace('_', '-')} {error.reason}") from None
