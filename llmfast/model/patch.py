"""Swap a model's modules for llmfast operations, and put them back."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UserError
from . import attention
from .modules import Candidate, attributes, choose, foreign_layer, mlp_candidates, norm_candidates
from .report import Entry, Report
from .shadow import PATCH
from .swap import Operations, Swap
from .verify import Verification

logger = logging.getLogger("llmfast")

FAMILIES = ("norm", "activation", "attention")
MIN_CAPABILITY = (8, 0)

_MATCHERS = {"norm": norm_candidates, "activation": mlp_candidates}


@dataclass
class Patch:
    """State of a patched model: everything needed to undo the patch, even in a copy."""

    report: Report
    swap: Swap
    forwards: dict[nn.Module, Any] = field(default_factory=dict)  # our instance forwards
    watched: list[nn.Module] = field(default_factory=list)  # modules with an AttentionState
    configs: list[tuple[nn.Module, PreTrainedConfig]] = field(default_factory=list)  # originals

    def undo(self) -> None:
        for module, ours in self.forwards.items():
            if vars(module).get("forward") is ours:  # otherwise another library replaced it
                del module.forward
        self.undo_attention()

    def undo_attention(self) -> None:
        for module in self.watched:
            delattr(module, attention.STATE)
        for module, config in self.configs:
            module.config = config
        self.watched, self.configs = [], []


def swap_in(
    model: PreTrainedModel,
    operations: Operations,
    *,
    families: tuple[str, ...] = FAMILIES,
    strict: bool = False,
) -> Report:
    """Swap the modules of the given families for ``operations``; see :func:`llmfast.patch`."""
    refuse(model)
    started = time.perf_counter()
    swap = Swap(operations)
    state = Patch(Report(fallbacks=swap.fallbacks), swap)
    try:
        with evaluating(model):
            _swap_modules(model, state, families)
            _swap_attention(model, state, families)
            _list_the_rest(model, state, families)
        kept = sorted({f"{e.class_name}: {e.reason}" for e in state.report.entries if _missed(e)})
        if strict and kept:
            raise UserError(f"patch(strict=True): kept {'; '.join(kept)}")
    except BaseException:
        state.undo()
        raise
    setattr(model, PATCH, state)
    state.report.notes.append(
        "torch.compile: works on a patched model; patch refuses a compiled one."
    )
    state.report.seconds = time.perf_counter() - started
    return state.report


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode for the block; restore each module's mode after it."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def swap_out(model: PreTrainedModel) -> None:
    """Put every module back.

    Raises:
        UserError: the model is not patched.
    """
    state: Patch | None = vars(model).get(PATCH)
    if state is None:
        raise UserError("unpatch: this model is not patched")
    state.undo()
    delattr(model, PATCH)


def refuse(model: PreTrainedModel, what: str = "patch") -> None:
    """Raise UserError, beginning with ``what``, if a model cannot be patched."""
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in _modules(model)):
        raise UserError(f"{what}: this model is compiled; patch it first, then call torch.compile")
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"{what}: wants a model of transformers, got {type(model).__name__}")
    if PATCH in vars(model):
        raise UserError(f"{what}: this model is patched already; call llmfast.unpatch(model) first")
    if model.config.is_encoder_decoder:
        raise UserError(
            f"{what}: {type(model).__name__} is an encoder-decoder model; "
            "llmfast takes decoder-only ones"
        )
    device = model.device
    if device.type not in ("cuda", "cpu"):
        raise UserError(
            f"{what}: the model is on {device}; move it to a GPU first, model.to('cuda')"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        raise UserError(
            f"{what}: {torch.cuda.get_device_name(device)} has compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}; the kernels want 8.0"
        )


def _modules(model: object) -> Iterator[nn.Module]:
    return model.modules() if isinstance(model, nn.Module) else iter(())


def families_of(
    ops: str | Iterable[str] | None, device: torch.device, known: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the families that ``ops`` selects on a device."""
    if ops is None:
        return () if device.type == "cpu" else known
    if ops == "all":
        return known
    wanted = (ops,) if isinstance(ops, str) else tuple(ops)
    unknown = [op for op in wanted if op not in known]
    if unknown or not wanted:
        got = ", ".join(unknown) or "none"
        raise UserError(f"patch: ops are {', '.join(known)} or 'all', got {got}")
    return wanted


def _missed(entry: Entry) -> bool:
    return entry.expected and not entry.swapped


# ------------------------------------------------------------------------- norms and gated MLPs


def _swap_modules(model: PreTrainedModel, state: Patch, families: tuple[str, ...]) -> None:
    verified: dict[tuple[Any, ...], Callable[[str, nn.Module], Entry]] = {}
    for name, module in model.named_modules():
        family, candidates = _recognise(module)
        if not candidates:
            continue
        reason = _why_keep(module, family, families, model)
        if reason is not None:
            state.report.entries.append(
                Entry(name, type(module).__name__, None, reason, expected=family in families)
            )
            continue
        key = attributes(module)
        if key not in verified:
            verified[key] = _verify_module(module, candidates, state)
        state.report.entries.append(verified[key](name, module))


def _recognise(module: nn.Module) -> tuple[str, list[Candidate]]:
    for family, matcher in _MATCHERS.items():
        candidates = matcher(module)
        if candidates:
            return family, candidates
    return "", []


