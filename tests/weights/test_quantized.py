"""The neutral form: its values, and the arguments that it refuses."""

import pytest
import torch

from llmfast.weights.quantized import QuantizedWeight


def make(**changes):
    parts = {
        "codes": (torch.arange(2 * 64) % 16).view(2, 64).to(torch.uint8),
        "bits": 4,
        "group_size": 32,
        "scales": torch.tensor([[1.0, 2.0], [0.5, -3.0]], dtype=torch.float16),
    }
    return QuantizedWeight(**(parts | changes))


def test_the_values_of_each_kind():
    w = make()
    assert w.symmetric and w.shape == (2, 64) and w.groups == 2
    assert w.dequantize()[1, 31].item() == 0.5 * (15 - 8)
    assert w.dequantize()[1, 32].item() == -3.0 * (0 - 8)
    zeros = torch.tensor([[0, 1], [2, 15]], dtype=torch.uint8)
    w = make(zeros=zeros)
    assert not w.symmetric
    assert w.dequantize()[:, [0, 63]].tolist() == [[0, 28], [-1, 0]]
    minima = torch.tensor([[0.25, 1], [2, 15]], dtype=torch.float16)
    assert make(minima=minima).dequantize()[:, [1, 62]].tolist() == [[1.25, 29], [2.5, -27]]


def test_act_order_gives_each_input_its_group():
    g_idx = torch.tensor([1, 0] * 32, dtype=torch.int32)
    w = make(g_idx=g_idx)
    scales = w.scales.float()
    for j in (0, 1, 40, 63):
        wanted = scales[:, g_idx[j]] * (w.codes[:, j].float() - 8)
        assert torch.equal(w.dequantize()[:, j], wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dequantized_once_rounded(dtype):
    """float32 holds a product of an 11-bit scale and a 4-bit code, so one rounding is left."""
    torch.manual_seed(0)
    scales = torch.randn(2, 2).half()
    exact = scales.double().repeat_interleave(32, 1) * (make().codes.double() - 8)
    out = make(scales=scales).dequantize(dtype)
    assert out.dtype == dtype and torch.equal(out, exact.to(dtype))


def test_float64_is_computed_in_float64():
    third = torch.full((2, 2), 1 / 3)
    w = make(scales=third, minima=torch.full((2, 2), 1e-3))
    exact = third[0, 0].double() * w.codes.double() + torch.tensor(1e-3).double()
    assert torch.equal(w.dequantize(torch.float64), exact)
    assert not torch.equal(w.dequantize().double(), exact)


@pytest.mark.parametrize("kind", ["symmetric", "zeros", "minima"])
def test_rows_are_those_of_the_values(kind):
    extra = {
        "zeros": {"zeros": torch.tensor([[0, 1], [2, 15]], dtype=torch.uint8)},
        "minima": {"minima": torch.tensor([[0.25, 1], [2, 15]], dtype=torch.float16)},
    }.get(kind, {})
    w = make(g_idx=torch.tensor([0, 1] * 32).int(), **extra)
    index = torch.tensor([1, 0, 1])
    assert torch.equal(w.rows(index).dequantize(), w.dequantize()[index])


def test_moved_is_the_same():
    w = make(zeros=torch.ones(2, 2).byte(), g_idx=torch.tensor([0, 1] * 32).int())
    assert torch.equal(w.to("cpu").dequantize(), w.dequantize())


BAD = {
    "bits": ({"bits": 3}, ValueError, ["bits must be 4 or 8", "3"]),
    "no scales": ({"scales": None}, ValueError, ["scales are missing"]),
    "codes' dtype": ({"codes": torch.zeros(2, 64).int()}, TypeError, ["uint8", "int32"]),
    "codes' shape": ({"codes": torch.zeros(64).byte()}, ValueError, ["[n, k]", "(64,)"]),
    "unknown group": ({"group_size": 16}, ValueError, ["32, 64, 128 or all 64", "16"]),
    "group": ({"group_size": 128}, ValueError, ["128 does not divide the 64"]),
    "scales' dtype": ({"scales": torch.ones(2, 2).double()}, TypeError, ["float32", "float64"]),
    "scales' shape": ({"scales": torch.ones(2, 3)}, ValueError, ["scales", "(2, 2)", "(2, 3)"]),
    "infinite": ({"scales": torch.tensor([[1, 1], [1, torch.inf]])}, ValueError, ["finite"]),
    "zeros' shape": ({"zeros": torch.ones(2, 1).byte()}, ValueError, ["zeros", "(2, 1)"]),
    "zeros' dtype": ({"zeros": torch.ones(2, 2)}, TypeError, ["zeros must be uint8"]),
    "zeros' value": ({"zeros": torch.full((2, 2), 16).byte()}, ValueError, ["less than 16"]),
    "code's value": ({"codes": torch.full((2, 64), 16).byte()}, ValueError, ["codes", "16"]),
    "minima's dtype": ({"minima": torch.ones(2, 2)}, TypeError, ["float16", "float32"]),
    "both": (
        {"minima": torch.ones(2, 2).half(), "zeros": torch.ones(2, 2).byte()},
        ValueError,
        ["exclude each other"],
    ),
    "g_idx's dtype": ({"g_idx": torch.arange(64) // 32}, TypeError, ["g_idx", "int32"]),
    "g_idx's shape": ({"g_idx": torch.zeros(32).int()}, ValueError, ["(64,)", "(32,)"]),
    "g_idx's value": ({"g_idx": torch.full((64,), 2).int()}, ValueError, ["from 0 to 1", "2"]),
    "g_idx's share": ({"g_idx": torch.zeros(64).int()}, ValueError, ["32 inputs into each"]),
}


@pytest.mark.parametrize("name", BAD)
def test_an_invalid_weight_is_refused(name):
    changes, error, words = BAD[name]
    with pytest.raises(error) as caught:
        make(**changes)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_integers_are_no_dtype_to_dequantize_to():
    with pytest.raises(TypeError, match="floating type"):
        make().dequantize(torch.int8)
