"""Launching a Triton kernel again without Triton looking at every argument.

At each launch Triton inspects all arguments to find the compiled variant that fits them. That takes
some 30 us of Python on a slow CPU, longer than most kernels of a decode step run. A
:class:`CachedLauncher` finds the variant by a key of its own. The key holds everything that Triton
specializes a kernel on:

- which arguments are None, and the Python type of the others;
- the dtype of each tensor, and if its address is a multiple of 16 bytes;
- of each integer if it is 1, if it is a multiple of 16, and its width; of an integer that the
  kernel lists in ``do_not_specialize`` the width alone;
- the values of constexprs, the device, and the options of the launch.

The cost is small because the usual case is tested as a whole: one bitwise OR tells if all addresses
are aligned, and one if all integers are multiples of 16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import chain, takewhile
from typing import Any

import torch
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from .pdl import pdl_options

ALIGNMENT = 16  # bytes of an address, or units of an integer: Triton's threshold

_compiled: Counter[str] = Counter()

Flat = Sequence[Any]


def compilations() -> Counter[str]:
    """Return how many variants of each kernel were compiled, or loaded from disk, so far.

    The difference of two calls shows if something was compiled between them.
    """
    return _compiled.copy()


def aligned(*tensors: torch.Tensor | None) -> bool:
    """Return True if the addresses of all tensors are multiples of 16 bytes."""
    bits = 0
    for tensor in tensors:
        if tensor is not None:
            bits |= tensor.data_ptr()
    return bits % ALIGNMENT == 0


class CachedLauncher:
    """A Triton kernel with the variants that were compiled of it.

    Arguments may be NamedTuples of tensors, numbers and None. Grouped arguments come first in the
    kernel's signature, constexprs last. Triton specializes all integers of a group, whatever
    ``do_not_specialize`` says, so an integer that varies from call to call must not be in a group.
    """

    def __init__(self, function: Any, pdl: bool = False) -> None:
        """
        Args:
            function: what ``triton.jit`` or ``gluon.jit`` made.
            pdl: the kernel waits for its inputs, as :mod:`.pdl` says.
        """
        self.function = function
        self.pdl = pdl
        self.name: str = getattr(function, "__name__", "")
        params = getattr(function, "params", ())
        self._n_runtime = sum(not p.is_constexpr for p in params)
        if any(p.is_constexpr for p in params[: self._n_runtime]):
            raise TypeError(f"{self.name}: constexprs must come after all other arguments")
        # the interpreter compiles nothing. On AMD Triton specializes on the size of a tensor's
        # storage too (offsets of 32 bits up to 2 GiB), which it alone knows how to tell
        self._cached = isinstance(function, JITFunction) and not torch.version.hip
        self._n_groups: int | None = None
        self._variants: dict[tuple[type, ...], _Variants | None] = {}
        self._known: set[int] = set()

    def __call__(self, grid: tuple[int, ...], args: tuple[Any, ...], **options: Any) -> None:
        """Launch ``grid`` programs on the device of the tensors and its current stream.

        Args:
            grid: the number of programs, in one to three dimensions.
            args: every argument of the kernel in its order, constexprs too.
            options: num_warps, num_stages and other options of the compiler.
        """
        if not self._cached:
            self._launch_by_triton(grid, args, options, _device_index(args))
            return
        n_groups = self._n_groups
        if n_groups is None:
            n_groups = self._n_groups = _count_groups(self.name, args[: self._n_runtime])
        flat = args[n_groups : self._n_runtime]
        if n_groups:
            flat = (*chain.from_iterable(args[:n_groups]), *flat)
        types = tuple(map(type, flat))
        try:
            variants = self._variants[types]
        except KeyError:
            variants = self._variants[types] = _variants_of(flat, self._specialized(len(flat)))
        if variants is None:
            self._launch_by_triton(grid, args, options, _device_index(flat))
            return
        device, *_ = common = variants.common_key(flat)
        key = (common, args[self._n_runtime :], tuple(options.items()))
        if False in common[1:4]:
            key = (*key, variants.single_keys(flat))  # type: ignore[assignment]
        variant = variants.compiled.get(key)
        if variant is None:
            variants.keep_alive(flat)
            variant = self._launch_by_triton(grid, args, options, device)
            if variant is not None:
                variants.compiled[key] = variant
        elif device == torch.cuda.current_device():
            variant[(*grid, 1, 1)[:3]](*args)
        else:
            with torch.cuda.device(device):
                variant[(*grid, 1, 1)[:3]](*args)

    def _launch_by_triton(
        self, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any], device: int
    ) -> CompiledKernel | None:
        with torch.cuda.device(device):  # -1, of tensors on the CPU, changes nothing
            if self.pdl:
                options = options | pdl_options()
            variant = self.function[grid](*args, **options)
        if not isinstance(variant, CompiledKernel):  # the interpreter's
            return None
        if id(variant) not in self._known:
            self._known.add(id(variant))
            _compiled[self.name] += 1
        return variant

    def _specialized(self, n_flat: int) -> list[bool]:
        """Return for each flat argument if Triton specializes on its value."""
        assert self._n_groups is not None
        plain = [not p.do_not_specialize for p in self.function.params[: self._n_runtime]]
        plain = plain[self._n_groups :]
        return [True] * (n_flat - len(plain)) + plain


class _Variants:
    """The variants for arguments of one combination of Python types.

    ``common_key`` is generated from the types, because a loop over the arguments would take most of
    the time of a launch.
    """

    def __init__(
        self,
        pointers: list[int],
        specialized: list[int],
        others: list[int],
        flags: list[int],
        descriptors: list[int],
    ) -> None:
        """Each list holds positions of flat arguments; ``others`` are unspecialized integers."""
        self.compiled: dict[Hashable, CompiledKernel] = {}
        self._pointers, self._specialized, self._others = pointers, specialized, others
        self._descriptors = descriptors
        self._alive: dict[int, object] = {}
        tensors = [f"f[{i}]" for i in pointers] + [f"f[{i}].base" for i in descriptors]
        addresses = " | ".join(f"f[{i}].data_ptr()" for i in pointers) or "0"
        integers = " | ".join(f"f[{i}]" for i in specialized) or "0"
        numbers = " | ".join(f"f[{i}]" for i in others) or "0"
        parts = [
            f"{tensors[0]}.get_device()",
            f"not ({addresses}) & {ALIGNMENT - 1}",
            f"0 <= (n := {integers}) < {2**31} and not n & {ALIGNMENT - 1}",
            f"0 <= ({numbers}) < {2**31}",
            *(f"{tensor}.dtype" for tensor in tensors),
            *(f"f[{i}]" for i in flags),
            *(f"tuple(f[{i}].block_shape), id(f[{i}].layout)" for i in descriptors),
        ]
        self.common_key: Callable[[Flat], tuple[Any, ...]] = eval(f"lambda f: ({', '.join(parts)})")

    def single_keys(self, flat: Flat) -> tuple[Hashable, ...]:
        """Return the rest of the key, for arguments that are not all in the usual case."""
        return (
            *(flat[i].data_ptr() % ALIGNMENT == 0 for i in self._pointers),
            *((flat[i] == 1, flat[i] % ALIGNMENT == 0, _width(flat[i])) for i in self._specialized),
            *(_width(flat[i]) for i in self._others),
        )

    def keep_alive(self, flat: Flat) -> None:
        """Hold the layouts of descriptors, which are in the key by their identity."""
        for i in self._descriptors:
            self._alive[id(flat[i].layout)] = flat[i].layout


def _variants_of(flat: Flat, specialized: list[bool]) -> _Variants | None:
    """Return an empty set of variants for arguments like these; None if Triton must always look."""
    pointers: list[int] = []
    integers: list[int] = []
    others: list[int] = []
    flags: list[int] = []
    descriptors: list[int] = []
    for i, (argument, is_specialized) in enumerate(zip(flat, specialized, strict=True)):
        if isinstance(argument, torch.Tensor):
            pointers.append(i)
        elif isinstance(argument, bool):
            flags.append(i)
        elif isinstance(argument, int):
            (integers if is_specialized else others).append(i)
        elif hasattr(argument, "block_shape") and hasattr(argument, "layout"):
            descriptors.append(i)  # Gluon's, for TMA
        elif not (argument is None or isinstance(argument, float)):  # these two are types alone
            return None
    if not pointers and not descriptors:
        return None
    return _Variants(pointers, integers, others, flags, descriptors)


def _width(number: int) -> int:
    """Return 0, 1 or 2 for what Triton passes as int32, int64 and uint64."""
    return 0 if -(2**31) <= number < 2**31 else 1 if number < 2**63 else 2


def _count_groups(name: str, args: tuple[Any, ...]) -> int:
    count = sum(1 for _ in takewhile(lambda argument: isinstance(argument, tuple), args))
    if any(isinstance(argument, tuple) for argument in args[count:]):
        raise TypeError(f"{name}: grouped arguments must come before all others")
    return count


def _device_index(args: tuple[Any, ...]) -> int:
    """Return the index of the first tensor's GPU, -1 for the CPU."""
    for argument in args:
        if isinstance(argument, tuple):
            argument = next((x for x in argument if isinstance(x, torch.Tensor)), None)
        if isinstance(argument, torch.Tensor):
            return argument.get_device()
    return -1
