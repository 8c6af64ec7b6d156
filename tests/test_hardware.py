"""Facts about the GPU come from its driver."""

from types import SimpleNamespace

import pytest
import torch

from llmfast.hardware import gpu_of


def test_a_cpu_is_no_gpu():
    assert gpu_of(torch.device("cpu")) is None


@pytest.mark.parametrize(("width", "clock"), [(5120, 2_619_000), (0, 0)])
def test_bandwidth_is_bus_width_times_clock(width, clock, monkeypatch):
    """The first are the figures of an H100 SXM: 3.35 TB/s."""
    found = SimpleNamespace(
        name="Some GPU",
        major=9,
        minor=0,
        gcnArchName="",
        multi_processor_count=132,
        total_memory=80 * 2**30,
        memory_bus_width=width,
        memory_clock_rate=clock,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.version, "hip", None)
    gpu = gpu_of(torch.device("cuda", 0))
    assert gpu is not None and (gpu.arch, gpu.sm_count) == ("sm_90", 132)
    if width:
        assert gpu.bandwidth == pytest.approx(3.352e12, rel=1e-3)
        assert gpu.read_seconds(3_017_000_000) == pytest.approx(1e-3, rel=1e-3)
    else:
        assert gpu.bandwidth is None and gpu.read_seconds(1) is None


@pytest.mark.gpu
def test_the_bandwidth_of_this_gpu_is_plausible(device):
    gpu = gpu_of(device)
    assert gpu is not None and gpu.bandwidth is not None
    assert 1e11 < gpu.bandwidth < 1e14
