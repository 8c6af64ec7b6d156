"""What the compile gate compiles of rope: pairs, dtypes, tables, launches and targets pairwise."""

from __future__ import annotations

from variant import Variant

from llmfast_kernels.rope.kernel import choose_launch

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
    signature = dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), f"*{dtype}:16")
    signature |= dict.fromkeys(("cos_ptr", "sin_ptr"), f"*{tables}:16")
    signature |= {"positions_ptr": "*i32:16" if few_tokens else "*i64:16"}
    strides = ("stride_q_token", "stride_q_head", "stride_k_token", "stride_k_head")
    signature |= dict.fromkeys(strides, "i32:16")
    return Variant(
        name=f"rope/{'interleaved' if interleaved else 'halves'} {dtype} {head_dim}/{rotary_dim} "
        f"tables {tables}{' few tokens' if few_tokens else ''}",
        kernel="llmfast_kernels.rope.kernel:_rope_kernel",
        signature=signature,
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


VARIANTS = [
    _rope("sm_90", "bf16", (128, 128), "bf16", interleaved=False, few_tokens=False),
    _rope("sm_80", "fp16", (80, 32), "fp16", interleaved=False, few_tokens=True),
    _rope("sm_100", "fp32", (128, 128), "fp32", interleaved=False, few_tokens=True),
    _rope("sm_90", "bf16", (128, 64), "fp32", interleaved=True, few_tokens=True),
    _rope("sm_100", "fp16", (256, 256), "fp16", interleaved=True, few_tokens=False),
    _rope("gfx942", "bf16", (128, 128), "fp32", interleaved=True, few_tokens=False),
]
