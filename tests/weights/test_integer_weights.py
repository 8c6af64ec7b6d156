"""Packed weights compute what the dequantized ones do; concatenated layers are one."""

import pytest
import torch
from torch.nn.functional import linear

from llmfast.weights.quantized import QuantizedWeight
from llmfast.weights.registry import pack

KINDS = ["symmetric", "zeros", "minima"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(n=24, k=128, group_size=32, kind="symmetric", order=False, seed=0, bits=4):
    gen = torch.Generator().manual_seed(seed)
    groups = k // group_size
    g_idx = (torch.arange(k) // group_size)[torch.randperm(k, generator=gen)]
    return QuantizedWeight(
        codes=torch.randint(0, 2**bits, (n, k), generator=gen, dtype=torch.uint8),
        bits=bits,
        group_size=group_size,
        scales=(torch.rand(n, groups, generator=gen) / 10 + 0.01).half(),
        zeros=torch.randint(0, 16, (n, groups), generator=gen, dtype=torch.uint8)
        if kind == "zeros"
        else None,
        minima=-torch.rand(n, groups, generator=gen).half() if kind == "minima" else None,
        g_idx=g_idx.int() if order else None,
    )


def assert_multiplies(packed, w, bias=None):
    """Sums in float32 of some hundred products."""
    x = torch.randn(3, 5, w.shape[1], generator=torch.Generator().manual_seed(9))
    wanted = linear(x.double(), w.dequantize(torch.float64))
    wanted = wanted if bias is None else wanted + bias.double()
    got = packed.linear(x, bias)
    assert got.dtype == torch.float32 and got.shape == wanted.shape
    torch.testing.assert_close(
        got.double(), wanted, rtol=0, atol=2**-20 * float(wanted.abs().max())
    )


@each_kind
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize(("k", "group_size"), [(128, 32), (192, 64), (256, 128), (72, 72)])
def test_a_packed_weight_is_the_same_layer(k, group_size, order, bits, kind):
    w = make(k=k, group_size=group_size, kind=kind, order=order, bits=bits)
    packed = pack(w, torch.float32)
    assert (packed.n, packed.k) == w.shape
    assert_multiplies(packed, w)
    assert_multiplies(packed, w, torch.randn(packed.n))


@each_kind
@pytest.mark.parametrize("bits", [4, 8])
def test_float16_scales_stay_in_a_bfloat16_model(kind, bits):
    w = make(kind=kind, bits=bits)
    packed = pack(w, torch.bfloat16)
    assert packed.scales.dtype == torch.float16 and torch.equal(packed.scales, w.scales)
    assert torch.equal(packed.dequantize(), w.dequantize(torch.bfloat16))  # rounded once
    x = torch.randn(3, w.shape[1], generator=torch.Generator().manual_seed(9)).bfloat16()
    wanted = linear(x.double(), w.dequantize(torch.float64))
    assert torch.equal(packed.linear(x), wanted.bfloat16())
    assert pack(w, torch.float32).scales.dtype == torch.float32


def test_bytes_are_those_of_all_tensors():
    packed = pack(make(kind="zeros", order=True), torch.float16)
    codes, groups = 24 * 128 // 2, 24 * 4
    assert packed.nbytes == codes + 2 * groups + groups + 8 * 128
    packed = pack(make(kind="minima"), torch.float32)
    assert packed.nbytes == codes + 2 * 4 * groups
    packed = pack(make(bits=8), torch.float16)
    assert packed.nbytes == 2 * codes + 2 * groups


@pytest.mark.parametrize("bits", [4, 8])
@each_kind
def test_rows_are_a_view(kind, bits):
    w = make(kind=kind, bits=bits)
    packed = pack(w, torch.float32)
    rows = packed.rows(5, 9)
    assert (rows.n, rows.k) == (4, 128)
    assert rows.codes.untyped_storage().data_ptr() == packed.codes.untyped_storage().data_ptr()
    assert_multiplies(rows, w.rows(torch.arange(5, 9)))


@each_kind
@pytest.mark.parametrize("order", [False, True], ids=["in order", "act-order"])
def test_concatenated_is_one_layer_of_all_rows(kind, order):
    first = make(kind=kind, order=order)
    second = make(n=8, kind="symmetric" if kind == "zeros" else kind, seed=0, order=order)
    both = first.concatenate([second])
    assert both.shape == (32, 128)
    wanted = torch.cat([first.dequantize(), second.dequantize()])
    assert torch.equal(both.dequantize(), wanted)
    assert first.concatenate([]) is first


@pytest.mark.parametrize(
    "other",
    [
        make(k=256),
        make(group_size=64),
        make(kind="minima"),
        make(order=True),
        make(bits=8),
    ],
    ids=["inputs", "groups", "minima", "act-order", "bits"],
)
def test_other_forms_are_not_concatenated(other):
    with pytest.raises(ValueError, match="different forms"):
        make().concatenate([other])
    with pytest.raises(ValueError, match="different forms"):
        make(order=True).concatenate([make(order=True, seed=1)])


def test_scales_too_large_for_the_dtype_are_refused():
    w = make()
    large = QuantizedWeight(w.codes, 4, 32, w.scales.float() * 1e8)
    with pytest.raises(ValueError, match="scales are too large"):
        pack(large, torch.float16)
