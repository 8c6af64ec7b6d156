"""Norms and gated MLPs: matched by structure, swapped by a forward on the instance.

A matcher lists the candidates for a module. Running the module decides which candidate it is, if
any. Class names are not looked at.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from llmfast_kernels.activation.reference import (
    gelu_mul_reference,
    gelu_tanh_mul_reference,
    silu_mul_reference,
)
from llmfast_kernels.common.checks import has_row_stride
from llmfast_kernels.norm.reference import rms_norm_reference

from .swap import Operations, Swap, original_forward, why_not
from .verify import MIN_VALUES, Verification, compare, oracle_dtype, precise_copy, relative_rms

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
_REFERENCES = Operations(
    rms_norm=rms_norm_reference,
    silu_mul=silu_mul_reference,
    gelu_tanh_mul=gelu_tanh_mul_reference,
    gelu_mul=gelu_mul_reference,
)
_ACTIVATIONS = ("silu_mul", "gelu_tanh_mul", "gelu_mul")


@dataclass(frozen=True)
class Candidate:
    """One way to compute a module with an llmfast operation."""

    operation: str
    what: str  # the description in the report
    width: int  # size of the input's last dimension
    # norm: (attribute name of epsilon, unit_offset); gated MLP: layer names (gate, up, down)
    roles: tuple[Any, ...]

    def bind(self, module: nn.Module, swap: Swap) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a forward for the instance: a partial, which survives deepcopy and pickling."""
        if self.operation == "rms_norm":
            eps_name, unit_offset = self.roles
            return partial(_rms_norm_forward, eps_name, unit_offset, module, swap)
        gate, up, down = self.roles
        return partial(_gated_mlp_forward, self.operation, gate, up, down, module, swap)


# ------------------------------------------------------------------------------------- norms


def norm_candidates(module: nn.Module) -> list[Candidate]:
    """Return the candidates for a module that holds one weight vector and an epsilon."""
    if not _takes_one_tensor(module) or module._modules or module._buffers:
        return []
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if list(parameters) != ["weight"] or parameters["weight"].ndim != 1:
        return []
    width = parameters["weight"].shape[0]
    for eps_name in _EPS_NAMES:
        if isinstance(getattr(module, eps_name, None), float):
            return [
                Candidate(
                    "rms_norm",
                    "RMS norm, 1 + weight" if unit_offset else "RMS norm",
                    width,
                    (eps_name, unit_offset),
                )
                for unit_offset in (False, True)
            ]
    return []


def _rms_norm_forward(
    eps_name: str, unit_offset: bool, module: nn.Module, swap: Swap, x: torch.Tensor
) -> torch.Tensor:
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    reason = why_not(module, x, weight)
    # heads transposed to [B, H, L, D] are normalised in their memory layout, without a copy
    heads_first = x.ndim == 4 and not x.is_contiguous()
    rows = x.transpose(1, 2) if heads_first else x
    if reason is None and not has_row_stride(rows):
        reason = "the input's rows are not evenly spaced"
    if reason is not None:
        swap.fell_back(module, reason)
        result: torch.Tensor = original_forward(module, x)
        return result
    eps: float = getattr(module, eps_name)
    y = swap.operations.rms_norm(rows, weight, eps=eps, unit_offset=unit_offset)
    return y.transpose(1, 2) if heads_first else y


def _takes_one_tensor(module: nn.Module) -> bool:
    """Return whether the module's forward takes exactly one argument."""
    return len(inspect.signature(type(module).forward).parameters) == 2  # self and x


# ---------------------------------------------------------------------------------- gated MLPs


def mlp_candidates(module: nn.Module) -> list[Candidate]:
    """Return the candidates for a module that holds only two or three linear layers.

    A layer with ``in_features`` counts as linear, also one of another library, so that the report
    can name it. Only torch's own layers are swapped; see :func:`foreign_layer`.
    """
    if not _takes_one_tensor(module) or module._parameters or module._buffers:
        return []
    linears: dict[str, Any] = {
        n: c for n, c in module.named_children() if hasattr(c, "in_features")
    }
    others = [c for n, c in module.named_children() if n not in linears]
    if any(next(c.parameters(), None) is not None for c in others):
        return []
    return [
        Candidate(
            operation,
            f"gated MLP, gate {gate}" + (f", up {up}" if up else " and up merged"),
            linears[gate].in_features,
            (gate, up, down),
        )
        for gate, up, down in _roles(linears)
        for operation in _ACTIVATIONS
    ]


