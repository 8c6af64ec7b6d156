"""Checkpoint formats: readers invert writers in every layout; golden bits are as published."""

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.loading.embedded import INSTALL, embedded_model_path
from llmfast.loading.gguf_file import GgufFile
from llmfast.weights.checkpoint_formats import (
    from_awq,
    from_compressed_tensors,
    from_gguf,
    from_gptq,
    to_awq,
    to_compressed_tensors,
    to_gguf,
    to_gptq,
)
from llmfast.weights.quantized import QuantizedWeight

SIZES = st.sampled_from([32, 64, 128, None])


def make(
    n: int,
    k: int,
    group_size: int | None,
    seed: int,
    *,
    bits: int = 4,
    zeros: bool = False,
    minima: bool = False,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
) -> QuantizedWeight:
    """Codes, scales (of either sign) and the rest at random; group_size None: per channel."""
    g = torch.Generator().manual_seed(seed)
    size = k if group_size is None else group_size
    groups = k // size

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(0, 2**bits, shape, generator=g, dtype=torch.uint8)

    g_idx = torch.arange(k, dtype=torch.int32) // size
    return QuantizedWeight(
        codes=draw(n, k),
        bits=bits,
        group_size=size,
        scales=torch.randn(n, groups, generator=g).to(dtype),
        zeros=draw(n, groups) if zeros else None,
        minima=torch.randn(n, groups, generator=g).to(dtype) if minima else None,
        g_idx=g_idx[torch.randperm(k, generator=g)] if act_order else None,
    )


def assert_equal(actual: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert (actual.bits, actual.group_size) == (expected.bits, expected.group_size)
    for name in ("codes", "scales", "zeros", "minima", "g_idx"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        if theirs is None:
            assert ours is None, name
        else:
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([8, 24]),
    st.sampled_from([128, 384]),
    SIZES,
    st.integers(0, 2**31),
    st.sampled_from([4, 8]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2]),
)
def test_gptq_there_and_back(n, k, size, seed, bits, zeros, act_order, version):
    act_order = act_order and size is not None and size < k  # one group has no order
    w = make(n, k, size, seed, bits=bits, zeros=zeros, act_order=act_order)
    tensors = to_gptq(w, version=version)
    assert tensors["qweight"].shape == (k * bits // 32, n)
    assert tensors["qzeros"].shape == (w.groups, n * bits // 32)
    back = from_gptq(tensors, bits=bits, version=version)
    assert_equal(back, w)
    assert_same_bits(to_gptq(back, version=version), tensors)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([8, 24]),
    st.sampled_from([128, 384]),
    SIZES,
    st.integers(0, 2**31),
    st.booleans(),
)
def test_awq_there_and_back(n, k, size, seed, zeros):
    w = make(n, k, size, seed, zeros=zeros)
    tensors = to_awq(w)
    assert tensors["qweight"].shape == (k, n // 8)
    assert tensors["qzeros"].shape == (w.groups, n // 8)
    assert_equal(from_awq(tensors), w)
    assert_same_bits(to_awq(from_awq(tensors)), tensors)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([1, 8, 13]),
    st.sampled_from([128, 384]),
    SIZES,
    st.integers(0, 2**31),
    st.sampled_from([4, 8]),
    st.booleans(),
    st.booleans(),
)
def test_compressed_tensors_there_and_back(n, k, size, seed, bits, zeros, act_order):
    act_order = act_order and size is not None and size < k  # one group has no order
    w = make(n, k, size, seed, bits=bits, zeros=zeros, act_order=act_order, dtype=torch.bfloat16)
    # if all zero points happen to be the middle, the weight is read as symmetric
    if w.zeros is not None and bool((w.zeros == 2 ** (bits - 1)).all()):
        return
    tensors = to_compressed_tensors(w)
    assert_equal(from_compressed_tensors(tensors, bits=bits), w)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9),
    st.sampled_from([32, 96]),
    st.integers(0, 2**31),
    st.sampled_from(["Q4_0", "Q4_1", "Q8_0"]),
)
def test_gguf_there_and_back_and_as_the_gguf_library_reads_it(n, k, seed, kind):
    w = make(n, k, 32, seed, bits=8 if kind == "Q8_0" else 4, minima=kind == "Q4_1")
    rows = to_gguf(w, kind)
    assert_equal(from_gguf(rows, kind), w)
    theirs = gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(w.dequantize(), torch.from_numpy(theirs))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_rows_of_the_gguf_library_are_read(kind):
    values = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    qtype = gguf.GGMLQuantizationType[kind]
    rows = gguf.quants.quantize(values, qtype)
    w = from_gguf(torch.from_numpy(rows), kind)
    assert torch.equal(w.dequantize(), torch.from_numpy(gguf.quants.dequantize(rows, qtype)))
    assert torch.equal(to_gguf(w, kind), torch.from_numpy(rows))


