"""CachedLauncher: a variant is found by its key, only where Triton would compile the same one."""

import itertools
import random
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction, create_function_from_signature

import llmfast_kernels as ops
from llmfast_kernels.common import launch
from llmfast_kernels.common.launch import CachedLauncher, aligned, compilations
from llmfast_kernels.norm.reference import rms_norm_reference

STREAM = 7


class Pair(NamedTuple):
    ptr: Any
    stride: Any


def kernel(
    pair, other, x_ptr, y_ptr, wide: tl.int64, n, m, scale, MODE: tl.constexpr, SIZE: tl.constexpr
):
    pass


class Compiled(CompiledKernel):
    """Stands for a compiled variant: checks that each launch is one it was compiled for."""

    packed_metadata = "metadata"

    def __init__(self, jitted, spec):
        self.jitted, self.spec = jitted, spec
        self.function = None

    def __del__(self):
        """There is no GPU module to unload."""

    @property
    def run(self):
        self.function = "function"
        return self.launch

    def launch(self, x, y, z, stream, function, packed_metadata, metadata, enter, leave, *args):
        assert (stream, function, packed_metadata) == (STREAM, "function", "metadata")
        assert metadata is enter is leave is None
        self.check((x, y, z), args)

    def check(self, grid, args):
        assert self.jitted.specialization(args) == self.spec
        self.jitted.log.append(("again", grid))

    def __getitem__(self, grid):
        return lambda *args: self.check(("with hooks", *grid), args)


class Function(JITFunction):
    """Stands for a Triton function: looks at arguments as Triton does, and compiles nothing."""

    def __init__(self):
        super().__init__(kernel, do_not_specialize=["m"])
        backend = CUDABackend(GPUTarget("cuda", 90, 32))
        self.binder = create_function_from_signature(self.signature, self.params, backend)
        self.variants: dict[str, Compiled] = {}
        self.log: list[tuple[object, ...]] = []

    def specialization(self, args):
        return str(self.binder(*args)[1])

    def __getitem__(self, grid):
        def run(*args, **options):
            self.log.append(("first", grid, options))
            spec = self.specialization(args)
            return self.variants.setdefault(spec + str(options), Compiled(self, spec))

        return run


@pytest.fixture
def function(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # that of tensors on the CPU
    active = SimpleNamespace(get_current_stream=lambda device: STREAM)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    return Function()


def aligned_tensor(*shape, dtype=torch.float16):
    x = torch.zeros(4096, dtype=torch.uint8)
    return x[-x.data_ptr() % 16 :][:2048].view(dtype)


X = aligned_tensor()
Y = X[1:]  # 2 bytes further on
ARGS = (Pair(X, 64), Pair(None, 0), X, None, 32, 48, 5, 0.5, "mode", 16)


def test_the_second_launch_goes_past_triton(function):
    launcher = CachedLauncher(function)
    launcher((3,), ARGS, num_warps=4)
    launcher((5, 2), ARGS, num_warps=4)
    launcher((7,), ARGS, num_warps=8)
    assert function.log == [
        ("first", (3,), {"num_warps": 4}),
        ("again", (5, 2, 1)),
        ("first", (7,), {"num_warps": 8}),
    ]


def test_a_profilers_hook_is_called(function, monkeypatch):
    chain = SimpleNamespace(calls=["a profiler's"])
    launcher = CachedLauncher(function)
    launcher((3,), ARGS)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", chain)
    launcher((3,), ARGS)
    assert function.log[1] == ("again", ("with hooks", 3, 1, 1))


def test_arguments_of_other_types_in_turn(function):
    """Types that launches take in turn are told apart, whichever the latest were."""
    launcher = CachedLauncher(function)
    for _ in range(2):
        for x in (X, None):
            for scale in (0.5, None):
                launcher((1,), (*ARGS[:3], x, *ARGS[4:7], scale, *ARGS[8:]))
    assert [entry[0] for entry in function.log] == ["first"] * 4 + ["again"] * 4


def test_numbers_that_triton_compiles_alike_share_a_variant(function):
    launcher = CachedLauncher(function)
    for stride, wide, n, m, scale in ((64, 32, 48, 5, 0.5), (80, 16, 16, 1, 1.0), (0, 0, 0, 16, 2)):
        pair = Pair(aligned_tensor(), stride)
        args = (pair, Pair(None, stride), X, None, wide, n, m, float(scale), "mode", 16)
        launcher((1,), args)
    assert [entry[0] for entry in function.log] == ["first", "again", "again"]


def test_no_key_stands_for_two_of_tritons_variants(function):
    """Random arguments: a launch past Triton meets the variant that Triton would have taken."""
    dice = random.Random(0)
    tensors = [X, Y, X[8:], aligned_tensor(dtype=torch.bfloat16), torch.nn.Parameter(X.clone())]
    numbers = [0, 1, 2, 16, 17, 2**31, 2**31 + 16, 2**63, -16, -1]
    optional = [*tensors, None]
    choices = [
        [Pair(*both) for both in itertools.product(tensors, numbers)],
        [Pair(*both) for both in itertools.product(optional, [*numbers, None])],
        tensors,
        optional,
        numbers[:7],
        [*numbers, 0.5, None],
        [*numbers, 0.5, None],
        [0.5, 1.0, 1, None],
        ["mode", None, 1],
        [16, 32],
    ]
    launcher = CachedLauncher(function)
    for _ in range(5000):
        args = list(ARGS)
        for place in dice.choices(range(len(args)), k=2):
            args[place] = dice.choice(choices[place])
        launcher((1,), tuple(args), num_warps=dice.choice([4, 8]))
    again = sum(entry[0] == "again" for entry in function.log)
    assert 500 < again < 4500


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, Pair(Y, 64)),
        (0, Pair(X.view(torch.bfloat16), 64)),
        (0, Pair(X, 1)),
        (0, Pair(X, 2**33)),
        (1, Pair(X, 0)),
        (2, Y),
        (3, X),
        (5, 1),
        (5, 17),
        (6, 2**31),
        (7, 1),
        (8, "other"),
        (9, 32),
    ],
)
def test_one_other_argument_is_another_variant(function, place, value):
    launcher = CachedLauncher(function)
    for args in (ARGS, (*ARGS[:place], value, *ARGS[place + 1 :])):
        launcher((1,), args)
    assert [entry[0] for entry in function.log] == ["first", "first"]


