"""The time patch(model) takes, of a model of the Llama-3.1-8B shape with random weights.

As a script it is the process that times one patch: `python bench/bench_patch.py` prints JSON.
`llmfast bench decode` times what the patched model does.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from llmfast.measure.figures import make_row
from llmfast.measure.results import format_case
from llmfast.measure.shapes import random_model
from llmfast.measure.stats import Estimate

SHAPE = "llama-3.1-8b"


def bench_patch(recorder, tmp_path):
    """In a process of its own each time: first with no compiled kernel, then with all.

    Only Triton's cache is emptied; the files of torch and CUDA may be in the system's memory.
    """
    torch.cuda.empty_cache()  # the child's model needs the room
    for start in ("cold", "warm"):
        seconds = _child_seconds(tmp_path / "triton")
        case = format_case({"shape": SHAPE, "start": start})
        row = make_row(case, "llmfast", "s", Estimate(seconds, seconds, seconds), 1)
        recorder.add("patch", row)


def _child_seconds(triton_cache: Path) -> float:
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_CACHE_DIR": str(triton_cache)},  # Triton's own way to be told
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the process that times patch failed:\n{done.stderr[-2000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    if not figures["swapped"]:
        raise RuntimeError("patch swapped nothing in the process that times it")
    return float(figures["seconds"])


def patch_seconds() -> dict[str, float]:
    """Make the model and time one patch of it, with what it imports and compiles."""
    from llmfast import patch

    model = random_model(SHAPE, torch.device("cuda"))
    torch.cuda.synchronize()
    started = time.perf_counter()
    report = patch(model)
    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - started, "swapped": report.swapped}


if __name__ == "__main__":
    print(json.dumps(patch_seconds()))
