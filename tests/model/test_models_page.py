"""docs/models.md lists what `patch` swaps in each kind of model, found with tiny random models.

python tests/model/test_models_page.py      writes the page
"""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

import llmfast
from llmfast.model.trace import NotTraced
from llmfast.runner.block_model import BlockModel
from llmfast.runner.make_model import make_step_model

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/models.md"
VERSION = "5.23"  # of transformers, whose models the page describes
HEAD = f"""# What `patch` swaps, model by model

`python tests/model/test_models_page.py` writes this page from a tiny model of each kind with random
weights, in float32 with transformers {VERSION}; do not edit it. `tests/model/test_patch.py` holds
each model to the logits of the unpatched one. llmfast knows none of them by name: it recognises
modules by their tensors and by what they compute. Other models are swapped as far as they are built
alike. Linear layers, embeddings and rotary embeddings are kept in every model; the runner replaces
linear layers where it has a recipe.

| model | norms | gated MLPs | attention | kept |
|---|---|---|---|---|
"""
RECIPES = """
## Recipes

If every decoder layer matches a recipe of `llmfast/runner/blocks/`, a step of `generate` is a
short loop over fused operations. llmfast watches one forward to find the recipe, the places of the
norms, the rotation and the multipliers, and then verifies them. It does not look at names.

Errors are relative (RMS), against the same computation in float64. They are the worst layer's, and
those of the logits of a prefill and two steps, each beside the original model's own error.

| model | recipe | operations of a block | layer | its own | logits | their own |
|---|---|---|---|---|---|---|
"""
OWN_LAYERS = """
## The model's own layers, with paged attention

If a layer matches no recipe, the runner steps the model's own forward with our attention over the
paged cache, and captures that as a CUDA graph too where it can.

| model | why no recipe | error of the logits | their own |
|---|---|---|---|
"""
ORIGINAL = """
## `generate` stays transformers' own

| model | why |
|---|---|
"""
OPERATIONS = {
    "norms": ("rms_norm",),
    "gated MLPs": ("silu_mul", "gelu_tanh_mul", "gelu_mul"),
    "attention": ("flash_attention",),
}
ERROR = re.compile(r"\d+e-\d+")
PLAIN = ("Linear", "Embedding", "Conv1d")


def render():
    from tiny_models import KINDS, make

    recipes, own, original = [], [], []
    for kind in KINDS:
        try:
            model = make_step_model(make(kind))
        except NotTraced as error:
            original.append(f"| {kind} | {error} |\n")
            continue
        if isinstance(model, BlockModel):
            recipes.append(_recipe_line(kind, model))
        else:
            errors = f"{model.verification.error:.0e} | {model.verification.own_error:.0e}"
            own.append(f"| {kind} | {model.reason} | {errors} |\n")
    lines = [_line(kind, make(kind)) for kind in KINDS]
    return "".join([HEAD, *lines, RECIPES, *recipes, OWN_LAYERS, *own, ORIGINAL, *original])


def _recipe_line(kind, model):
    built, whole = model.built, model.verification
    worst = max(built.verifications, key=lambda verification: verification.error)
    cells = [kind, ", ".join(built.recipes), ", ".join(_fused(built.blocks[0]))]
    cells += [f"{e:.0e}" for e in (worst.error, worst.own_error, whole.error, whole.own_error)]
    return f"| {' | '.join(cells)} |\n"


def _fused(block):
    """Yield the operations of a block in order, without the dense linear layers."""
    attention, per_head = block.mixer, False
    if attention.q_norm is not None:
        per_head = len(attention.q_norm.weight) == attention.cache.k_dim
    if block.recipe != "post-norm":
        yield "`add_rms_norm`"
    if attention.q_norm is not None and not per_head:
        yield "`rms_norm` of q and of k"
    yield "head norm + RoPE + cache write" if per_head else "RoPE + cache write"
    yield "`paged_attention`"
    if block.recipe in ("post-norm", "sandwich"):
        yield "`rms_norm`"
    if block.recipe != "post-norm":
        yield "`add_rms_norm`"
    yield f"`gated_linear` ({block.feed_forward.activation})"
    if block.recipe in ("post-norm", "sandwich"):
        yield "`rms_norm`"


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page describes the references on a CPU")
@pytest.mark.skipif(
    Version(transformers.__version__) < Version(VERSION),
    reason=f"the page describes transformers {VERSION}",
)
def test_the_page_is_current():
    page, now = PAGE.read_text(), render()
    assert ERROR.sub("", page) == ERROR.sub("", now)
    # roundings differ from processor to processor, their size does not
    for old, new in zip(ERROR.findall(page), ERROR.findall(now), strict=True):
        assert float(old) / 3 <= float(new) <= 3 * float(old)


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(ROOT / "tests/helpers"))
    PAGE.write_text(render())
