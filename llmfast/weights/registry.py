"""The packed weight formats: a new one is a file beside :mod:`.int4` and a line here."""

from __future__ import annotations

import torch

from .int4 import Int4Weight
from .int8 import Int8Weight
from .weight import PackedWeight, StoredWeight

FORMATS: dict[str, type[PackedWeight]] = {
    "int4": Int4Weight,
    "int8": Int8Weight,
}


def pack(stored: StoredWeight, dtype: torch.dtype) -> PackedWeight:
    """Pack ``stored`` on its device, for inputs of ``dtype``.

    Raises:
        ValueError: the format's kernel cannot multiply with it there.
    """
    return FORMATS[stored.format].pack(stored, dtype)
