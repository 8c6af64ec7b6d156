"""The compile gate's variants of rope: pairs, dtypes, tables, launches and targets pairwise."""

from __future__ import annotations

import triton
from variant import Variant

from llmfast_kernels.kv_cache.kernel import Cache, TokenHeads
from llmfast_kernels.rope.kernel import HeadNorms, Rotation, choose_launch

HEADS, KV_HEADS = 32, 8


def _rope(
    target: str,
    dtype: str,
    dims: tuple[int, int],
    tables: str,
    *,
    interleaved: bool,
    few_tokens: bool,
) -> Variant:
    head_dim, rotary_dim = dims
    launch = choose_launch(HEADS, head_dim, rotary_dim, few_tokens)
    heads = TokenHeads(f"*{dtype}:16", "i32:16", "i32:16")
    positions = "*i32:16" if few_tokens else "*i64:16"
    return Variant(
        name=f"rope/{'interleaved' if interleaved else 'halves'} {dtype} {head_dim}/{rotary_dim} "
        f"tables {tables}{' few tokens' if few_tokens else ''}",
        kernel="llmfast_kernels.rope.kernel:_rope_kernel",
        signature={
            "q": heads,
            "k": heads,
            "rotation": Rotation(f"*{tables}:16", f"*{tables}:16", positions),
            **dict.fromkeys(("q_out_ptr", "k_out_ptr"), f"*{dtype}:16"),
        },
        constexprs={
            "Q_HEADS": HEADS,
            "KV_HEADS": KV_HEADS,
            "HEAD_DIM": head_dim,
            "HALF": rotary_dim // 2,
            "INTERLEAVED": interleaved,
            "MANY_TOKENS": False,
            "BLOCK_H": launch.block_h,
            "BLOCK_R": launch.block_r,
            "BLOCK_P": launch.block_p,
        },
        num_warps=launch.num_warps,
        targets=(target,),
        options={"enable_fp_fusion": False},
    )


def _rope_write_kv(
    target: str,
    dtype: str,
    dims: tuple[int, int],
    tables: str | None,
    *,
    norm: bool,
    few_tokens: bool,
    interleaved: bool = False,
    unit_offset: bool = False,
) -> Variant:
    head_dim, rotary_dim = dims
    launch = choose_launch(HEADS, head_dim, rotary_dim, few_tokens, norm)
    pointer = f"*{dtype}:16"
    heads = TokenHeads(pointer, "i32:16", "i32:16")
    table = f"*{tables}:16" if tables else None
    weight = pointer if norm else None
    rotation = f"{'interleaved' if interleaved else 'halves'} tables {tables}" if tables else "none"
    return Variant(
        name=f"rope/write_kv {dtype} {head_dim}/{rotary_dim} {rotation}"
        f"{' norm' if norm else ''}{' gemma' if unit_offset else ''}"
        f"{' few tokens' if few_tokens else ''}",
        kernel="llmfast_kernels.rope.kernel:_rope_write_kv_kernel",
        signature={
            "q": heads,
            "k": heads,
            "v": heads,
            "rotation": Rotation(table, table, "*i64:16" if tables else None),
            "norms": HeadNorms(weight, weight, "fp32"),
            "cache": Cache(pointer, pointer, "i32:16", "i32:16", "i32:16"),
            "slots_ptr": "*i64:16",
            "q_out_ptr": pointer,
        },
        constexprs={
            "Q_HEADS": HEADS,
            "KV_HEADS": KV_HEADS,
            "HEAD_DIM": head_dim,
            "HALF": rotary_dim // 2,
            "BLOCK_SIZE": 64,
            "INTERLEAVED": interleaved,
            "UNIT_OFFSET": unit_offset,
            "MANY_TOKENS": False,
            "BLOCK_H": launch.block_h,
            "BLOCK_R": launch.block_r,
            "BLOCK_P": launch.block_p,
            "BLOCK_D": triton.next_power_of_2(head_dim),
        },
        num_warps=launch.num_warps,
        targets=(target,),
        options={"enable_fp_fusion": False},
    )


VARIANTS = [
    _rope("sm_90", "bf16", (128, 128), "bf16", interleaved=False, few_tokens=False),
    _rope("sm_80", "fp32", (80, 32), "fp32", interleaved=False, few_tokens=True),
    _rope("sm_100", "fp16", (256, 256), "fp16", interleaved=True, few_tokens=False),
    _rope_write_kv("sm_90", "bf16", (128, 128), "bf16", norm=True, few_tokens=True),
    _rope_write_kv(
        *("sm_80", "fp16", (128, 64), "fp32"),
        **{"norm": True, "few_tokens": False, "interleaved": True, "unit_offset": True},
    ),
    _rope_write_kv("sm_100", "fp32", (128, 0), None, norm=True, few_tokens=False),
    _rope_write_kv("gfx942", "bf16", (128, 128), "bf16", norm=False, few_tokens=False),
]
