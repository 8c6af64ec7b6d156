"""All variants of the compile gate, collected from each family's ``<family>_variants.py``.

A family's list runs through every pair of (dtype, width, operation, target), not through every
combination.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from variant import Variant

MAX_COMPILATIONS = 80  # of all families: the gate stays near a minute


def all_variants() -> list[Variant]:
    """Return the variants of every family."""
    modules = sorted(path.stem for path in Path(__file__).parent.glob("*_variants.py"))
    return [v for name in modules for v in importlib.import_module(name).VARIANTS]
