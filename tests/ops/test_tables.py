"""Launch constants by GPU, and state by stream."""

from types import SimpleNamespace

import torch

from llmfast_kernels.common.device import Device
from llmfast_kernels.common.streams import PerStream
from llmfast_kernels.common.tables import GpuTable


def gpu(arch, sm_count, name="a GPU"):
    return Device(name, arch, sm_count, shared_memory=0, l2_bytes=0)


def test_a_gpu_takes_the_nearest_row():
    table = GpuTable(
        {("sm_90", 132): "H100", ("sm_90", 78): "H20", ("sm_80", 108): "A100"},
        default="default",
        by_name={"NVIDIA H200": "H200"},
    )
    assert table.of(gpu("sm_90", 132, "NVIDIA H100 PCIe")) == "H100"
    assert table.of(gpu("sm_90", 114)) == "H100"
    assert table.of(gpu("sm_90", 80)) == "H20"
    assert table.of(gpu("sm_90", 132, "NVIDIA H200")) == "H200"
    assert table.of(gpu("sm_80", 56)) == "A100"
    assert table.of(gpu("sm_120", 170)) == "default"


def test_streams_share_nothing(monkeypatch):
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    one, other, cpu = torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu")
    made = []
    lists = PerStream(lambda device: made.append(device) or [])
    first = lists.of(one)
    assert lists.of(one) is first
    stream.cuda_stream = 8
    assert lists.of(one) is not first and lists.of(other) is not first
    assert lists.of(cpu) is lists.of(cpu)
    assert made == [one, one, other, cpu]
