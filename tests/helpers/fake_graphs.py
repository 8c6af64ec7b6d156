"""Fake CUDA graphs for the CPU: a replay runs the step over the same fixed buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from llmfast.runner import graphs
from llmfast.runner.inputs import GraphKey


@dataclass
class FakeGraphs:
    """The keys of the steps that were captured and replayed, of all executors."""

    captured: list[GraphKey] = field(default_factory=list)
    replayed: list[GraphKey] = field(default_factory=list)


@dataclass
class _Replay:
    replay: Callable[[], None]


def use_fake_graphs(
    monkeypatch: pytest.MonkeyPatch, capture: Callable[[Any], None] | None = None
) -> FakeGraphs:
    """Let executors capture their steps as on a GPU. A step runs first, as for a CUDA graph.

    Args:
        capture: is called with each step before it is captured; it may raise.
    """
    made = FakeGraphs()

    class Capture:
        def __init__(self, device: torch.device) -> None:
            pass

        def __call__(self, step: partial[None]) -> _Replay:
            if capture is not None:
                capture(step)
            (key,) = step.args
            step()
            made.captured.append(key)

            def replay() -> None:
                made.replayed.append(key)
                step()

            return _Replay(replay)

        def held_memory(self) -> tuple[int, int]:
            return 0, 0

    for device in ("cpu", "cuda"):
        monkeypatch.setitem(graphs.CAPTURES, device, Capture)
    return made