def _why_keep(
    module: nn.Module, family: str, families: tuple[str, ...], model: PreTrainedModel
) -> str | None:
    if not families:
        return "on the CPU, where nothing is swapped unless ops says so"
    if family not in families:
        return "not asked for"
    if any("forward" in vars(m) for m in module.modules()):
        return "its forward is overridden already (offloaded, or another library's)"
    foreign = foreign_layer(module)
    if foreign is not None:
        return foreign
    devices = {p.device for p in module.parameters()}
    if devices != {model.device}:
        return f"on {', '.join(map(str, devices))}, the model is on {model.device}"
    return None


def _verify_module(
    module: nn.Module, candidates: list[Candidate], state: Patch
) -> Callable[[str, nn.Module], Entry]:
    """Verify one module; return the action for it and for all modules with the same key."""
    try:
        best, verification = choose(module, candidates, state.swap.given)
    except Exception as error:  # a module whose verification raises anything is kept
        return _keep(f"not verified: {_one_line(error)}")
    if not verification.holds:
        return _keep(f"not what {best.operation} computes", verification)

    def swap(name: str, module: nn.Module) -> Entry:
        module.forward = best.bind(module, state.swap)
        state.forwards[module] = module.forward
        return Entry(
            name,
            type(module).__name__,
            best.operation,
            best.what,
            verification.error,
            verification.own_error,
        )

    return swap


def _keep(
    reason: str, verification: Verification | None = None
) -> Callable[[str, nn.Module], Entry]:
    def keep(name: str, module: nn.Module) -> Entry:
        errors = (verification.error, verification.own_error) if verification else (None, None)
        return Entry(name, type(module).__name__, None, reason, *errors)

    return keep


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


# --------------------------------------------------------------------------------- attention


def _swap_attention(model: PreTrainedModel, state: Patch, families: tuple[str, ...]) -> None:
    if "attention" not in families:
        return
    original = model.config._attn_implementation
    if not model._can_set_attn_implementation():
        return  # its attention modules are listed with the rest
    if original not in attention.NAMES:
        state.report.notes.append(f"attention kept: it runs {original!r}, not sdpa or eager")
        return
    calls = _watch(model, original, state)
    entries: dict[nn.Module, Entry] = {}
    verified: dict[tuple[Any, ...], tuple[str | None, Verification | None]] = {}
    names = {module: name for name, module in model.named_modules()}
    for call in calls:
        if call.key not in verified:
            verified[call.key] = _verify_call(call, original, state.swap)
        reason, verification = verified[call.key]
        error, own_error = (
            (verification.error, verification.own_error) if verification else (None, None)
        )
        entries[call.module] = Entry(
            names[call.module],
            type(call.module).__name__,
            "flash_attention" if reason is None else None,
            reason or "causal attention",
            error,
            own_error,
        )
        getattr(call.module, attention.STATE).kept = reason
    state.report.entries += entries.values()
    if not any(entry.swapped for entry in entries.values()):
        state.undo_attention()


def _watch(model: PreTrainedModel, original: str, state: Patch) -> list[attention.Call]:
    """Point the model's configs at our attention and record its calls in one small forward."""
    calls: list[attention.Call] = []
    memo: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            state.configs.append((module, config))
            # a copy: models built from one config share it
            module.config = ours = copy.deepcopy(config, memo)
            if ours._attn_implementation in attention.NAMES:
                ours._attn_implementation_internal = attention.NAMES[ours._attn_implementation]
        setattr(module, attention.STATE, attention.AttentionState(state.swap, calls=calls))
        state.watched.append(module)
    tokens = torch.zeros(1, 4, dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    except Exception as error:
        state.report.notes.append(
            f"attention kept: a forward of 4 tokens raised {_one_line(error)}"
        )
        calls.clear()
    callers = {call.module for call in calls}
    for module in state.watched:
        if module in callers:
            getattr(module, attention.STATE).calls = None
        else:
            delattr(module, attention.STATE)
    state.watched = [module for module in state.watched if module in callers]
    return calls


def _verify_call(
    call: attention.Call, original: str, swap: Swap
) -> tuple[str | None, Verification | None]:
    if call.refused is not None:
        return call.refused, None
    try:
        verification = attention.verify(call, original, swap)
    except Exception as error:
        return f"not verified: {_one_line(error)}", None
    return (
        (None, verification)
        if verification.holds
        else ("not what flash_attention computes", verification)
    )


# --------------------------------------------------------------------------------- the report


def _list_the_rest(model: PreTrainedModel, state: Patch, families: tuple[str, ...]) -> None:
    """Add an entry for every remaining module that holds tensors or computes attention."""
    listed = {entry.name for entry in state.report.entries}
    for name, module in model.named_modules():
        class_name = type(module).__name__
        if name in listed:
            continue
        if class_name.endswith("Attention"):
            reason = _why_keep(module, "attention", families, model)
            reason = reason or "does not call transformers' attention interface"
            state.report.entries.append(Entry(name, class_name, None, reason, expected=False))
        elif module._parameters or (module._buffers and not module._modules):
            reason = "no operation for it in this version"
            state.report.entries.append(Entry(name, class_name, None, reason, expected=False))
