"""Values of parameters are replaced in one module only, and restored exactly."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

from llmfast.weights.parameters import MergedParameters, free_value, replaced

ROOT = Path(__file__).parents[2]


def test_no_other_module_assigns_the_data_of_a_parameter():
    """``x.data = ...``, also among other targets, in loops and ``with``; and ``set_``."""
    found = []
    for path in sorted((ROOT / "llmfast").rglob("*.py")):
        if path.match("weights/parameters.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if stored and node.attr == "data":
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr == "set_" or (
                    node.func.attr == "setattr" and "data" in ast.dump(node)
                ):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def test_replaced_values_come_back_after_an_exception():
    layer = nn.Linear(3, 2)
    weight, data = layer.weight, layer.weight.data
    with pytest.raises(RuntimeError), replaced({weight: torch.ones(2, 3)}):
        assert layer.weight is weight and bool((weight == 1).all())
        raise RuntimeError
    assert weight.data_ptr() == data.data_ptr()


def test_a_freed_value_has_the_shape_and_no_memory():
    weight = nn.Parameter(torch.ones(4, 3, dtype=torch.float16))
    free_value(weight)
    assert weight.shape == (4, 3) and weight.dtype == torch.float16
    assert weight.untyped_storage().nbytes() == 2 and bool(weight.isnan().all())


def test_merged_parameters_are_views_until_they_are_restored():
    layers = [nn.Linear(3, 2), nn.Linear(3, 4)]
    values = [layer.weight.detach().clone() for layer in layers]
    merged = MergedParameters([layer.weight for layer in layers])
    assert torch.equal(merged.tensor, torch.cat(values))
    layers[1].weight.data.add_(1)  # in both
    assert torch.equal(merged.tensor[2:], values[1] + 1)
    layers[0].weight = nn.Parameter(values[0])  # replaced since: it is left alone
    merged.restore()
    assert layers[1].weight.untyped_storage().nbytes() == values[1].nbytes
    assert torch.equal(layers[1].weight, values[1] + 1)


def test_a_single_parameter_is_not_copied():
    layer = nn.Linear(3, 2)
    data = layer.weight.data
    merged = MergedParameters([layer.weight])
    merged.restore()
    assert merged.tensor.data_ptr() == data.data_ptr() == layer.weight.data_ptr()
