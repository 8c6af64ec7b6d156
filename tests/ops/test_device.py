"""The device record: where its facts come from, on CUDA, ROCm and without a GPU."""

from types import SimpleNamespace

import pytest
import torch
import triton

from llmfast_kernels.common.device import INTERPRETER, device_at, device_of


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that stands a GPU of some properties in for index 0."""

    def stand_in(hip=None, **properties):
        device_at.cache_clear()
        limits = {"multiprocessor_count": 104, "max_shared_mem": 65536}
        utils = SimpleNamespace(get_device_properties=lambda index: limits)
        driver = SimpleNamespace(active=SimpleNamespace(utils=utils))
        found = SimpleNamespace(name="a GPU", L2_cache_size=8 * 2**20, **properties)
        monkeypatch.setattr(triton.runtime, "driver", driver)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
        monkeypatch.setattr(torch.version, "hip", hip)
        return device_at(0)

    yield stand_in
    device_at.cache_clear()


def test_hopper(gpu):
    device = gpu(major=9, minor=0)
    assert (device.arch, device.is_hopper) == ("sm_90", True)
    assert (device.sm_count, device.shared_memory, device.l2_bytes) == (104, 65536, 8 * 2**20)
    assert device_at(0) is device


def test_ampere_is_not_hopper(gpu):
    device = gpu(major=8, minor=6)
    assert (device.arch, device.is_hopper) == ("sm_86", False)


def test_an_amd_gpu_of_capability_9_0_is_not_hopper(gpu):
    device = gpu(hip="6.3", major=9, minor=0, gcnArchName="gfx90a:sramecc+:xnack-")
    assert (device.arch, device.is_hopper) == ("gfx90a", False)


def test_the_cpu_is_the_interpreter():
    assert device_of(torch.empty(1)) is INTERPRETER
    assert not INTERPRETER.is_hopper
