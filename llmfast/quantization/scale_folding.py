"""Find the modules that can divide the inputs of linear layers by factors at no cost.

AWQ multiplies the columns of a weight by factors and divides the inputs by them. The division is
free if the inputs come from a norm, whose weight is divided, or from another linear layer with only
products in between, whose rows are divided. Candidates are guessed from shapes and verified: random
powers of two as factors must leave the decoder layer's output unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..model.decoder import LayerCall, hooked, linears, run_layer
from ..model.verify import MIN_VALUES, compare, use_eager_experts
from ..weights.parameters import replaced


@dataclass(frozen=True)
class ScaleFold:
    """Linear layers that share an input, and the module that makes it; names within the layer."""

    consumers: tuple[str, ...]
    producer: str
    unit_offset: bool = False  # the norm multiplies by 1 + weight
    row: torch.Tensor | None = None  # int64 [k], the producer's row of each input; None: a norm

    def factors_of_rows(self, s: torch.Tensor) -> torch.Tensor:
        """Return the producer's factors ``[rows]`` for the factors ``[k]`` of the inputs."""
        if self.row is None:
            return s
        rows = int(self.row.max()) + 1
        return s.new_ones(rows).scatter_(0, self.row, s)

    def divided(self, parameter: str, value: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """Return a parameter of the producer with its rows divided, in float32 or float64."""
        by = self.factors_of_rows(s)
        exact = torch.promote_types(value.dtype, torch.float32)
        offset = 1.0 if self.unit_offset and parameter == "weight" else 0.0
        return (value.to(exact) + offset) / by.view(-1, *[1] * (value.ndim - 1)) - offset


@torch.no_grad()
def find_scale_folds(layer: nn.Module, hidden: torch.Tensor, call: LayerCall) -> list[ScaleFold]:
    """Return the folds of ``layer``, in the order in which their consumers are called.

    Args:
        layer: a decoder layer. It is not changed: a float64 copy is tried.
        hidden: the input to try it on, ``[batch, tokens, width]``.
        call: the layer's other arguments for as many tokens.
    """
    twin = copy.deepcopy(layer).double()
    use_eager_experts(twin)
    hidden, call = hidden.double(), call.to(torch.float64)
    groups, outputs, right = _watch(twin, hidden, call)
    folds = []
    for x, consumers in groups:
        for fold in _candidates(twin, x, consumers, outputs):
            if _is_equivalent(twin, fold, hidden, call, right):
                folds.append(fold)
                break
    return folds


def _watch(
    layer: nn.Module, hidden: torch.Tensor, call: LayerCall
) -> tuple[list[tuple[torch.Tensor, list[str]]], dict[str, torch.Tensor], torch.Tensor]:
    """Return the inputs of linear layers with their consumers, outputs by name, and the output."""
    groups: list[tuple[torch.Tensor, list[str]]] = []
    outputs: dict[str, torch.Tensor] = {}
    names = {module: name for name, module in layer.named_modules() if module is not layer}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, torch.Tensor):
            outputs[names[module]] = output
        if type(module) is nn.Linear:
            for x, consumers in groups:
                if x is args[0]:
                    consumers.append(names[module])
                    return
            groups.append((args[0], [names[module]]))

    with hooked([module.register_forward_hook(after) for module in names]):
        right = run_layer(layer, hidden, call)
    return groups, outputs, right


def _candidates(
    layer: nn.Module, x: torch.Tensor, consumers: list[str], outputs: dict[str, torch.Tensor]
) -> Iterator[ScaleFold]:
    k = x.shape[-1]
    modules = dict(layer.named_modules())
    names = tuple(consumers)
    for name, output in outputs.items():
        parameters = dict(modules[name].named_parameters())
        if (
            output is x
            and "weight" in parameters
            and parameters.keys() <= {"weight", "bias"}
            and all(value.shape == (k,) for value in parameters.values())
        ):
            yield ScaleFold(names, name)
            yield ScaleFold(names, name, unit_offset=True)
    heads = {getattr(module, "head_dim", None) for module in modules.values()}
    for name, part in linears(layer).items():
        rows = part.out_features
        if name in consumers or name not in outputs or k % rows:
            continue
        column = torch.arange(k, device=x.device)
        if rows == k:
            yield ScaleFold(names, name, row=column)
            continue
        for size in sorted(head for head in heads if isinstance(head, int)):
            if rows % size == 0:  # several heads read one head of values
                head = column // size // (k // rows)
                yield ScaleFold(names, name, row=head * size + column % size)


def _is_equivalent(
    layer: nn.Module, fold: ScaleFold, hidden: torch.Tensor, call: LayerCall, right: torch.Tensor
) -> bool:
    """Verify that random factors and their inverses leave the output of ``layer`` as it is.

    The layer runs in float64, and its output is held to the rule for float32: a wrong guess is
    wrong by a tenth and more. The hidden states are subtracted first, since they may be far larger
    than what the layer adds to them.
    """
    generator = torch.Generator().manual_seed(0)
    wanted = right - hidden
    draws = -(-MIN_VALUES // wanted.numel())
    folded = torch.cat(
        [_run_folded(layer, fold, hidden, call, generator) - hidden for _ in range(draws)]
    )
    oracle = torch.cat([wanted] * draws)
    return compare(folded.float(), oracle.float(), oracle).holds


def _run_folded(
    layer: nn.Module,
    fold: ScaleFold,
    hidden: torch.Tensor,
    call: LayerCall,
    generator: torch.Generator,
) -> torch.Tensor:
    modules = dict(layer.named_modules())
    k = modules[fold.consumers[0]].in_features
    s = 2.0 ** torch.randint(-2, 3, (k,), generator=generator).to(hidden)
    if fold.row is not None:
        s = fold.factors_of_rows(s)[fold.row]
    values = {
        parameter: fold.divided(name, parameter.data, s)
        for name, parameter in modules[fold.producer].named_parameters()
    }
    for consumer in fold.consumers:
        weight = modules[consumer].weight
        values[weight] = values.get(weight, weight.data) * s
    with replaced(values):
        return run_layer(layer, hidden, call)
