"""``llmfast demo``: a real model answers, and the kernels are verified on it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import util

import typer

from . import ui
from .generate import GenerateOptions, answer

QUESTION = "What is the capital of France?"


def demo_command() -> None:
    """See a real model answer and the kernels verified on it.

    On a GPU the kernels answer. Without one PyTorch answers,
    and the model's first block then runs through the kernels in Triton's
    interpreter: real weights, the same prompt.
    """
    print(f"The embedded model is asked: {QUESTION}\n", flush=True)
    answer(GenerateOptions(QUESTION, stats=True))
    import torch

    if torch.cuda.is_available():
        return  # the report under the statistics shows the verification
    if util.find_spec("triton") is None:
        ui.note("Triton is not installed here (it comes for Linux only): the kernels do not run")
        return
    print("\nThe model's first block, through the Triton kernels in Triton's interpreter:\n")
    sys.stdout.flush()
    # a child process, because Triton reads TRITON_INTERPRET when it is imported
    # the interpreter's numpy warns of infinities, which a GPU computes silently
    python = [sys.executable, "-W", "ignore::RuntimeWarning"]
    child = subprocess.run(
        [*python, "-m", "llmfast.cli.interpreted", QUESTION],
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    if child.returncode != 0:
        raise typer.Exit(child.returncode if child.returncode > 0 else 1)
