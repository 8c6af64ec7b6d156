"""Describe the parts of a model's decoder layers by watching one forward.

Modules are identified by their contents and by the order of their calls: the linear layers before
attention compute queries, keys and values, the one after it is the output projection, and so on.
Names of classes and attributes are not looked at. The description is a guess; verification
confirms it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import attention, shadow
from .decoder import hooked, layer_lists, layer_output
from .modules import Candidate, attributes, choose, mlp_candidates, norm_candidates
from .sizes import ModelSizes
from .swap import Operations, Swap
from .verify import MIN_VALUES

TOKENS = 80  # tokens of the watched forward, more than a cache block; narrow layers take more


class NotTraced(Exception):
    """Raised if a model or layer cannot be described; the message is one line."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm: ``x / rms(x) * weight``, or ``* (1 + weight)``."""

    weight: torch.Tensor
    eps: float
    unit_offset: bool


@dataclass
class Rotary:
    """A call ``module(x, position_ids, *args, **kwargs)`` of a rotary module, and its tables."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tables: tuple[torch.Tensor, torch.Tensor]

    def same(self, other: Rotary) -> bool:
        mine, theirs = (
            (self.module, self.args, self.kwargs),
            (other.module, other.args, other.kwargs),
        )
        return mine == theirs


@dataclass
class Layer:
    """The parts of a decoder layer in the order of their calls, and the layer's arguments."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor
    call: attention.Call
    qkv: list[nn.Linear]  # three layers, or one merged
    out: nn.Linear
    before: list[Norm]  # before the first linear layer
    heads: list[Norm]  # between projections and attention: for q and for k
    between: list[Norm]  # between the output projection and the MLP
    after: list[Norm]  # after the MLP
    gate: list[nn.Linear]  # gate and up, or one merged
    down: nn.Linear
    activation: str  # the operation: silu_mul, ...
    rotary: Rotary | None


@dataclass
class Trace:
    """A model's layers. The modules belong to a shadow, which shares the model's tensors."""

    shadow: PreTrainedModel
    layers: list[Layer]
    final_norm: tuple[nn.Module, Norm] | None  # called right after the last layer
    rotaries: list[Rotary]  # distinct


@dataclass
class _Event:
    kind: str  # "enter", "leave", "linear", "norm", "rotary"
    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None


def trace(model: PreTrainedModel, operations: Operations) -> Trace:
    """Watch one forward of ``model`` and describe its decoder layers.

    Args:
        model: in evaluation mode; not changed.
        operations: the operations that norms and gated MLPs are verified with.

    Raises:
        NotTraced: the model or one of its layers has parts that cannot be described.
    """
    return _describe(*_watch(model, operations), operations)


def trace_attention(model: PreTrainedModel) -> tuple[PreTrainedModel, list[attention.Call]]:
    """Return a shadow of ``model`` and the attention calls of its modules, in order.

    Raises:
        NotTraced: our kernel cannot take a call, or a module calls attention more than once.
    """
    twin, events = _watch(model, Operations())
    calls = [event for event in events if isinstance(event, attention.Call)]
    refused = [call.refused for call in calls if call.refused is not None]
    if not calls or refused:
        why = f"has {refused[0]}" if refused else "is not called through transformers' interface"
        raise NotTraced(f"attention {why}")
    if len({call.module for call in calls}) != len(calls):
        raise NotTraced("a module calls attention more than once")
    return twin, calls


