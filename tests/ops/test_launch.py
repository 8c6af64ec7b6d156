"""CachedLauncher: a variant is found by its key, only where Triton would compile the same one."""

import pytest
import torch
from triton.compiler import CompiledKernel

import llmfast_kernels as ops
from llmfast_kernels.common.launch import CachedLauncher, aligned, compiled
from llmfast_kernels.norm.reference import rms_norm_reference


class Compiled(CompiledKernel):
    def __init__(self, log):
        self.log = log

    def __del__(self):
        """There is no GPU module to unload."""

    def __getitem__(self, grid):
        return lambda *args: self.log.append(("again", grid, args))


class Function:
    """Stands for a Triton function: notes its launches, returns what it compiled."""

    def __init__(self, returns=None):
        self.log = []
        self.returns = returns or (lambda: Compiled(self.log))

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.log.append(("first", grid, args, options))
            return self.returns()

        return launch


def test_the_second_launch_with_a_key_goes_past_triton():
    function = Function()
    relaunch = CachedLauncher(function)
    relaunch((3,), "key", (1, 2), num_warps=4)
    relaunch((5, 2), "key", (3, 4), num_warps=4)
    relaunch((7,), "other", (5,), num_warps=8)
    assert function.log == [
        ("first", (3,), (1, 2), {"num_warps": 4}),
        ("again", (5, 2, 1), (3, 4)),
        ("first", (7,), (5,), {"num_warps": 8}),
    ]


def test_each_variant_is_noted_once():
    before = len(compiled)
    function = Function()
    function.__name__ = "kernel"
    relaunch = CachedLauncher(function)
    for key in ("key", "key", "other", None):
        relaunch((1,), key, (0,))
    assert compiled[before:] == ["kernel"] * 3
    same = Compiled([])
    known = CachedLauncher(Function(returns=lambda: same))
    for key in ("one", "another", None):
        known((1,), key, (0,))
    assert len(compiled) == before + 4


def test_without_a_key_and_in_the_interpreter_triton_always_looks():
    compiles, interprets = Function(), Function(returns=lambda: None)
    for function, key in ((compiles, None), (interprets, "key")):
        relaunch = CachedLauncher(function)
        for _ in range(2):
            relaunch((1,), key, (0,))
        assert [entry[0] for entry in function.log] == ["first", "first"]


def test_aligned_looks_at_every_pointer():
    x = torch.zeros(64, dtype=torch.float16)
    start = -x.data_ptr() % 16 // 2
    whole, shifted = x[start:], x[start + 1 :]
    assert aligned(whole) and aligned(whole, x[start + 8 :])
    assert not aligned(shifted) and not aligned(whole, shifted)


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
