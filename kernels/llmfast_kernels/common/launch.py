"""Launching a Triton kernel for the second time, without looking at every argument again.

Triton's launch inspects all arguments to find the compiled variant that fits them, some 30 us of
Python on a slow CPU: more than most kernels of a decode step run. A caller that knows what the
variant depends on says it in a key, and from the second launch on the variant is found by it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from triton.compiler import CompiledKernel

from .pdl import pdl_options

compiled: list[str] = []  # a kernel's name for each variant that was compiled, or loaded from disk

ALIGNMENT = 16  # bytes of a pointer, or units of an integer: what Triton specialises on


class CachedLauncher:
    """A Triton kernel with the variants that it has compiled, by the callers' keys."""

    def __init__(self, function: Any, pdl: bool = False) -> None:
        """``pdl``: the kernel waits for its inputs, as :mod:`.pdl` says."""
        self.function = function
        self.pdl = pdl
        self.name: str = getattr(function, "__name__", "")
        self._variants: dict[Hashable, CompiledKernel] = {}
        self._known: set[int] = set()

    def __call__(
        self, grid: tuple[int, ...], key: Hashable | None, args: tuple[Any, ...], **options: int
    ) -> None:
        """Launch ``grid`` programs with ``args``, on the current device and stream.

        Args:
            grid: the number of programs, in one to three dimensions.
            key: equal for launches that Triton would compile alike: same device, dtypes, constexprs
                and options, pointers aligned or not, integers it specialises on alike. None: let
                Triton look.
            args: every argument of the kernel in its order, constexprs too.
            options: num_warps, num_stages.
        """
        variant = self._variants.get(key) if key is not None else None
        if variant is None:
            # what the interpreter returns is no compiled kernel, and not kept
            if self.pdl:
                options |= pdl_options()
            variant = self.function[grid](*args, **options)
            if not isinstance(variant, CompiledKernel):
                return
            if id(variant) not in self._known:
                self._known.add(id(variant))
                compiled.append(self.name)
            if key is not None:
                self._variants[key] = variant
            return
        variant[(*grid, 1, 1)[:3]](*args)


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether Triton takes all these pointers for aligned: then one key can stand for them."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits % ALIGNMENT == 0
