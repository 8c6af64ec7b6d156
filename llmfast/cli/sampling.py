"""Sampling parameters from options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..engine.sampling_params import SamplingParams


def sampling_params(**options: Any) -> SamplingParams:
    """Parameters from options of the same names; what is None is not given.

    Without a temperature it is greedy, unless another option of sampling is given.

    Raises:
        UserError: a value that is not allowed.
    """
    from ..engine.sampling_params import SamplingParams

    given = {name: value for name, value in options.items() if value is not None}
    if given.keys().isdisjoint({"temperature", "top_p", "top_k", "min_p", "seed"}):
        given["temperature"] = 0.0
    try:
        return SamplingParams(**given)
    except ValueError as error:
        name, _, rest = str(error).removeprefix("SamplingParams: ").partition(" ")
        raise UserError(f"--{name.replace('_', '-')} {rest}") from None
