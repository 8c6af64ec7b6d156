"""How cache groups share memory, against the bytes that a cache takes."""

import pytest
import torch

from llmfast.runner import memory
from llmfast.runner.cache import LayerCache, PagedCache, group_windows
from llmfast.runner.memory import count_blocks, group_blocks

SIZES = {"block_size": 16, "max_num_seqs": 4, "max_num_batched_tokens": 48}


def layers(*windows):
    return [LayerCache(2, 8, 8, torch.float32, window) for window in windows]


class Model:
    device = torch.device("cpu")

    def __init__(self, *windows):
        self.layer_caches = layers(*windows)


def test_layers_of_one_window_are_a_group_and_full_attention_is_the_first():
    assert group_windows(layers(None, None)) == [None]
    assert group_windows(layers(8, 8)) == [8]
    assert group_windows(layers(8, 64, None, 8)) == [None, 64, 8]
    grouped = PagedCache(layers(8, 64, None, 8), [5, 4, 3], torch.device("cpu"))
    assert grouped.group_of == [2, 1, 0, 2] and grouped.num_blocks == 5
    assert [len(keys) for keys in grouped.keys] == [3, 4, 5, 3]
    whole = PagedCache(layers(8, 64, None, 8), 5, torch.device("cpu"))
    assert whole.group_of == [0] * 4 and {len(keys) for keys in whole.keys} == {5}


def test_copies_are_of_one_group():
    cache = PagedCache(layers(8, None), [3, 3], torch.device("cpu"))
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.arange(3.0)[:, None, None, None])
    cache.copy(0, torch.tensor([2]), torch.tensor([0]))
    assert [keys[0, 0, 0, 0].item() for keys in cache.keys] == [0, 2]
    assert [values[0, 0, 0, 0].item() for values in cache.values] == [0, 2]


def test_a_windowed_group_has_what_its_sequences_can_need_and_no_more_than_the_first():
    most = 4 * (2 + 3) + 2 * 3
    assert group_blocks(layers(None, 20), 1000, **SIZES) == [1000, most]
    assert group_blocks(layers(None, 20), 7, **SIZES) == [7, 7]
    assert group_blocks(layers(20), 1000, **SIZES) == [1000]


@pytest.mark.parametrize("windows", [(None,), (None, None, 20), (20, None, 40), (20, 20)])
@pytest.mark.parametrize("room", [2048, 5000, 100_000, 1_000_000])
def test_the_first_group_has_the_most_blocks_that_fit(windows, room, monkeypatch):
    monkeypatch.setattr(memory, "CPU_CACHE_BYTES", room)
    model = Model(*windows)
    found = count_blocks(model, utilization=0.9, max_model_len=10**6, **SIZES)

    def taken(blocks):
        counts = group_blocks(model.layer_caches, blocks, **SIZES)
        return PagedCache(model.layer_caches, counts, model.device, 16).nbytes

    assert (taken(found) <= room or found == 1) and taken(found + 1) > room
