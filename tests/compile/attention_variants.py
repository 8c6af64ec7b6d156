"""The compile gate's variants of attention: features, dtypes, head sizes and targets pairwise.

Hopper and Blackwell are given their own shared memory; the launches for sm_80 are those of the
smallest GPU from there on, so they must fit everywhere.
"""

from __future__ import annotations

import re

from variant import SHARED_LIMIT, SHARED_LIMIT_EVERYWHERE, Variant

from llmfast_kernels.attention.kernels.arguments import Heads, Output, Scoring, Sequences
from llmfast_kernels.attention.kernels.decode import choose_decode_launch
from llmfast_kernels.attention.kernels.prefill import choose_prefill_launch
from llmfast_kernels.common.device import Device

GROUP = 4
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
NUMBERS = (
    "stride_lse_h",
    "stride_offset",
    "stride_table",
    "stride_tree",
    "n_queries",
    "n_keys",
    "query_offset",
)
MERGED_NUMBERS = ("stride_lse_h", "n_kv_heads", "n_queries", "num_splits", "n_partials")
SEQUENCES = {  # pointers that are absent unless a feature asks for them
    "keys": {"key_start_ptr": "*i64:16", "key_end_ptr": "*i64:16"},
    "offset": {"offset_ptr": "*i64:16"},
    "varlen": {"cu_q_ptr": "*i32:16", "cu_k_ptr": "*i32:16"},
    "paged": {"cu_q_ptr": "*i32:16", "block_table_ptr": "*i32:16", "context_len_ptr": "*i32:16"},
    "tree": {"tree_mask_ptr": "*i1:16"},
}


def _device(target: str) -> Device:
    shared = SHARED_LIMIT_EVERYWHERE if target == "sm_80" else SHARED_LIMIT[target]
    return Device("", target, sm_count=132, shared_memory=shared, l2_bytes=0)


def _attention(
    kernel: str, target: str, dtype: str, dim: int, features: str, launch_options: dict[str, object]
) -> Variant:
    asked = [feature.split("=")[0] for feature in features.split()]
    block_size = re.search(r"paged=(\d+)", features)
    heads = Heads(f"*{dtype}:16", *["i32:16"] * 3)
    pointers = {
        name: kind for feature in asked for name, kind in SEQUENCES.get(feature, {}).items()
    }
    out = f"*{dtype}:16" if not launch_options.get("SPLIT") else "*fp32:16"
    signature: dict[str, object] = {
        "q": heads,
        "k": heads,
        "v": heads,
        "out": Output(out, "*fp32:16" if "lse" in asked else None),
        "sequences": Sequences(**pointers),
        "scoring": Scoring(
            scale="fp32",
            softcap="fp32" if "softcap" in asked else None,
            sinks_ptr="*bf16:16" if "sinks" in asked else None,
        ),
        **dict.fromkeys(NUMBERS, "i32"),
    }
    constexprs: dict[str, object] = {
        "CAUSAL": "full" not in asked and "tree" not in asked,
        "MIXED": "mixed" in asked,
        "BLOCK_SIZE": int(block_size[1]) if block_size else None,
        "GROUP": GROUP,
        "HEAD_DIM": dim,
    }
    if "window" in asked:
        signature["window"] = "i32"
    else:
        constexprs["window"] = None
    own = ("n_heads", "batch") if kernel == "prefill" else ("n_kv_heads", "num_splits")
    num_warps, num_stages = launch_options.pop("num_warps"), launch_options.pop("num_stages")
    return Variant(
        name=f"attention/{kernel} {dtype} {dim} {features}".rstrip(),
        kernel=f"llmfast_kernels.attention.kernels.{kernel}:_{kernel}_kernel",
        signature=signature | dict.fromkeys(own, "i32"),
        constexprs=constexprs | launch_options,
        num_warps=int(str(num_warps)),
        num_stages=int(str(num_stages)),
        targets=(target,),
        everywhere=target == "sm_80",
    )


def _prefill(target: str, dtype: str, dim: int, features: str = "") -> Variant:
    launch = choose_prefill_launch(
        n_queries=4096,
        head_dim=dim,
        element_size=SIZES[dtype],
        device=_device(target),
    )
    options: dict[str, object] = {
        "HEADS_FIRST": launch.heads_first,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    return _attention("prefill", target, dtype, dim, features, options)


def _decode(target: str, dtype: str, dim: int, n_queries: int, features: str = "") -> Variant:
    launch = choose_decode_launch(
        sequences=8,
        rows=n_queries * GROUP,
        key_blocks=64,
        head_dim=dim,
        element_size=SIZES[dtype],
        device=_device(target),
    )
    options: dict[str, object] = {
        "SPLIT": "split" in features,
        "ONE_QUERY": n_queries == 1,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    features = f"queries={n_queries} {features}"
    return _attention("decode", target, dtype, dim, features, options)


def _merge(target: str, dtype: str, dim: int, splits: int, features: str = "") -> Variant:
    return Variant(
        name=f"attention/merge {dtype} {dim} splits={splits} {features}".rstrip(),
        kernel="llmfast_kernels.attention.kernels.decode:_merge_kernel",
        signature={
            "out": Output(f"*{dtype}:16", "*fp32:16" if "lse" in features else None),
            "sequences": Sequences(cu_q_ptr="*i32:16" if "varlen" in features else None),
            "partial_ptr": "*fp32:16",
            **dict.fromkeys(MERGED_NUMBERS, "i32"),
        },
        constexprs={"GROUP": GROUP, "HEAD_DIM": dim, "BLOCK_S": splits},
        num_warps=4,
        targets=(target,),
    )


VARIANTS = [
    _prefill("sm_90", "bf16", 128),
    _prefill("sm_90", "bf16", 128, "paged=64 lse"),
    _prefill("sm_90", "fp16", 256, "window softcap"),
    _prefill("sm_90", "fp32", 64, "paged=32 tree"),
    _prefill("sm_80", "bf16", 128, "window sinks"),
    _prefill("sm_80", "fp16", 64, "full softcap varlen"),
    _prefill("sm_80", "fp32", 128, "softcap offset keys"),
    _prefill("sm_80", "bf16", 256, "paged=16 sinks lse"),
    _prefill("sm_100", "bf16", 128, "paged=16 window softcap mixed"),
    _prefill("sm_120", "bf16", 128, "paged=64"),
    _prefill("gfx942", "bf16", 128, "paged=64 window"),
    _decode("sm_90", "bf16", 128, 1, "split"),
    _decode("sm_90", "bf16", 128, 1, "paged=64 sinks lse mixed"),
    _decode("sm_90", "fp16", 64, 3, "split paged=64 window"),
    _decode("sm_90", "bf16", 256, 16, "split softcap keys"),
    _decode("sm_80", "bf16", 128, 16, "split paged=16 tree"),
    _decode("sm_80", "fp16", 112, 1, "split window sinks"),
    _decode("sm_100", "bf16", 128, 1, "split paged=64"),
    _decode("sm_100", "bf16", 64, 3, "full varlen lse"),
    _decode("sm_120", "bf16", 128, 1, "split paged=64"),
    _decode("gfx942", "bf16", 128, 1, "split paged=64"),
    _merge("sm_90", "bf16", 128, 64, "lse"),
    _merge("sm_80", "fp16", 64, 16, "varlen"),
    _merge("gfx942", "bf16", 128, 16, "lse"),
]
