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

The function that makes the key is generated for the types of the arguments, because a loop over
them would take most of a launch's time. The usual case costs least: one bitwise OR shows that all
addresses are multiples of 16 bytes, another one that all integers are multiples of 16 in int32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .pdl import pdl_options

ALIGNMENT = 16  # bytes of an address, or units of an integer: Triton's threshold

_compiled: Counter[str] = Counter()

Arguments = tuple[Any, ...]
Options = dict[str, Any]
# returns (device, ...); None, or an error, for arguments of other types
KeyFunction = Callable[[Arguments, Options], tuple[Any, ...] | None]


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
    A bool where integers were given before counts as the integer 0 or 1.
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
        self._signatures: dict[tuple[type, ...], _Signature] = {}
        self._key_of: KeyFunction = lambda args, options: None  # for the latest types
        self._variants: dict[Hashable, CompiledKernel] = {}
        self._known: set[int] = set()

    def __call__(self, grid: tuple[int, ...], args: Arguments, **options: Any) -> None:
        """Launch ``grid`` programs on the device of the tensors and its current stream.

        Args:
            grid: the number of programs, in one to three dimensions.
            args: every argument of the kernel in its order, constexprs too.
            options: num_warps, num_stages and other options of the compiler.
        """
        try:
            key = self._key_of(args, options)
        except (AttributeError, TypeError, ValueError):  # arguments of other types than the latest
            key = None
        variant = None if key is None else self._variants.get(key)
        if key is None or variant is None:
            self._launch_by_types(grid, args, options)
        elif key[0] == torch.cuda.current_device():
            _launch_again(variant, grid, args, key[0])
        else:
            with torch.cuda.device(key[0]):
                _launch_again(variant, grid, args, key[0])

    def _launch_by_types(self, grid: tuple[int, ...], args: Arguments, options: Options) -> None:
        """Launch arguments of other types than the latest, or of a new variant."""
        if not self._cached:
            self._launch_by_triton(grid, args, options, _device_index(_flatten(args)))
            return
        flat = tuple(_flatten(args[: self._n_runtime]))
        types = tuple(map(type, flat))
        signature = self._signatures.get(types)
        if signature is None:
            signature = self._signatures[types] = self._signature(args, flat)
        device = _device_index(flat)
        if not signature.known:
            self._launch_by_triton(grid, args, options, device)
            return
        self._key_of = signature.key_of
        key = self._key_of(args, options)
        variant = self._variants.get(key)
        if variant is None:
            signature.keep_alive(flat)
            variant = self._launch_by_triton(grid, args, options, device)
            if variant is not None:
                self._variants[key] = variant
            return
        with torch.cuda.device(device):
            _launch_again(variant, grid, args, device)

    def _launch_by_triton(
        self, grid: tuple[int, ...], args: Arguments, options: Options, device: int
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

    def _signature(self, args: Arguments, flat: Arguments) -> _Signature:
        """Make the signature of arguments of these types."""
        args = args[: self._n_runtime]
        groups = list(takewhile(lambda argument: isinstance(argument, tuple), args))
        if any(isinstance(argument, tuple) for argument in args[len(groups) :]):
            raise TypeError(f"{self.name}: grouped arguments must come before all others")
        params = self.function.params[len(groups) : self._n_runtime]
        sizes = [len(group) for group in groups]
        specialized = [True] * sum(sizes) + [not p.do_not_specialize for p in params]
        return _Signature(len(self._signatures), flat, sizes, specialized)


class _Signature:
    """The types of a kernel's arguments, and how their keys are made.

    Attributes:
        known: False if an argument is of a type whose specialization is unknown here.
        key_of: the function that makes the key. For arguments of other types it returns None, or
            raises AttributeError, TypeError or ValueError.
    """

    def __init__(
        self, number: int, flat: Arguments, group_sizes: Sequence[int], specialized: Sequence[bool]
    ) -> None:
        """
        Args:
            number: tells the signatures of one kernel apart.
            flat: arguments of the types, those of groups one by one, without constexprs.
            group_sizes: the number of members of each group.
            specialized: for each of ``flat`` if Triton specializes on an integer's value.
        """
        self._number = number
        self._pointers: list[int] = []
        self._specialized: list[int] = []
        self._others: list[int] = []  # integers that are not specialized
        self._descriptors: list[int] = []  # Gluon's, for TMA
        self._flags: list[int] = []
        floats: list[int] = []
        absent: list[int] = []
        self.known = True
        for i, (argument, is_specialized) in enumerate(zip(flat, specialized, strict=True)):
            if isinstance(argument, torch.Tensor):
                self._pointers.append(i)
            elif argument is None:
                absent.append(i)
            elif isinstance(argument, bool):
                self._flags.append(i)
            elif isinstance(argument, int):
                (self._specialized if is_specialized else self._others).append(i)
            elif isinstance(argument, float):
                floats.append(i)
            elif hasattr(argument, "block_shape") and hasattr(argument, "layout"):
                self._descriptors.append(i)
            else:
                self.known = False
        self.known &= bool(self._pointers or self._descriptors)
        self._alive: dict[int, object] = {}
        self.key_of = self._generate(group_sizes, len(flat), absent, floats)

    def _generate(
        self, group_sizes: Sequence[int], n_flat: int, absent: list[int], floats: list[int]
    ) -> KeyFunction:
        """Compile ``key_of``."""
        if not self.known:
            return lambda args, options: None
        targets, start = [], 0
        for size in group_sizes:
            targets.append(f"({''.join(f'a{i}, ' for i in range(start, start + size))})")
            start += size
        targets += [f"a{i}" for i in range(start, n_flat)]

        def union(positions: list[int], suffix: str = "") -> str:
            # with 0, so that a float raises TypeError even where it is alone
            return " | ".join([*(f"a{i}{suffix}" for i in positions), "0"])

        tensors = [f"a{i}" for i in self._pointers] + [f"a{i}.base" for i in self._descriptors]
        types = [
            *(f"a{i} is None" for i in absent),
            *(f"type(a{i}) is float" for i in floats),
            *(f"type(a{i}) is bool" for i in self._flags),
            "True",
        ]
        usual = [
            f"not ({union(self._pointers, '.data_ptr()')}) & {ALIGNMENT - 1}",
            f"0 <= (n := {union(self._specialized)}) < {2**31} and not n & {ALIGNMENT - 1}",
            f"0 <= ({union(self._others)}) < {2**31}",
        ]
        key = [
            f"{tensors[0]}.get_device()",
            str(self._number),
            *(f"{tensor}.dtype" for tensor in tensors),
            *(f"a{i}" for i in self._flags),
            *(f"tuple(a{i}.block_shape), id(a{i}.layout)" for i in self._descriptors),
            "*constexprs",
            "*options.items()",
        ]
        one_by_one = [
            *(f"a{i}.data_ptr() & {ALIGNMENT - 1} == 0" for i in self._pointers),
            *(f"a{i} == 1, a{i} & {ALIGNMENT - 1} == 0, width(a{i})" for i in self._specialized),
            *(f"width(a{i})" for i in self._others),
        ]
        source = f"""
def key_of(args, options):
    {", ".join([*targets, "*constexprs"])} = args
    if {" and ".join(types)}:
        if {" and ".join(usual)}:
            return ({", ".join(key)})
        return ({", ".join([*key, *one_by_one])})
    return None
"""
        namespace: dict[str, Any] = {"width": _width}
        exec(source, namespace)
        key_of: KeyFunction = namespace["key_of"]
        return key_of

    def keep_alive(self, flat: Arguments) -> None:
        """Hold the layouts of descriptors, which are in the key by their identity."""
        for i in self._descriptors:
            self._alive[id(flat[i].layout)] = flat[i].layout


def _launch_again(
    variant: CompiledKernel, grid: tuple[int, ...], args: Arguments, device: int
) -> None:
    """Launch a compiled variant as Triton does, without its metadata unless a hook wants them."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler's
        variant[(*grid, 1, 1)[:3]](*args)
        return
    run = variant.run  # loads the variant, so it precedes its function
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(device)
    run(x, y, z, stream, variant.function, variant.packed_metadata, None, None, None, *args)


def _flatten(args: Arguments) -> Iterator[Any]:
    for argument in args:
        if isinstance(argument, tuple):
            yield from argument
        else:
            yield argument


def _width(number: int) -> int:
    """Return 0, 1 or 2 for what Triton passes as int32, int64 and uint64.

    Raises:
        TypeError: the number is a float.
    """
    return 0 if number >> 31 in (0, -1) else 1 if number < 2**63 else 2


def _device_index(flat: Arguments | Iterator[Any]) -> int:
    """Return the index of the first tensor's GPU, -1 for the CPU."""
    for argument in flat:
        if isinstance(argument, torch.Tensor):
            return argument.get_device()
        base = getattr(argument, "base", None)  # of a descriptor
        if isinstance(base, torch.Tensor):
            return base.get_device()
    return -1
