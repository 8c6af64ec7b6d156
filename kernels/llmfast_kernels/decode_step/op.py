"""begin_step and end_step: their contracts and the choice of implementation."""

from __future__ import annotations

import torch

from ..common.checks import check_layout
from .reference import begin_step_reference, end_step_reference


def begin_step(
    context: torch.Tensor, first_row: torch.Tensor, block_table: torch.Tensor, *, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the position and the cache slot of each row's next token, and the grown context.

    Args:
        context: int32 ``(n_rows,)``, contiguous: the row's tokens in the cache; 0: an idle row.
        first_row: int64 ``(n_rows,)``, contiguous: the row of the rotary tables at position 0.
        block_table: int32 ``(n_rows, max_blocks)``, contiguous: a row's blocks in order. A live
            row must have the block of its next token. Entries of an idle row are not followed.
        block_size: tokens per block.

    Returns:
        ``(positions, slots, context_len)``, new tensors ``(n_rows,)``, as :func:`paged_attention`
        and :func:`write_kv` take them. ``positions``: int64, ``first_row + context``. ``slots``:
        int64, ``block * block_size + offset``, -1 in an idle row. ``context_len``: int32, the
        context with the next token, 0 in an idle row.

    Raises:
        TypeError: a dtype that is not the one above.
        ValueError: a shape, device or memory layout that breaks the contract.
    """
    rows = (len(context),)
    _check("begin_step", "context", context, torch.int32, rows, context)
    _check("begin_step", "first_row", first_row, torch.int64, rows, context)
    table = (*rows, block_table.shape[-1]) if block_table.ndim == 2 else (*rows, 1)
    _check("begin_step", "block_table", block_table, torch.int32, table, context)
    if not context.is_cuda:
        return begin_step_reference(context, first_row, block_table, block_size=block_size)
    from .kernel import launch_begin_step  # imports Triton, which a machine without CUDA may lack

    return launch_begin_step(context, first_row, block_table, block_size=block_size)


def end_step(
    sampled: torch.Tensor,
    status: torch.Tensor,
    context_len: torch.Tensor,
    stop_tokens: torch.Tensor,
    pad: torch.Tensor,
    *,
    tokens: torch.Tensor,
    host_tokens: torch.Tensor,
    context: torch.Tensor,
    generated: torch.Tensor,
    seen: torch.Tensor | None = None,
) -> None:
    """Record the sampled tokens IN PLACE, and end the rows that reached a stop token.

    **Changes ``tokens``, ``host_tokens``, ``context``, ``generated`` and ``seen``; returns
    nothing.** A row is live if its ``context_len`` is greater than 0, else idle.

    The pad is written for the host only. An idle row's entry of ``tokens`` is token 0, so the
    next step can embed it whatever the pad is.

    Args:
        sampled: int64 ``(n_rows,)``, contiguous like all that follow: the tokens that
            :func:`sample_tokens` chose.
        status: int32 ``(n_rows,)``: their status; 0 is good.
        context_len: int32 ``(n_rows,)``: tokens in the cache now. May be ``context`` itself.
        stop_tokens: int64 ``(n_stops,)``; a negative one stops nothing.
        pad: int64, zero-dimensional; any number, in the vocabulary or not.
        tokens: int64 ``(n_rows,)``. WRITTEN: the sampled token, or 0 in an idle row.
        host_tokens: int64 ``(n_rows,)``, for the host to read. WRITTEN: in a live row the sampled
            token, or ``NO_TOKEN - status`` if the status is not 0; in an idle row the pad.
        context: int32 ``(n_rows,)``. WRITTEN: ``context_len``, or 0 where the row is done.
        generated: int32 ``(n_rows,)``. Incremented by 1, in idle rows too.
        seen: bool ``(n_rows, n_vocab)`` or None. WRITTEN: true at each live row's token.

    Raises:
        TypeError: a dtype that is not the one above.
        ValueError: a shape, device or memory layout that breaks the contract.
    """
    rows, like = (len(sampled),), sampled
    _check("end_step", "sampled", sampled, torch.int64, rows, like)
    _check("end_step", "status", status, torch.int32, rows, like)
    _check("end_step", "context_len", context_len, torch.int32, rows, like)
    _check("end_step", "stop_tokens", stop_tokens, torch.int64, (stop_tokens.numel(),), like)
    _check("end_step", "pad", pad, torch.int64, (), like)
    _check("end_step", "tokens", tokens, torch.int64, rows, like)
    _check("end_step", "host_tokens", host_tokens, torch.int64, rows, like)
    _check("end_step", "context", context, torch.int32, rows, like)
    _check("end_step", "generated", generated, torch.int32, rows, like)
    if seen is not None:
        vocabulary = (*rows, seen.shape[-1]) if seen.ndim == 2 else (*rows, 1)
        _check("end_step", "seen", seen, torch.bool, vocabulary, like)
    run = end_step_reference
    if sampled.is_cuda:
        from .kernel import launch_end_step

        run = launch_end_step
    run(
        sampled,
        status,
        context_len,
        stop_tokens,
        pad,
        tokens=tokens,
        host_tokens=host_tokens,
        context=context,
        generated=generated,
        seen=seen,
    )


def _check(
    op: str,
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    like: torch.Tensor,
) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
    check_layout(op, name, tensor, shape, like.device)