def test_descriptors_differ_by_dtype_block_and_layout(function):
    swizzled, narrow = (
        gl.NVMMASharedLayout(swizzle, element_bitwidth=16, rank=2) for swizzle in (128, 64)
    )
    wide = X[:512].view(8, 64)
    launcher = CachedLauncher(function)
    for x, block, layout in (
        (wide, [8, 64], swizzled),
        (wide[:4], [8, 64], swizzled),
        (wide, [4, 64], swizzled),
        (wide, [8, 64], narrow),
        (wide.view(torch.bfloat16), [8, 64], swizzled),
    ):
        descriptor = TensorDescriptor(x, list(x.shape), [64, 1], block, layout)
        launcher((1,), (*ARGS[:2], descriptor, *ARGS[3:]))
    assert [entry[0] for entry in function.log] == ["first", "again", "first", "first", "first"]


def test_each_variant_is_counted_once(function):
    before = compilations()
    launcher = CachedLauncher(function)
    for m, warps in itertools.product((5, 7), (4, 8)):
        launcher((1,), (*ARGS[:6], m, *ARGS[7:]), num_warps=warps)
    assert compilations() - before == {"kernel": 2}


def test_on_amd_triton_always_looks(function, monkeypatch):
    """There it specializes on more than a key can tell: the size of a tensor's storage."""
    monkeypatch.setattr(torch.version, "hip", "6.3")
    launcher = CachedLauncher(function)
    for _ in range(2):
        launcher((1,), ARGS)
    assert [entry[0] for entry in function.log] == ["first", "first"]


def test_an_argument_of_unknown_kind_is_left_to_triton(function):
    launcher = CachedLauncher(function)
    for _ in range(2):
        launcher((1,), (*ARGS[:7], tl.constexpr(5), *ARGS[8:]))
    assert [entry[0] for entry in function.log] == ["first", "first"]


def test_in_the_interpreter_nothing_is_kept():
    log = []

    class Interpreted:
        def __getitem__(self, grid):
            return lambda *args, **options: log.append((grid, args, options))

    launcher = CachedLauncher(Interpreted(), pdl=True)
    for _ in range(2):
        launcher((1,), (X, 2), num_warps=4)
    assert [(grid, args[1]) for grid, args, _ in log] == [((1,), 2)] * 2


def test_the_launch_is_on_the_tensors_device(function, monkeypatch):
    entered = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", Device)
    launcher = CachedLauncher(function)
    for _ in range(2):
        launcher((1,), ARGS)
    assert [entry[0] for entry in function.log] == ["first", "again"]
    assert entered == [-1, -1]


def test_aligned_looks_at_every_pointer():
    assert aligned(X) and aligned(X, None, X[8:])
    assert not aligned(Y) and not aligned(X, Y)


def test_grouped_arguments_come_first(function):
    launcher = CachedLauncher(function)
    with pytest.raises(TypeError, match="grouped arguments"):
        launcher((1,), (*ARGS[:3], Pair(X, 1), *ARGS[4:]))


@pytest.mark.gpu
def test_an_integer_epsilon_is_a_number_like_any_other():
    """Triton compiles the integer 1 in; the next epsilon must not meet that variant."""
    x, weight = torch.randn(2, 256, device="cuda"), torch.randn(256, device="cuda")
    for eps in (1, 1e-6, 3):
        y = ops.rms_norm(x[:1], weight, eps=eps)
        torch.testing.assert_close(y, rms_norm_reference(x[:1], weight, eps=eps))


@pytest.mark.gpu
@pytest.mark.parametrize("order", [(0, 1, 0), (1, 0, 1)])
def test_aligned_and_unaligned_tensors_in_turn(order):
    """A variant compiled for aligned pointers reads wrong or faults on others."""
    buffer = torch.randn(4097, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
    for offset in order:
        x = buffer[offset : offset + 4096]
        y = ops.rms_norm(x, weight, eps=1e-6)
        expected = rms_norm_reference(x, weight, eps=1e-6)
        torch.testing.assert_close(y, expected, rtol=2**-7, atol=0)
