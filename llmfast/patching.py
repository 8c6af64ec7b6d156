"""``patch`` and ``unpatch``: a model's modules and its ``generate``, swapped and put back."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from .errors import UserError
from .model.patch import FAMILIES as MODULES
from .model.patch import evaluating, families_of, refuse, swap_in, swap_out
from .model.report import Report
from .model.swap import Operations
from .model.trace import NotTraced
from .quantization.select import select_weights
from .weights.model_weights import detach
from .weights.packed_linear import restore_dense
from .weights.quantized import Quantized

GENERATE = "generate"


def patch(
    model: PreTrainedModel,
    *,
    ops: str | Iterable[str] | None = None,
    strict: bool = False,
    weights: str | Quantized | None = None,
    group_size: int | str | None = "auto",
    method: str = "nearest",
    calibration: torch.Tensor | None = None,
) -> Report:
    """Make ``model`` run llmfast's operations and its ``generate`` the runner, reversibly.

    Norms, gated MLPs and the attention function are recognised by what they hold and compute. Each
    replacement is compared with the original on random input before it stays: its relative RMS
    error against the same computation one precision up is at most twice the original's, or four
    machine epsilons. What cannot be recognised or does not pass is left as it was. Only instances
    are changed; neither their classes nor another model of the same class or config.

    ``model.generate`` is taken over where the runner computes what the model does: a step of
    decoding is then one CUDA graph, and where every decoder layer is built as one of the runner's
    recipes, that graph is of fused operations. Arguments, checks and results stay those of
    transformers; a call that the runner cannot do (beams, for one) goes to transformers' own, and
    the reason is logged once. docs/runner.md has the list.

    With ``weights``, the linear layers of the decoder get weights of four or eight bits, and
    ``generate`` reads those. The model's own forward computes with the same weights: on a GPU its
    layers multiply with the packed ones too, and their parameters hold nothing but a shape until
    :func:`unpatch` (``state_dict`` has the dequantized values all the same); on the CPU the
    parameters hold the dequantized values. What they held before is kept in the CPU's memory and
    put back by :func:`unpatch`, whatever has been written to them since. What the choice will save
    is printed to stderr before the work starts.

    Args:
        model: a decoder-only model of transformers, on a GPU of compute capability 8.0 or newer.
            On CPU tensors nothing is swapped unless ``ops`` says so, since the reference
            operations are not faster than what the model has.
        ops: what to swap: any of ``norm``, ``activation``, ``attention``, ``generate``, or
            ``"all"``. None: all on a GPU, none on the CPU.
        strict: raise if anything was kept that llmfast has an operation for.
        weights: ``"int4"`` or ``"int8"``, to find codes here; what :func:`llmfast.quantize` has
            found; of a model that was loaded quantized ``"own"``, its own bits, or
            ``"dequantized"``. None: weights stay as they are; those that were loaded quantized run
            in their own bits on a GPU, dequantized on the CPU.
        group_size: of codes found here: inputs that share a scale: 32, 64, 128, or None for all.
            ``"auto"``: 64 in four bits, all in eight.
        method: of codes found here: ``"nearest"``, or ``"gptq"`` or ``"awq"`` with a calibration.
        calibration: token ids, as :func:`llmfast.quantize` takes them.

    Returns:
        A :class:`Report` with a line for every module; it goes on counting calls that fell back.

    Raises:
        UserError: the model is patched already, compiled, an encoder-decoder, not one of
            transformers, or on a device that the kernels do not run on; ``ops`` names an unknown
            family; with ``strict``, what was kept; weights that cannot be quantized so, that are
            not of this model, or that it has already. The model is then as it was.
    """
    refuse(model)
    started = time.perf_counter()
    wanted = families_of(ops, model.device, (*MODULES, GENERATE))
    modules = tuple(family for family in wanted if family in MODULES)
    with torch.inference_mode(False):  # what is made here outlives the mode
        try:
            attached = select_weights(model, weights, group_size, method, calibration)
            report = swap_in(model, Operations(), families=modules, strict=strict)
            report.notes += attached
            if GENERATE in wanted:
                try:
                    _take_over(model, report, strict)
                except BaseException:
                    swap_out(model)
                    raise
        except BaseException:
            detach(model)
            raise
    if not wanted:
        report.notes.append(
            "On the CPU nothing is swapped: the reference operations are not faster than the "
            "model's own. ops='all' swaps them all the same."
        )
    report.seconds = time.perf_counter() - started
    return report


def _take_over(model: PreTrainedModel, report: Report, strict: bool) -> None:
    from .runner.generate.override import install
    from .runner.make_model import make_step_model

    try:
        with evaluating(model):
            steps = make_step_model(model)
    except NotTraced as error:
        if strict:
            raise UserError(f"patch(strict=True): generate is transformers' own: {error}") from None
        report.generate_fallback = str(error)
        report.notes.append(f"generate: transformers' own, since {error}.")
        return
    install(model, steps)
    report.notes.append(
        f"generate: taken over; {steps.describe()}; logits of the whole model: "
        f"{steps.verification}."
    )


def unpatch(model: PreTrainedModel) -> None:
    """Put everything back that :func:`patch` changed, and free what the runner holds.

    Raises:
        UserError: the model is not patched.
    """
    from .runner.generate.override import uninstall

    swap_out(model)
    detach(model)  # first, so that nothing is dequantized only to be replaced
    uninstall(model)
    restore_dense(model)  # of a copy, which has no runner


@contextmanager
def patched(model: PreTrainedModel, **options: Any) -> Iterator[Report]:
    """:func:`patch` for the length of a ``with`` block, with the same options."""
    report = patch(model, **options)
    try:
        yield report
    finally:
        unpatch(model)
