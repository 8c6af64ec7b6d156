"""Programmatic dependent launch: on which devices it is asked for."""

import pytest
import torch
from triton import knobs

from llmfast_kernels.common.pdl import pdl_options


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(knobs.runtime, "interpret", False)


def test_from_hopper_on(hopper, monkeypatch):
    assert pdl_options() == {"launch_pdl": True}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert pdl_options() == {}


@pytest.mark.parametrize(
    ("of", "name", "value"),
    [
        (torch.version, "hip", "6.3"),
        (torch.cuda, "is_available", lambda: False),
        (knobs.runtime, "interpret", True),
    ],
    ids=["on AMD", "without a GPU", "in the interpreter"],
)
def test_not(hopper, monkeypatch, of, name, value):
    monkeypatch.setattr(of, name, value)
    assert pdl_options() == {}
