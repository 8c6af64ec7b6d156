"""The compile gate's variants of sampling: each kernel with every option, or with the least."""

from __future__ import annotations

from typing import Any

from variant import Variant

from llmfast_kernels.sampling.kernel import Launch, choose_launch
from llmfast_kernels.sampling.kernels.arguments import (
    Candidates,
    ChunkMaxima,
    Filters,
    ScoreInputs,
)

N_VOCAB = 128256
FLOATS, INTS, LONGS = "*fp32:16", "*i32:16", "*i64:16"


def _inputs(dtype: str, options: str) -> ScoreInputs:
    logits, stride = f"*{dtype}:16", "i32:16"
    if options == "all":
        penalties = (FLOATS, FLOATS, FLOATS, "*u8:16", INTS, FLOATS)
        return ScoreInputs(logits, *penalties, FLOATS, *(stride,) * 4)  # type: ignore[arg-type]
    temperature = None if options == "greedy" else FLOATS
    absent = (None,) * 6
    return ScoreInputs(logits, *absent, temperature, stride, 1, 1, 1)  # type: ignore[arg-type]


def _signature(kernel: str, dtype: str, options: str) -> dict[str, Any]:
    """Return the types of a kernel's arguments. ``options``: "all", "temperature" or "greedy"."""
    filtered = options == "all"
    filters = {"top_k_ptr": INTS, "top_p_ptr": FLOATS, "min_p_ptr": FLOATS}
    unread = {"chunk_max": "min_p_ptr", "threshold": "min_p_ptr", "candidates": "top_p_ptr"}
    if not filtered:
        filters = dict.fromkeys(filters)
    elif kernel in unread:
        filters[unread[kernel]] = None
    candidates = (FLOATS, INTS, INTS, LONGS) if filtered else (None,) * 4
    row = {"z_max_ptr": FLOATS, "threshold_ptr": FLOATS, "weights_ptr": LONGS}
    if kernel == "threshold":
        del row["weights_ptr"]
    if options == "greedy":
        row = dict.fromkeys(row)
    of_all = {"inputs": _inputs(dtype, options), "filters": Filters(**filters), "n_vocab": "i32:16"}
    listed = row | {"stride_lists": "i32"}
    chunk_maxima = ChunkMaxima(FLOATS, INTS, FLOATS if filtered else None)
    return (
        of_all
        | {
            "chunk_max": {"written": chunk_maxima},
            "threshold": listed
            | {"chunk_maxima": chunk_maxima, "candidates": Candidates(*candidates)}
            | {"tokens_ptr": LONGS, "status_ptr": INTS},
            "candidates": listed | {"written": Candidates(*candidates), "maxima_ptr": FLOATS},
            "sample": listed
            | {"candidates": Candidates(*candidates), "tokens_ptr": LONGS}
            | {"seeds_ptr": LONGS, "positions_ptr": LONGS},
        }[kernel]
    )


def _constexprs(kernel: str, launch: Launch, options: str) -> dict[str, object]:
    values = {
        "CHUNK": launch.chunk,
        "MAX_CHUNKS": launch.max_chunks,
        "GROUPS": launch.groups if options == "all" else 1,
        "SMALL": launch.small,
        "WIDTH": launch.width,
        "LIST": True,
    }
    names = {
        "chunk_max": ("CHUNK", "GROUPS"),
        "threshold": ("CHUNK", "MAX_CHUNKS", "GROUPS", "SMALL", "LIST"),
        "candidates": ("CHUNK", "GROUPS", "SMALL"),
        "sample": ("CHUNK", "MAX_CHUNKS", "WIDTH", "SMALL"),
    }[kernel]
    return {name: values[name] for name in names}


def _variant(kernel: str, target: str, dtype: str, n_rows: int, options: str) -> Variant:
    launch = choose_launch(n_rows, N_VOCAB)
    signature = _signature(kernel, dtype, options)
    absent = {name: None for name, kind in signature.items() if kind is None}
    return Variant(
        name=f"sampling/{kernel} {dtype} rows={n_rows} {options}",
        kernel=f"llmfast_kernels.sampling.kernels.{kernel}:{kernel}_kernel",
        signature={name: kind for name, kind in signature.items() if kind is not None},
        constexprs=_constexprs(kernel, launch, options) | absent,
        num_warps=launch.num_warps if kernel in ("chunk_max", "candidates") else launch.row_warps,
        targets=(target,),
        options={"enable_fp_fusion": False},
    )


def _logprobs(kernel: str, target: str, dtype: str) -> Variant:
    launch = choose_launch(64, N_VOCAB)
    by_row = kernel == "logprobs"
    signature: dict[str, Any] = {
        "logits_ptr": f"*{dtype}:16",
        "sums_ptr": FLOATS,
        "sort_keys_ptr": LONGS,
        "n_vocab": "i32:16",
        "stride_logits": "i32:16",
        "n_listed": "i32",
    }
    constexprs: dict[str, object] = {"CHUNK": launch.chunk}
    if by_row:
        signature |= dict.fromkeys(("tokens_ptr", "top_tokens_ptr"), LONGS)
        signature |= dict.fromkeys(("logprobs_ptr", "top_logprobs_ptr"), FLOATS)
        signature |= {"status_ptr": INTS, "n_top": "i32"}
        constexprs |= {"MAX_CHUNKS": launch.max_chunks, "TILE": 1024}
    return Variant(
        name=f"sampling/{kernel} {dtype}",
        kernel=f"llmfast_kernels.sampling.kernels.logprobs:{kernel}_kernel",
        signature=signature,
        constexprs=constexprs,
        num_warps=launch.row_warps if by_row else launch.num_warps,
        targets=(target,),
    )


VARIANTS = [
    _variant("chunk_max", "sm_80", "bf16", 1, "all"),
    _variant("chunk_max", "sm_90", "fp32", 64, "greedy"),
    _variant("threshold", "sm_90", "bf16", 1, "all"),
    _variant("threshold", "sm_100", "fp32", 64, "greedy"),
    _variant("candidates", "sm_100", "fp32", 1, "all"),
    _variant("candidates", "sm_80", "fp16", 64, "temperature"),
    _variant("threshold", "gfx942", "bf16", 1, "all"),
    _variant("sample", "sm_90", "bf16", 1, "all"),
    _variant("sample", "gfx942", "bf16", 1, "all"),
    _logprobs("chunk_logprobs", "sm_90", "fp32"),
    _logprobs("logprobs", "sm_80", "bf16"),
]
