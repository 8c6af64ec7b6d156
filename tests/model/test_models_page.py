"""docs/models.md: what `patch` swaps in each kind of model, as tiny random models show it.

python tests/model/test_models_page.py      writes the page anew
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

import llmfast

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/models.md"
VERSION = "5.23"  # of transformers, whose models the page describes
HEAD = f"""# What `patch` swaps, model by model

Made by `python tests/model/test_models_page.py`, do not edit: a tiny model of each kind with random
weights, transformers {VERSION}, float32. `tests/model/test_patch.py` holds each to the logits of
the unpatched model. llmfast knows none of these by name: modules are recognised by what they hold
and compute, so other models swap as far as they are built alike. Linear layers, embeddings and
rotary embeddings have no operation yet and are kept in every model.

| model | norms | gated MLPs | attention | kept |
|---|---|---|---|---|
"""
OPERATIONS = {
    "norms": ("rms_norm",),
    "gated MLPs": ("silu_mul", "gelu_tanh_mul", "gelu_mul"),
    "attention": ("flash_attention",),
}
PLAIN = ("Linear", "Embedding", "Conv1d")


def render():
    from tiny_models import KINDS, make

    return HEAD + "".join(_line(kind, make(kind)) for kind in KINDS)


def _line(kind, model):
    entries = llmfast.patch(model, ops="all").entries
    cells = [kind]
    for operations in OPERATIONS.values():
        found = Counter(e.operation for e in entries if e.operation in operations)
        cells.append(", ".join(f"{n} `{op}`" for op, n in sorted(found.items())))
    kept = Counter(
        f"{e.class_name} ({e.reason})" if e.expected else e.class_name
        for e in entries
        if not e.swapped and e.class_name not in PLAIN and "Rotary" not in e.class_name
    )
    cells.append(", ".join(f"{n} {what}" for what, n in sorted(kept.items())))
    return f"| {' | '.join(cells)} |\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page is of the CPU's references")
@pytest.mark.skipif(
    Version(transformers.__version__) < Version(VERSION),
    reason=f"the page describes transformers {VERSION}",
)
def test_the_page_is_current():
    assert PAGE.read_text() == render()


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(ROOT / "tests/helpers"))
    PAGE.write_text(render())
