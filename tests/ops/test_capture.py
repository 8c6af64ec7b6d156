"""Which capture of a CUDA graph is going on."""

from types import SimpleNamespace

import pytest
import torch

from llmfast_kernels.common import capture
from llmfast_kernels.common.capture import stream_and_capture

CUDA = torch.device("cuda", 0)


@pytest.fixture
def capturing(monkeypatch):
    """Stand for a GPU whose current stream 5 is being captured."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def test_a_cpu_captures_nothing():
    assert stream_and_capture(torch.device("cpu")) == (0, None)


def test_the_driver_tells_the_id(capturing, monkeypatch):
    def query(stream, status, found, *others):
        asked.append(stream.value)
        found._obj.value = 2**40 + 7
        return error

    asked, error = [], 0
    monkeypatch.setattr(capture, "_query", lambda: query)
    assert stream_and_capture(CUDA) == (5, 2**40 + 7)
    assert asked == [5]
    error = 400
    with pytest.raises(RuntimeError, match="failed with error 400"):
        stream_and_capture(CUDA)


def test_without_a_driver_that_tells_no_two_calls_are_of_one_capture(capturing, monkeypatch):
    monkeypatch.setattr(capture, "_query", lambda: None)
    first, second = stream_and_capture(CUDA), stream_and_capture(CUDA)
    assert first[0] == second[0] == 5
    assert None not in (first[1], second[1]) and first[1] != second[1]


@pytest.mark.gpu
def test_two_graphs_have_two_ids():
    found = [stream_and_capture(CUDA)[1]]
    for _ in range(2):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            found += [stream_and_capture(CUDA)[1] for _ in range(2)]
            torch.zeros(1, device=CUDA)
    assert found[0] is None and None not in found[1:]
    assert found[1] == found[2] != found[3] == found[4]
