"""The compile gate's variants of kv_cache: dtypes, head sizes, block sizes and targets."""

from __future__ import annotations

from variant import Variant

from llmfast_kernels.kv_cache.kernel import Cache, TokenHeads, choose_launch

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


def _write_kv(dtype: str, n_heads: int, head_dim: int, block_size: int, target: str) -> Variant:
    launch = choose_launch(head_dim, SIZES[dtype])
    pointer = f"*{dtype}:16"
    heads = TokenHeads(pointer, "i32:16", "i32:16")
    return Variant(
        name=f"kv_cache/write_kv {dtype} {n_heads}x{head_dim} block={block_size}",
        kernel="llmfast_kernels.kv_cache.kernel:_write_kv_kernel",
        signature={
            "k": heads,
            "v": heads,
            "cache": Cache(pointer, pointer, "i32:16", "i32:16", "i32:16"),
            "slots_ptr": "*i64:16",
            "n_tokens": "i32",
        },
        constexprs={
            "N_HEADS": n_heads,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": block_size,
            "ROWS": launch.rows,
            "BLOCK_D": launch.block_d,
        },
        num_warps=launch.num_warps,
        targets=(target,),
    )


VARIANTS = [
    _write_kv("bf16", 8, 128, 64, "sm_90"),
    _write_kv("fp16", 3, 80, 16, "sm_80"),
    _write_kv("fp32", 2, 256, 256, "sm_100"),
    _write_kv("bf16", 2, 64, 32, "gfx942"),
]