@torch.no_grad()
def _watch(model: PreTrainedModel, operations: Operations) -> tuple[PreTrainedModel, list[Any]]:
    if shadow.has_foreign_forward(model):
        raise NotTraced("a module's forward is overridden (offloaded, or another library's)")
    twin = shadow.make_shadow(model)
    shadow.point_attention(twin, attention.NAMES)
    events: list[Any] = []
    for module in twin.modules():
        setattr(module, attention.STATE, attention.AttentionState(Swap(operations), calls=events))
    sizes = ModelSizes.of(model)
    length = max(TOKENS, -(-MIN_VALUES // sizes.hidden))
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(sizes.vocabulary, (1, length), generator=generator, device="cpu")
    try:
        with hooked(_listen(twin, events)):
            twin(input_ids=ids.to(model.device), use_cache=False)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        raise NotTraced(f"a forward raised {type(error).__name__}: {lines[0]}") from error
    finally:
        for module in twin.modules():
            vars(module).pop(attention.STATE, None)  # later calls run the original
    return twin, events


def _listen(twin: nn.Module, events: list[Any]) -> list[Any]:
    handles = []

    def on_call(kind: str, module: nn.Module) -> None:
        def hook(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            events.append(_Event(kind, m, args, kwargs, output))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def on_enter(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        events.append(_Event("enter", m, args, kwargs))

    for module in twin.modules():
        if isinstance(module, nn.ModuleList):
            for child in module:
                handles.append(child.register_forward_pre_hook(on_enter, with_kwargs=True))
                on_call("leave", child)
        elif hasattr(module, "in_features"):
            on_call("linear", module)
        elif norm_candidates(module):
            on_call("norm", module)
        elif not module._modules and not module._parameters and module._buffers:
            on_call("rotary", module)
        elif not module._modules and module._parameters:
            on_call("other", module)
    return handles


def _describe(twin: PreTrainedModel, events: list[Any], operations: Operations) -> Trace:
    callers = {e.module for e in events if isinstance(e, attention.Call)}
    found = layer_lists(twin, lambda layer: any(part in callers for part in layer.modules()))
    if len(found) != 1:
        raise NotTraced("its layers do not all call transformers' attention interface")
    _, container = found[0]
    rotaries = [
        Rotary(e.module, e.args[2:], _rest(e), e.output)
        for e in events
        if isinstance(e, _Event) and e.kind == "rotary" and _is_pair(e.output)
    ]
    known: dict[Any, Any] = {}
    layers = []
    for module in container:
        start = _position(events, "enter", module)
        end = _position(events, "leave", module)
        inside = events[start + 1 : end]
        layers.append(
            _describe_layer(events[start], inside, events[end], rotaries, known, operations)
        )
    final = None
    last = _position(events, "leave", container[-1])
    following = [e for e in events[last + 1 :] if isinstance(e, _Event)]
    if following and following[0].kind == "norm" and following[0].args[:1] == (layers[-1].output,):
        final = (following[0].module, _norm(following[0].module, known, operations))
    distinct: list[Rotary] = []
    for layer in layers:
        if layer.rotary is not None and not any(layer.rotary.same(r) for r in distinct):
            distinct.append(layer.rotary)
    return Trace(twin, layers, final, distinct)


def _describe_layer(
    enter: _Event,
    inside: list[Any],
    leave: _Event,
    rotaries: list[Rotary],
    known: dict[Any, Any],
    operations: Operations,
) -> Layer:
    calls = [i for i, e in enumerate(inside) if isinstance(e, attention.Call)]
    if len(calls) != 1:
        raise NotTraced(f"{type(enter.module).__name__} calls attention {len(calls)} times")
    call: attention.Call = inside[calls[0]]
    if call.refused is not None:
        raise NotTraced(f"attention has {call.refused}")
    output = layer_output(leave.output)
    unknown = [e for e in inside if isinstance(e, _Event) and e.kind == "other"]
    if unknown or not isinstance(output, torch.Tensor):
        what = type((unknown or [enter])[0].module).__name__
        raise NotTraced(f"{type(enter.module).__name__} has a {what}, which is not an RMS norm")
    before, middle = _split_at_linear(inside[: calls[0]])
    rest = [e for e in inside[calls[0] + 1 :] if isinstance(e, _Event) and e.kind != "leave"]
    qkv: list[Any] = [e.module for e in middle if e.kind == "linear"]
    linears = [i for i, e in enumerate(rest) if e.kind == "linear"]
    if len(qkv) not in (1, 3) or len(linears) not in (3, 4) or linears[0] != 0:
        raise NotTraced(f"{type(enter.module).__name__} is not attention and then a gated MLP")
    after: list[Any] = [rest[i].module for i in linears]
    for linear in (*qkv, *after):
        if type(linear) is not nn.Linear:
            raise NotTraced(f"{type(linear).__name__} is not torch.nn.Linear")
    gate, down, activation = _gated_mlp(enter.module, after[1:], known, operations)

    def norms(part: list[_Event]) -> list[Norm]:
        return [_norm(e.module, known, operations) for e in part if e.kind == "norm"]

    return Layer(
        module=enter.module,
        args=enter.args,
        kwargs=enter.kwargs,
        output=output,
        call=call,
        qkv=qkv,
        out=after[0],
        before=norms(before),
        heads=norms(middle),
        between=norms(rest[: linears[1]]),
        after=norms(rest[linears[-1] :]),
        gate=gate,
        down=down,
        activation=activation,
        rotary=_rotary_of(enter, rotaries),
    )


def _gated_mlp(
    layer: nn.Module, linears: list[nn.Linear], known: dict[Any, Any], operations: Operations
) -> tuple[list[nn.Linear], nn.Linear, str]:
    """Return the gate and up layers, the down layer, and the activation between them."""
    for module in layer.modules():
        children = module._modules
        if {c for c in children.values() if c in linears} != set(linears):
            continue
        candidates = mlp_candidates(module)
        if not candidates:
            continue
        best = _choose(module, candidates, known, operations)
        gate, up, down = best.roles
        first = [children[gate]] if up is None else [children[gate], children[up]]
        return first, children[down], best.operation  # type: ignore[return-value]
    raise NotTraced(f"{type(layer).__name__} has no gated MLP")


def _norm(module: nn.Module, known: dict[Any, Any], operations: Operations) -> Norm:
    best = _choose(module, norm_candidates(module), known, operations)
    eps_name, unit_offset = best.roles
    return Norm(module.weight, getattr(module, eps_name), unit_offset)  # type: ignore[arg-type]


def _choose(
    module: nn.Module, candidates: list[Candidate], known: dict[Any, Any], operations: Operations
) -> Candidate:
    key = attributes(module)
    if key not in known:
        try:
            best, verification = choose(module, candidates, operations)
        except Exception as error:  # a module that raises is not one of the candidates
            raise NotTraced(f"{type(module).__name__}: {type(error).__name__}") from error
        if not verification.holds:
            raise NotTraced(f"{type(module).__name__} is not what {best.operation} computes")
        known[key] = best
    result: Candidate = known[key]
    return result


def _rotary_of(enter: _Event, rotaries: list[Rotary]) -> Rotary | None:
    """Return the rotary call whose tables the layer received."""
    given = [v for v in (*enter.args, *enter.kwargs.values()) if _is_pair(v)]
    for rotary in rotaries:
        if any(pair[0] is rotary.tables[0] for pair in given):
            return rotary
    return None


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(v, torch.Tensor) for v in value)
    )


def _rest(event: _Event) -> dict[str, Any]:
    """Return a rotary module's keyword arguments other than x and position_ids."""
    first = list(inspect.signature(type(event.module).forward).parameters)[1:3]
    return {name: value for name, value in event.kwargs.items() if name not in first}


def _split_at_linear(events: list[Any]) -> tuple[list[_Event], list[_Event]]:
    first = next((i for i, e in enumerate(events) if e.kind == "linear"), len(events))
    return events[:first], events[first:]


def _position(events: list[Any], kind: str, module: nn.Module) -> int:
    for i, event in enumerate(events):
        if isinstance(event, _Event) and event.kind == kind and event.module is module:
            return i
    raise NotTraced(f"{type(module).__name__} was not called")
