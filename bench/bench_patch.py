"""The time that patch(model) takes, for the Llama-3.1-8B shape with random weights.

pytest bench/bench_patch.py

`llmfast bench decode` times what the patched model does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness import sized

SHAPE = sized("llama-3.1-8b", "smollm2-135m")
CHILD = Path(__file__).parent / "tools/patch_once.py"


@pytest.fixture(scope="module")
def triton_cache(tmp_path_factory):
    """A folder that is empty for the first start and filled for the second."""
    return tmp_path_factory.mktemp("triton")


@pytest.mark.parametrize("start", sized(["cold", "warm"], ["cold"]))
def bench_patch(bench_once, triton_cache, start):
    """Time a process of its own each: first without compiled kernels, then with all of them.

    Only Triton's cache is empty at first. Files of torch and CUDA may be in the page cache.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the child's model needs the memory
    bench_once("patch", {"shape": SHAPE, "start": start}, _child_seconds(triton_cache))


def _child_seconds(triton_cache: Path) -> float:
    done = subprocess.run(
        [sys.executable, CHILD, SHAPE],
        env=os.environ | {"TRITON_CACHE_DIR": str(triton_cache)},  # Triton's own setting
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