def test_the_embedded_models_own_bits():
    path = embedded_model_path()
    if path is None:
        pytest.skip(f"the embedded model is not installed: {INSTALL}")
    file = GgufFile(path)
    for name in ("blk.0.attn_q.weight", "blk.7.ffn_down.weight", "token_embd.weight"):
        info, raw = file.tensors[name], file.raw(name)[:64]
        w = from_gguf(torch.from_numpy(raw.copy()), info.type_name)
        theirs = torch.from_numpy(gguf.quants.dequantize(raw, info.type))
        assert torch.equal(w.dequantize(), theirs)
        assert torch.equal(to_gguf(w, info.type_name), torch.from_numpy(raw.copy()))


# --- golden values, written by hand from the layouts ---


def word(*nibbles: int) -> int:
    """Return an int32 of eight codes, the first in the lowest bits."""
    value = sum(code << 4 * place for place, code in enumerate(nibbles))
    return value - 2**32 if value >= 2**31 else value


def test_gptq_golden():
    """Output 0 has codes 0, 1, ..., 15, 0, ... along its inputs, every other output 3."""
    qweight = torch.full((4, 8), word(*[3] * 8), dtype=torch.int32)
    qweight[:, 0] = torch.tensor([0x76543210, word(*range(8, 16))] * 2)
    assert qweight[1, 0] == 0xFEDCBA98 - 2**32
    tensors = {
        "qweight": qweight,
        # zero points of outputs 0 to 7, minus one
        "qzeros": torch.tensor([[word(4, 0, 1, 2, 3, 14, 15, 7)]], dtype=torch.int32),
        "scales": torch.tensor([[0.5, 1, 1, 1, 1, 1, 1, 2]], dtype=torch.float16),
        "g_idx": torch.zeros(32, dtype=torch.int32),
    }
    w = from_gptq(tensors, bits=4, version=1)
    assert w.zeros is not None and w.zeros[:, 0].tolist() == [5, 1, 2, 3, 4, 15, 0, 8]
    assert w.codes[0].tolist() == [*range(16)] * 2
    assert w.dequantize()[0].tolist() == [0.5 * (code - 5) for code in range(16)] * 2
    assert w.dequantize()[7].tolist() == [2.0 * (3 - 8)] * 32
    v2 = from_gptq(tensors, bits=4, version=2)
    assert v2.zeros is not None and v2.zeros[:, 0].tolist() == [4, 0, 1, 2, 3, 14, 15, 7]


def test_gptq_symmetric_golden():
    """Zero points of 8 are stored as 7: the words 0x77777777 of every symmetric checkpoint."""
    w = make(8, 64, 32, 0)
    assert to_gptq(w, version=1)["qzeros"].tolist() == [[0x77777777]] * 2
    assert to_gptq(w, version=2)["qzeros"].tolist() == [[0x88888888 - 2**32]] * 2


