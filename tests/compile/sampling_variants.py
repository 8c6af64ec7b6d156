"""What the compile gate compiles of sampling: each kernel with all that may be asked, and least."""

from __future__ import annotations

from variant import Variant

from llmfast_kernels.sampling.kernel import choose_launch

N_VOCAB = 128256
PENALISED = {
    **dict.fromkeys(("repetition_ptr", "presence_ptr", "frequency_ptr", "bias_ptr"), "*fp32:16"),
    "seen_ptr": "*u8:16",
    "counts_ptr": "*i32:16",
    **dict.fromkeys(("stride_logits", "stride_seen", "stride_counts", "stride_bias"), "i32:16"),
}
FILTERS = {"top_k_ptr": "*i32:16", "top_p_ptr": "*fp32:16", "min_p_ptr": "*fp32:16"}
SURVEYED = {"maxima_ptr": "*fp32:16", "first_ptr": "*i32:16", "sums_ptr": "*fp32:16"}
BOUNDED = {"z_max_ptr": "*fp32:16", "bound_ptr": "*fp32:16"}
LISTED = {
    "lists_ptr": "*fp32:16",
    "n_listed_ptr": "*i32:16",
    "few_ptr": "*i64:16",
    "stride_lists": "i32",
}
WEIGHED = {
    **BOUNDED,
    "weights_ptr": "*i64:16",
    "sizes_ptr": "*i32:16",
    **LISTED,
}
# absent where nothing is asked but a draw; where not even that, BOUNDED and the temperature too
OPTIONAL = (
    {name for name in PENALISED if name.endswith("_ptr")}
    | FILTERS.keys()
    | {"sums_ptr", "lists_ptr", "sizes_ptr", "n_listed_ptr", "few_ptr"}
)
UNUSED_STRIDES = ("stride_seen", "stride_counts", "stride_bias")


def _variant(kernel: str, target: str, dtype: str, n_rows: int, asked: str) -> Variant:
    launch = choose_launch(n_rows, N_VOCAB)
    logits = {"logits_ptr": f"*{dtype}:16", **PENALISED, "temperature_ptr": "*fp32:16"}
    signature = {
        "survey": logits | FILTERS | SURVEYED,
        "bound": logits | FILTERS | SURVEYED | BOUNDED | LISTED,
        "weigh": logits | FILTERS | WEIGHED | {"maxima_ptr": "*fp32:16"},
        "draw": logits | FILTERS | WEIGHED,
    }[kernel]
    if kernel in ("survey", "bound"):
        del signature["min_p_ptr"]
    if kernel == "weigh":
        del signature["top_p_ptr"]
    if kernel == "draw":
        signature |= dict.fromkeys(("seeds_ptr", "positions_ptr"), "*i64:16")
    if kernel in ("bound", "draw"):
        signature |= {"tokens_ptr": "*i64:16"}
    if kernel == "bound":
        signature |= {"status_ptr": "*i32:16"}
    absent = {
        "all": set(),
        "draw": OPTIONAL,
        "greedy": OPTIONAL | BOUNDED.keys() | {"temperature_ptr"},
    }[asked] & signature.keys()
    constexprs: dict[str, object] = dict.fromkeys(absent)
    if asked != "all" and "stride_seen" in signature:
        constexprs |= dict.fromkeys(UNUSED_STRIDES, 1)
    constexprs["CHUNK"] = launch.chunk
    if kernel != "draw":
        constexprs["GROUPS"] = launch.groups if asked == "all" else 1
    if kernel in ("bound", "draw"):
        constexprs["MAX_CHUNKS"] = launch.max_chunks
    if kernel == "bound":
        constexprs["LIST"] = True
    if kernel == "draw":
        constexprs["WIDTH"] = launch.width
    if kernel != "survey":
        constexprs["FEW"] = launch.few
    given = {name: kind for name, kind in signature.items() if name not in constexprs}
    return Variant(
        name=f"sampling/{kernel} {dtype} rows={n_rows} {asked}",
        kernel=f"llmfast_kernels.sampling.kernel:_{kernel}_kernel",
        signature={**given, "n_vocab": "i32:16"},
        constexprs=constexprs,
        num_warps=launch.num_warps if kernel in ("survey", "weigh") else launch.row_warps,
        targets=(target,),
        options={"enable_fp_fusion": False},
    )


def _logprobs(kernel: str, target: str, dtype: str) -> Variant:
    launch = choose_launch(64, N_VOCAB)
    of_rows = kernel == "logprobs"
    signature = {
        "logits_ptr": f"*{dtype}:16",
        "sums_ptr": "*fp32:16",
        "ranks_ptr": "*i64:16",
        "n_vocab": "i32:16",
        "stride_logits": "i32:16",
        "n_listed": "i32",
    }
    constexprs: dict[str, object] = {"CHUNK": launch.chunk}
    if of_rows:
        signature |= dict.fromkeys(("tokens_ptr", "top_tokens_ptr"), "*i64:16")
        signature |= dict.fromkeys(("logprobs_ptr", "top_logprobs_ptr"), "*fp32:16")
        signature |= {"status_ptr": "*i32:16", "n_top": "i32"}
        constexprs |= {"MAX_CHUNKS": launch.max_chunks, "TILE": 1024}
    return Variant(
        name=f"sampling/{kernel} {dtype}",
        kernel=f"llmfast_kernels.sampling.logprobs:_{kernel}_kernel",
        signature=signature,
        constexprs=constexprs,
        num_warps=launch.row_warps if of_rows else launch.num_warps,
        targets=(target,),
    )


VARIANTS = [
    _variant("survey", "sm_80", "bf16", 1, "all"),
    _variant("survey", "sm_90", "fp32", 64, "greedy"),
    _variant("bound", "sm_90", "bf16", 1, "all"),
    _variant("bound", "sm_100", "fp32", 64, "greedy"),
    _variant("weigh", "sm_100", "fp32", 1, "all"),
    _variant("weigh", "sm_80", "fp16", 64, "draw"),
    _variant("draw", "sm_90", "bf16", 1, "all"),
    _logprobs("chunk_logprobs", "sm_90", "fp32"),
    _logprobs("logprobs", "sm_80", "bf16"),
]