def foreign_layer(module: nn.Module) -> str | None:
    """Describe a layer of the module that is quantized or wrapped by another library, if any."""
    for name, child in module.named_children():
        if hasattr(child, "in_features") and type(child) is not nn.Linear:
            return f"{name} is {type(child).__name__}, not torch.nn.Linear"
    return None


def _roles(linears: dict[str, Any]) -> Iterator[tuple[str, str | None, str]]:
    """Yield the possible (gate, up, down) assignments of the linear layers.

    ``up`` is None where one layer computes both halves, as in Phi-3.
    """
    if len(linears) == 3:
        for down in linears:
            gate, up = (name for name in linears if name != down)
            wide, narrow = linears[gate], linears[down]
            same = (wide.in_features, wide.out_features)
            if same == (linears[up].in_features, linears[up].out_features) and same == (
                narrow.out_features,
                narrow.in_features,
            ):
                yield gate, up, down
                yield up, gate, down
    if len(linears) == 2:
        for gate, down in (tuple(linears), tuple(linears)[::-1]):
            if linears[gate].out_features == 2 * linears[down].in_features:
                yield gate, None, down


def _gated_mlp_forward(
    operation: str,
    gate: str,
    up: str | None,
    down: str,
    module: nn.Module,
    swap: Swap,
    x: torch.Tensor,
) -> torch.Tensor:
    children = module._modules
    # looked up by name in every call, so that an adapter added after the patch is used
    reason = why_not(module, x, getattr(children[gate], "weight", x))
    if reason is not None:
        swap.fell_back(module, reason)
        result: torch.Tensor = original_forward(module, x)
        return result
    gated = children[gate](x)  # type: ignore[misc]
    upward = None if up is None else children[up](x)  # type: ignore[misc]
    hidden = getattr(swap.operations, operation)(gated, upward)
    out: torch.Tensor = children[down](hidden)  # type: ignore[misc]
    return out


# ------------------------------------------------------------------------------ verification


def probe_input(width: int, weight: torch.Tensor) -> torch.Tensor:
    """Return random rows of rising magnitude: small ones expose a wrong epsilon, large ones a sum.

    Uses its own generator, so the process's random state does not change.
    """
    rows = max(8, -(-MIN_VALUES // width))
    x = torch.randn(1, rows, width, generator=torch.Generator().manual_seed(0))
    return (x * torch.logspace(-3, 1, rows).unsqueeze(1)).to(weight.device, weight.dtype)


@torch.no_grad()
def choose(
    module: nn.Module, candidates: list[Candidate], operations: Operations
) -> tuple[Candidate, Verification]:
    """Return the candidate closest to ``module`` on random input, and its verification.

    The reference operations make the choice, so only the chosen kernel is compiled. The oracle is
    a copy of the module itself, one precision up.
    """
    x = probe_input(candidates[0].width, next(module.parameters()))
    higher = oracle_dtype(x.dtype)
    oracle = precise_copy(module, higher)(x.to(higher))
    original = module(x)
    if not isinstance(original, torch.Tensor) or original.shape != x.shape:
        raise ValueError("its forward does not return one tensor of its input's shape")
    references = Swap(_REFERENCES)

    def distance(candidate: Candidate) -> float:
        error = relative_rms(candidate.bind(module, references)(x), oracle)
        return error if error == error else float("inf")  # NaN never wins

    best = min(candidates, key=distance) if len(candidates) > 1 else candidates[0]
    ours = best.bind(module, Swap(operations))(x)
    return best, compare(ours, original, oracle)


def attributes(module: nn.Module) -> tuple[Any, ...]:
    """Return the key of a module's verification; modules with equal keys share one.

    It holds the class, the shapes, dtypes and devices of the tensors, and every other attribute
    but the layer's number, for the module and its children.
    """
    tensors = tuple(
        (name, tuple(t.shape), t.dtype, t.device)
        for name, t in (*module.named_parameters(), *module.named_buffers())
    )
    return (*(_plain(m) for m in module.modules()), tensors)


def _plain(module: nn.Module) -> tuple[Any, ...]:
    values = []
    for name, value in sorted(vars(module).items()):
        if name == "layer_idx" or name.startswith("_"):  # underscores: torch's own bookkeeping
            continue
        simple = isinstance(value, (bool, int, float, str, tuple, type(None)))
        values.append((name, value if simple else id(value)))
    return (type(module), *values)
