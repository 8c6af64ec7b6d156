"""llmfast's attention and mask functions, registered in transformers' interfaces.

transformers calls the mask function once per forward and kind of mask, and passes the result to
the attention function of every layer. Ours returns a :class:`KeyRanges` for the patterns that the
kernels support. A layer that cannot use it builds the model's original mask from it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .swap import Swap, is_supported
from .verify import MIN_VALUES, Verification, compare, oracle_dtype

# The registered name encodes the model's original implementation, so no state is needed for it.
NAMES = {"sdpa": "llmfast", "eager": "llmfast_eager"}
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256


@dataclass
class KeyRanges:
    """The keys that each query may attend to, as ranges instead of a dense matrix.

    Query i of row b has position ``query_offset + i`` and attends to the keys j with
    ``key_start[b] <= j < key_end[b]``, ``j <= query_offset + i`` and, with a window,
    ``j > query_offset + i - window``.
    """

    query_length: int
    key_length: int
    query_offset: int | torch.Tensor  # of the first query; a tensor with a static cache
    window: int | None
    key_start: torch.Tensor | None  # int32 [B]; None: 0
    key_end: torch.Tensor | None  # int32 [B]; None: key_length
    make_dense: Callable[[], torch.Tensor | None]  # builds the model's original mask
    _dense: list[torch.Tensor | None] = field(default_factory=list)

    # transformers passes on any mask of four dimensions, after calling contiguous()
    ndim = 4

    def contiguous(self) -> KeyRanges:
        return self

    def dense(self) -> torch.Tensor | None:
        """Return the mask for the model's original attention, built once for all layers."""
        if not self._dense:
            self._dense.append(self.make_dense())
        return self._dense[0]


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Any = None,
    *,
    original: str,
    **kwargs: Any,
) -> Any:
    """Build a mask for transformers: a :class:`KeyRanges`, or the original function's result.

    Args:
        attention_mask: bool [B, at least the keys so far], False at padding; or None.
        original: the name of the model's original implementation.
        kwargs: passed on to the original mask function.
    """
    if isinstance(attention_mask, KeyRanges):  # built by an earlier call in the same forward
        return attention_mask
    if isinstance(q_offset, torch.Tensor):
        q_offset = q_offset.clone()  # a static cache advances its own in place, before we read it
    make_dense = partial(
        ALL_MASK_ATTENTION_FUNCTIONS[original],
        batch_size,
        q_length,
        kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    known, window = _causal_window(mask_function)
    if not known or kwargs.get("use_vmap"):
        return make_dense()
    key_start = key_end = None
    if attention_mask is not None:
        padded = _padding_ranges(attention_mask, kv_length, kv_offset)
        if padded is None:
            return make_dense()
        key_start, key_end = padded
    return KeyRanges(
        query_length=q_length,
        key_length=kv_length,
        query_offset=q_offset - kv_offset,
        window=window,
        key_start=key_start,
        key_end=key_end,
        make_dense=make_dense,
    )


def _causal_window(mask_function: Callable[..., Any]) -> tuple[bool, int | None]:
    """Return whether a mask function is causal with at most a sliding window, and that window.

    transformers builds a new windowed function for every mask, so its parts identify it.
    """
    if mask_function is causal_mask_function:
        return True, None
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    if len(parts) == 2 and parts[1] is causal_mask_function:
        window = inspect.getclosurevars(parts[0]).nonlocals.get("sliding_window")
        if isinstance(window, int):
            twin = inspect.getclosurevars(sliding_window_causal_mask_function(window)).nonlocals
            if twin["mask_functions"][0].__code__ is parts[0].__code__:
                return True, window
    return False, None


def _padding_ranges(
    mask: torch.Tensor, kv_length: int, kv_offset: int
) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
    """Return each row's first valid key and the key after its last; None if a row has holes.

    Returns two Nones if nothing is padded. Synchronizes with the device, as transformers does.
    """
    if mask.ndim != 2:
        return None
    mask = mask[:, kv_offset : kv_offset + kv_length]
    if mask.shape[1] == kv_length and bool(mask.all()):
        return None, None
    ones = mask.to(torch.int32)
    count = ones.sum(dim=1, dtype=torch.int32)
    start = ones.argmax(dim=1).to(torch.int32)
    end = start + count
    columns = torch.arange(mask.shape[1], device=mask.device)
    runs = (columns >= start[:, None]) & (columns < end[:, None])
    if not torch.equal(runs, mask.bool()):
        return None
    return start, end


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *args: Any,
    original: str,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Compute attention for transformers: with our kernel where possible, else the original.

    Args:
        query: [B, Hq, Lq, D], rotated; key, value: [B, Hkv, Lk, D] with the cache's tokens.
        attention_mask: a :class:`KeyRanges`, or a mask for the original.
        original: the name of the model's original implementation.

    Returns:
        The output [B, Lq, Hq, D], contiguous, and the original's attention weights or None.
    """
    state: AttentionState | None = getattr(module, STATE, None)
    if state is not None and state.calls is not None:
        reason = _why_not(module, query, key, value, attention_mask, args, kwargs)
        state.calls.append(_describe(module, query, key, attention_mask, kwargs, reason))
    elif state is not None and state.kept is None:
        reason = _why_not(module, query, key, value, attention_mask, args, kwargs)
        if reason is None:
            return _ours(state.swap, query, key, value, attention_mask, kwargs), None
        state.swap.fell_back(module, reason)
    mask = attention_mask.dense() if isinstance(attention_mask, KeyRanges) else attention_mask
    return _run_original(original, module, query, key, value, mask, *args, **kwargs)


STATE = "_llmfast_attention"  # name of the attribute that holds a module's AttentionState


@dataclass
class AttentionState:
    """State that a patch stores on a module that calls the attention function."""

    swap: Swap
    kept: str | None = None  # the reason why every call runs the original
    calls: list[Call] | None = None  # the recorded calls, while a patch watches one forward


@dataclass
class Call:
    """How a module calls the attention function: everything its verification depends on."""

    module: nn.Module
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    window: int | None  # the mask's window: the original applies the mask, not the argument
    kwargs: dict[str, Any]
    refused: str | None  # the reason why our kernel cannot take such a call

    @property
    def key(self) -> tuple[Any, ...]:
        """The key of the call's verification; calls with equal keys share one."""
        plain = sorted(
            (name, "tensor" if isinstance(value, torch.Tensor) else repr(value))
            for name, value in self.kwargs.items()
        )
        shapes = (self.query_heads, self.kv_heads, self.head_dim, self.dtype, self.device)
        return (type(self.module), self.refused, *shapes, *plain)


def _describe(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: Any,
    kwargs: dict[str, Any],
    refused: str | None,
) -> Call:
    return Call(
        module,
        query_heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=query.shape[3],
        dtype=query.dtype,
        device=query.device,
        window=mask.window if isinstance(mask, KeyRanges) else None,
        kwargs={k: v for k, v in kwargs.items() if k in _RESULT_ARGUMENTS and v is not None},
        refused=refused,
    )


# arguments that change the result; the others describe the forward (positions, use of a cache)
_RESULT_ARGUMENTS = ("scaling", "sliding_window", "softcap", "s_aux", "is_causal", "position_bias")


def _why_not(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> str | None:
    if not isinstance(mask, KeyRanges):
        return "a mask that is not causal with padding at the ends"
    if mask.query_length != query.shape[2] or mask.key_length != key.shape[2]:
        return "a mask made for other lengths"
    if args or kwargs.get("dropout") or module.training:
        return "the module is in training mode"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return "outside torch.no_grad()"
    if kwargs.get("position_bias") is not None or kwargs.get("cache") is not None:
        return "a position bias or a paged cache of transformers"
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        return "not causal"
    if not query.dtype == key.dtype == value.dtype or not is_supported(query):
        return f"query is {query.dtype}, key {key.dtype}, value {value.dtype}"
    if key.shape != value.shape:
        return f"heads of {key.shape[3]} for keys and of {value.shape[3]} for values"
    if not MIN_HEAD_DIM <= query.shape[3] <= MAX_HEAD_DIM:
        return f"head dimension {query.shape[3]}"
    if query.stride(3) != 1 or key.stride(3) != 1 or value.stride(3) != 1:
        return "heads that are not contiguous"
    return None


def _ours(
    swap: Swap,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: KeyRanges,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    output: torch.Tensor = swap.operations.flash_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale=kwargs.get("scaling"),
        window=mask.window,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        key_start=mask.key_start,
        key_end=mask.key_end,
        query_offset=mask.query_offset,
    )
    return output


def _run_original(
    original: str, module: nn.Module, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, Any]:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)
    result: tuple[torch.Tensor, Any] = function(module, *args, **kwargs)
    return result


@torch.no_grad()
def verify(call: Call, original: str, swap: Swap) -> Verification:
    """Compare our attention with the original on random tensors, for one way of calling it.

    The batch has an unpadded, a left-padded and a right-padded row. It runs as a prefill and as a
    step of one token, both long enough to exceed the sliding window.
    """
    results = [
        _verify_shape(call, original, swap, query_length, key_length)
        for query_length, key_length in _lengths(call)
    ]
    return max(results, key=lambda result: result.error / result.limit)


def _lengths(call: Call) -> list[tuple[int, int]]:
    past = int(call.kwargs.get("sliding_window") or 0) + 7
    prefill = -(-MIN_VALUES // (2 * call.query_heads * call.head_dim)) + 64
    return [(prefill, prefill), (prefill, past + prefill), (1, past + 64)]


def _verify_shape(
    call: Call, original: str, swap: Swap, query_length: int, key_length: int
) -> Verification:
    generator = torch.Generator().manual_seed(0)
    # with one token per row, enough rows for the number of values that compare() needs
    batch = max(3, -(-MIN_VALUES // (query_length * call.query_heads * call.head_dim)) + 2)

    def randn(heads: int, length: int) -> torch.Tensor:
        # contiguous tokens with adjacent heads, the layout that projections produce
        x = torch.randn(batch, length, heads, call.head_dim, generator=generator)
        return x.to(call.device, call.dtype).transpose(1, 2)

    query = randn(call.query_heads, query_length)
    key, value = randn(call.kv_heads, key_length), randn(call.kv_heads, key_length)
    padding = torch.ones(batch, key_length, dtype=torch.bool, device=call.device)
    padding[1, :5] = False
    if query_length == key_length:
        padding[2, -5:] = False
    window = call.kwargs.get("sliding_window")
    mask = make_mask(
        batch,
        query_length,
        key_length,
        q_offset=key_length - query_length,
        mask_function=(
            causal_mask_function if window is None else sliding_window_causal_mask_function(window)
        ),
        attention_mask=padding,
        original=original,
        allow_is_causal_skip=False,
        device=call.device,
        dtype=call.dtype,
        local_size=window,
        config=getattr(call.module, "config", None),
    )
    kwargs = {"dropout": 0.0, **call.kwargs}
    reason = _why_not(call.module, query, key, value, mask, (), kwargs)
    if reason is not None:
        raise ValueError(reason)
    ours = _ours(swap, query, key, value, mask, kwargs)
    args = (query, key, value)
    theirs = _run_original(original, call.module, *args, mask.dense(), **kwargs)[0]
    higher = oracle_dtype(call.dtype)
    precise = tuple(x.to(higher) for x in args)
    oracle = _run_original(original, call.module, *precise, mask.dense(), **kwargs)[0]
    valid = padding[:, key_length - query_length :]  # the outputs of padded queries are never used
    return compare(ours[valid], theirs.to(ours.dtype)[valid], oracle[valid])


for _original, _name in NAMES.items():
    AttentionInterface.register(_name, partial(attention, original=_original))
    AttentionMaskInterface.register(_name, partial(make_mask, original=_original))
