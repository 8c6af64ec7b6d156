"""Time one patch in a process of its own: `python bench/tools/patch_once.py SHAPE` prints JSON."""

from __future__ import annotations

import json
import sys
import time

import torch

from llmfast.measure.shapes import random_model


def patch_seconds(shape: str) -> dict[str, float]:
    """Make the model and time one patch of it, with the imports and compilation that it causes."""
    from llmfast import patch

    cuda = torch.cuda.is_available()
    model = random_model(shape, torch.device("cuda" if cuda else "cpu"))
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    report = patch(model, ops=None if cuda else "all")  # on the CPU nothing is swapped by default
    if cuda:
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - started, "swapped": report.swapped}


if __name__ == "__main__":
    print(json.dumps(patch_seconds(sys.argv[1])))
