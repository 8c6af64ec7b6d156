"""Quantize a transformers decoder layer by layer, and simulate the result in the model itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..model.decoder import LayerCall, capture, decoder_layers, linears, run_layer
from ..model.shadow import check_unpatched
from ..model.sizes import ModelSizes
from ..weights.model_weights import dequantized
from ..weights.quantized import Quantized, QuantizedWeight
from .methods import (
    AwqSettings,
    GptqSettings,
    Scheme,
    awq_round,
    awq_scales,
    gptq,
    round_to_nearest,
)
from .resume import WorkFolder, fingerprint_of
from .scale_folding import ScaleFold, find_scale_folds
from .statistics import InputStatistics, gather_statistics

WEIGHTS = {"int4": 4, "int8": 8}
METHODS = ("nearest", "gptq", "awq")
PROBE_TOKENS = 32  # tokens of the forward on which scale folds are verified

Progress = Callable[[str, int, int], None]


@torch.no_grad()
def quantize(
    model: PreTrainedModel,
    *,
    weights: str = "int4",
    method: str = "nearest",
    group_size: int | None = 64,
    symmetric: bool = True,
    calibration: torch.Tensor | None = None,
    window: int = 512,
    scale_dtype: torch.dtype = torch.float16,
    gptq_settings: GptqSettings | None = None,
    awq_settings: AwqSettings | None = None,
    work: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
) -> Quantized:
    """Find codes for the linear layers of every decoder layer; embeddings and lm_head stay.

    GPTQ and AWQ run the calibration through the model one layer at a time, with the layers before
    it already quantized. The model is unchanged when this returns or raises.

    Args:
        model: in eval mode, as transformers built it; each layer's input is the output before it.
        weights: ``"int4"`` or ``"int8"``.
        method: ``"nearest"``, ``"gptq"`` or ``"awq"``.
        group_size: inputs that share a scale: 32, 64, 128, or None for one scale an output.
        symmetric: no zero points.
        calibration: token ids, int64 ``[sequences, tokens]``, or ``[tokens]`` of one text, which is
            cut into sequences of ``window`` tokens; an incomplete sequence at its end is not used.
            GPTQ and AWQ need as many tokens as the widest layer has inputs; nearest needs none.
        window: tokens of a sequence.
        scale_dtype: of the stored scales.
        gptq_settings: damping and order of GPTQ.
        awq_settings: the exponents and clips that AWQ tries.
        work: a folder for finished layers, created if it does not exist. The same call continues
            from the layers in it. The caller deletes it. None: an interrupted call starts over.
        on_progress: called as ``on_progress("quantizing layers", done, total)``, first with 0 done
            when everything has been checked.

    Raises:
        UserError: an option that is not listed above; weights that are not finite; a group size
            that does not divide a layer's inputs; a calibration that is missing, too short or
            outside of the vocabulary; a model in training mode or changed by ``llmfast.patch``; a
            work folder of other work, or one that cannot be written.

    Papers: GPTQ, arXiv:2210.17323; AWQ, arXiv:2306.00978.
    """
    if weights not in WEIGHTS:
        raise UserError(f"quantize: weights must be int4 or int8; got {weights!r}")
    if method not in METHODS:
        raise UserError(f"quantize: method must be nearest, gptq or awq; got {method!r}")
    scheme = Scheme(WEIGHTS[weights], group_size, symmetric, scale_dtype)
    prefix, layers = decoder_layers("quantize", model)
    _check_model(model, prefix, layers, scheme)
    sequences = None
    if method != "nearest":
        sequences = _sequences(model, layers, calibration, method, window)
    finished = None
    if work is not None:
        settings = {"gptq": gptq_settings, "awq": awq_settings}.get(method)
        choices = {"method": method, "scheme": scheme, "settings": settings}
        finished = WorkFolder(work, fingerprint_of(model, **choices, calibration=sequences))
    result = Quantized()
    steps = (
        _rounded(layers, scheme, finished)
        if sequences is None
        else _calibrated(
            model, layers, sequences, scheme, gptq_settings, awq_settings, method, finished
        )
    )
    if on_progress is not None:
        on_progress("quantizing layers", 0, len(layers))
    for index, found in enumerate(steps):
        # off the GPU: all layers' codes together are half as large as the model
        found.weights.update({name: w.to("cpu") for name, w in found.weights.items()})
        result.add(f"{prefix}.{index}", found)
        if on_progress is not None:
            on_progress("quantizing layers", index + 1, len(layers))
    return result


def _rounded(
    layers: nn.ModuleList, scheme: Scheme, finished: WorkFolder | None
) -> Iterator[Quantized]:
    """Yield each layer, rounded to nearest."""
    for index, layer in enumerate(layers):
        found = None if finished is None else finished.load(index, torch.device("cpu"))
        if found is None:
            parts = linears(layer).items()
            found = Quantized({name: round_to_nearest(part.weight, scheme) for name, part in parts})
            if finished is not None:
                finished.save(index, found)
        yield found


def _calibrated(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    sequences: torch.Tensor,
    scheme: Scheme,
    gptq_settings: GptqSettings | None,
    awq_settings: AwqSettings | None,
    method: str,
    finished: WorkFolder | None,
) -> Iterator[Quantized]:
    """Yield each layer by GPTQ or AWQ, calibrated on the quantized layers before it."""
    device = model.get_input_embeddings().weight.device
    hidden: list[torch.Tensor] = []
    all_calls: list[list[LayerCall]] = []
    layer_bytes = sum(parameter.nbytes for parameter in layers[0].parameters())
    home = device
    for row in sequences:
        captured = capture("quantize", model, layers, row[None].to(device))
        if captured.hidden.nbytes * len(sequences) > layer_bytes:
            home = torch.device("cpu")  # the limit for all hidden states on the GPU
        hidden.append(captured.hidden.to(home))
        # most sequences share masks and rotary tables
        like = all_calls[0] if all_calls else captured.calls
        all_calls.append(
            [call.sharing(first) for call, first in zip(captured.calls, like, strict=True)]
        )
    probe = capture("quantize", model, layers, sequences[:1, :PROBE_TOKENS].to(device))
    for index, layer in enumerate(layers):
        calls = [of_layers[index] for of_layers in all_calls]
        found = None if finished is None else finished.load(index, device)
        if found is None:
            with gather_statistics(layer) as statistics:
                for x, call in zip(hidden, calls, strict=True):
                    run_layer(layer, x.to(device), call)
            if method == "gptq":
                found = _gptq_layer(layer, statistics, scheme, gptq_settings)
            else:
                folds = find_scale_folds(layer, probe.hidden, probe.calls[index])
                found = _awq_layer(layer, folds, statistics, scheme, awq_settings)
            del statistics
            if finished is not None:
                finished.save(index, found)
        with dequantized("quantize", layer, found):
            for at, call in enumerate(
                calls
            ):  # in place, so that inputs and outputs are not held together
                hidden[at] = run_layer(layer, hidden[at].to(device), call).to(home)
        yield found


@contextmanager
def simulate(model: nn.Module, quantized: Quantized) -> Generator[None]:
    """Let ``model`` compute with the dequantized weights, in its own dtype, within the context.

    The parameters stay the same objects and get their values back at the end of it.

    Raises:
        UserError: a name or a shape that is not the model's, or a model that ``llmfast.patch`` has
            changed; nothing is changed then.
    """
    check_unpatched("simulate", model)
    with dequantized("simulate", model, quantized):
        yield


def _gptq_layer(
    layer: nn.Module,
    statistics: dict[str, InputStatistics],
    scheme: Scheme,
    settings: GptqSettings | None,
) -> Quantized:
    parts = linears(layer)
    together: dict[int, list[str]] = {}  # layers with one input share the factor of its statistics
    for name in parts:
        if name in statistics:
            together.setdefault(id(statistics[name]), []).append(name)
    weights: dict[str, QuantizedWeight] = {}
    for names in together.values():
        stacked = torch.cat([parts[name].weight for name in names])
        whole = gptq(stacked, statistics[names[0]], scheme, settings)
        rows = torch.arange(len(stacked), device=stacked.device)
        sizes = [parts[name].out_features for name in names]
        for name, own in zip(names, torch.split(rows, sizes), strict=True):
            weights[name] = whole.rows(own)
    found = Quantized()
    for name, part in parts.items():
        if name in weights:
            found.weights[name] = weights[name]
        else:
            found.weights[name] = round_to_nearest(part.weight, scheme)
            found.fallbacks[name] = "no token of the calibration reached it"
    return found


def _awq_layer(
    layer: nn.Module,
    folds: list[ScaleFold],
    statistics: dict[str, InputStatistics],
    scheme: Scheme,
    settings: AwqSettings | None,
) -> Quantized:
    found = Quantized()
    parts = linears(layer)
    modules = dict(layer.named_modules())
    weights = {name: part.weight.float() for name, part in parts.items()}
    scales: dict[str, torch.Tensor] = {}
    for fold in folds:
        s = awq_scales(
            [weights[name] for name in fold.consumers],
            statistics[fold.consumers[0]],
            scheme,
            settings,
            shared=fold.row,
        )
        for name in fold.consumers:
            weights[name] = weights[name] * s
            scales[name] = s
        for name, parameter in modules[fold.producer].named_parameters():
            full = f"{fold.producer}.{name}"
            if fold.producer in weights and name == "weight":
                weights[fold.producer] = fold.divided(name, weights[fold.producer], s)
            else:
                before = found.folded.get(full, parameter.data)
                found.folded[full] = fold.divided(name, before, s).to(parameter.dtype)
    for name, weight in weights.items():
        if name not in statistics:
            found.weights[name] = round_to_nearest(weight, scheme)
            found.fallbacks[name] = "no token of the calibration reached it"
            continue
        found.weights[name] = awq_round(
            weight, statistics[name], scheme, settings, scales=scales.get(name)
        )
        if name not in scales:
            found.fallbacks[name] = (
                "clipped only: no module before it takes the inverse of the scales"
            )
    return found


def _check_model(
    model: PreTrainedModel, prefix: str, layers: nn.ModuleList, scheme: Scheme
) -> None:
    check_unpatched("quantize", model)
    if model.training:
        raise UserError("quantize: the model is in training mode; call model.eval() first")
    for index, layer in enumerate(layers):
        for name, part in linears(layer).items():
            full = f"{prefix}.{index}.{name}"
            try:
                scheme.group(part.in_features)
            except ValueError as error:
                raise UserError(f"quantize: {full}: {error}") from None
            if part.weight.is_meta:
                raise UserError(f"quantize: {full}: the weight has no values (meta device)")
            if not bool(part.weight.isfinite().all()):
                raise UserError(f"quantize: {full}: the weight holds infinity or NaN")


def _sequences(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    calibration: torch.Tensor | None,
    method: str,
    window: int,
) -> torch.Tensor:
    """Check the calibration and return it as ``[sequences, tokens]``."""
    if calibration is None:
        raise UserError(f"quantize: {method} needs a calibration text; got none")
    ids = calibration
    if ids.ndim not in (1, 2) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UserError(
            "quantize: calibration must be integers [sequences, tokens] or [tokens]; got shape"
            f" {tuple(ids.shape)} of {ids.dtype}"
        )
    if ids.ndim == 1:
        if window < 1:
            raise UserError(f"quantize: window must be at least 1 token; got {window}")
        ids = ids[: len(ids) // window * window].view(-1, window)
    widest = max(part.in_features for layer in layers for part in linears(layer).values())
    if ids.numel() < widest:
        raise UserError(
            f"quantize: calibration too short: {method} needs {widest} tokens, as many as the"
            f" widest layer has inputs; got {ids.numel()} in sequences of {ids.shape[1]}"
        )
    sizes = ModelSizes.of(model)
    if sizes.context_length is not None and ids.shape[1] > sizes.context_length:
        raise UserError(
            f"quantize: sequences must be at most the model's context of {sizes.context_length}"
            f" tokens; got {ids.shape[1]}"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= sizes.vocabulary:
        raise UserError(
            f"quantize: calibration ids must be from 0 to {sizes.vocabulary - 1}; got"
            f" {int(ids.min())} to {int(ids.max())}"
        )
    return ids.long()
