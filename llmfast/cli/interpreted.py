"""The second part of the demo, in a process of its own: the kernels in Triton's interpreter.

``TRITON_INTERPRET=1 python -m llmfast.cli.interpreted PROMPT``. Triton reads this variable when it
is imported.
"""

from __future__ import annotations

import sys

from ..errors import UserError
from . import ui


def main(prompt: str) -> int:
    """Verify the kernels on the embedded model's first block; return the exit code."""
    try:
        model, tokenizer = ui.load(None, device="cpu", dtype="float32")
        with ui.progress("Interpreting the first block's kernels"):
            import torch

            from ..model.demo import verify_first_block
            from .generate import encode

            report = verify_first_block(model, torch.tensor([encode(tokenizer, prompt)]))
        print(report)
    except UserError as mistake:
        ui.error(str(mistake))
        return 2
    except KeyboardInterrupt:
        return ui.INTERRUPTED
    if report.kept or not report.swapped:
        ui.error("a kernel of the first block failed its numerical check: the table says which")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