def test_awq_golden():
    """A word whose nibbles count up belongs to outputs 0, 2, 4, 6, 1, 3, 5, 7 in this order."""
    tensors = {
        "qweight": torch.full((32, 1), 0x76543210, dtype=torch.int32),
        "qzeros": torch.tensor([[0x01234567]], dtype=torch.int32),
        "scales": torch.full((1, 8), 0.5, dtype=torch.float16),
    }
    w = from_awq(tensors)
    assert w.codes[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert w.zeros is not None and w.zeros[:, 0].tolist() == [7, 3, 6, 2, 5, 1, 4, 0]
    wanted = [-3.5, 0.5, -2.5, 1.5, -1.5, 2.5, -0.5, 3.5]
    assert w.dequantize()[:, 31].tolist() == wanted


def test_compressed_tensors_golden():
    """Signed codes -8 to 7 are stored plus 8; zero points likewise, packed along the outputs."""
    tensors = {
        "weight_packed": torch.tensor([[word(8, 9, 7, 0, 15, 8, 8, 8)] * 4] * 2).int(),
        "weight_scale": torch.tensor([[2.0], [0.25]], dtype=torch.bfloat16),
        "weight_shape": torch.tensor([2, 32]),
    }
    w = from_compressed_tensors(tensors, bits=4)
    assert w.symmetric
    assert w.dequantize()[0, :8].tolist() == [0, 2, -2, -16, 14, 0, 0, 0]
    assert w.dequantize()[1, 24:].tolist() == [0, 0.25, -0.25, -2, 1.75, 0, 0, 0]
    packed = tensors | {"weight_zero_point": torch.tensor([[word(9, 0)]]).int()}
    loose = tensors | {"weight_zero_point": torch.tensor([[1], [-8]], dtype=torch.int8)}
    for read in (packed, loose):
        w = from_compressed_tensors(read, bits=4)
        assert w.dequantize()[:, 3].tolist() == [-18, 0]
        assert_same_bits(to_compressed_tensors(w), packed)
    unset = tensors | {"weight_g_idx": torch.full((32,), -1, dtype=torch.int32)}
    assert from_compressed_tensors(unset, bits=4).g_idx is None


def test_gguf_golden():
    """Scale 2, minimum -1; byte i holds code i low and code i + 16 high."""
    block = [0x00, 0x40, 0x00, 0xBC, *(i | (15 - i) << 4 for i in range(16))]
    w = from_gguf(torch.tensor([block], dtype=torch.uint8), "Q4_1")
    assert w.codes.tolist() == [[*range(16), *range(15, -1, -1)]]
    assert w.dequantize()[0, :3].tolist() == [-1, 1, 3]
    q8 = from_gguf(torch.tensor([[0x00, 0x40, 0x80, 0xFF, 0x7F, *[0] * 29]]).byte(), "Q8_0")
    assert q8.dequantize()[0, :4].tolist() == [-256, -2, 254, 0]
    q4 = from_gguf(torch.tensor([[0x00, 0xC0, 0x9F, *[0x88] * 15]]).byte(), "Q4_0")
    assert q4.dequantize()[0, [0, 1, 16]].tolist() == [-14, 0, -2]  # a scale of -2


# --- refusals ---


def gptq(**changes: Any) -> dict[str, torch.Tensor]:
    tensors = to_gptq(make(8, 64, 32, 0, zeros=True), version=2) | changes
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"scales": None}, ValueError, ["scales is missing", "qweight"]),
        ({"qweight": torch.zeros(8, 8)}, TypeError, ["qweight must be int32", "float32"]),
        ({"qzeros": torch.zeros(2, 2).int()}, ValueError, ["zeros", "(8, 2)", "(16, 2)"]),
        ({"scales": torch.ones(3, 8).half()}, ValueError, ["3 groups", "64"]),
        ({"scales": torch.ones(2, 9).half()}, ValueError, ["scales", "8 columns", "9"]),
        ({"scales": torch.ones(4, 8).half()}, ValueError, ["group_size", "16"]),
        ({"g_idx": torch.zeros(64).int()}, ValueError, ["g_idx", "32 inputs"]),
    ],
)
def test_gptq_that_does_not_fit_is_refused(changes, error, words):
    with pytest.raises(error) as caught:
        from_gptq(gptq(**changes), bits=4, version=2)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: from_gptq(gptq(), bits=3, version=1), ["bits must be 4 or 8", "3"]),
        (lambda: from_gptq(gptq(), bits=4, version=3), ["version must be 1 or 2", "3"]),
        (lambda: to_gptq(make(8, 64, 32, 0, minima=True), version=1), ["float minima"]),
        (lambda: to_gptq(make(7, 64, 32, 0), version=1), ["7 codes", "whole words of 8"]),
        (lambda: to_awq(make(8, 64, 32, 0, bits=8)), ["4 bits", "8"]),
        (lambda: to_awq(make(8, 64, 32, 0, act_order=True)), ["no act-order"]),
        (lambda: to_awq(make(9, 64, 32, 0)), ["multiple of 8", "9"]),
        (lambda: from_awq({}), ["qweight is missing"]),
        (lambda: to_compressed_tensors(make(8, 64, 32, 0, minima=True)), ["float minima"]),
        (
            lambda: from_compressed_tensors(
                to_compressed_tensors(make(8, 64, 32, 0)) | {"weight_shape": torch.tensor([8, 72])},
                bits=4,
            ),
            ["weight_packed", "(8, 8)", "[8, 72]"],
        ),
        (lambda: from_gguf(torch.zeros(2, 19).byte(), "Q4_0"), ["blocks of 18 bytes", "(2, 19)"]),
        (lambda: from_gguf(torch.zeros(2, 18).byte(), "Q5_0"), ["Q4_0, Q4_1 or Q8_0", "Q5_0"]),
        (lambda: to_gguf(make(8, 64, 64, 0), "Q4_0"), ["groups of 32", "64"]),
        (lambda: to_gguf(make(8, 64, 32, 0, minima=True), "Q4_0"), ["Q4_0", "got", "minima"]),
        (lambda: to_gguf(make(8, 64, 32, 0), "Q4_1"), ["minima", "4 bits and none"]),
    ],
)
def test_a_weight_that_a_format_cannot_hold_is_refused(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert [word for word in words if word not in str(caught.value)] == [], caught.value
