"""The compile gate's variants of linear: both tiers, dense and gated, as the heuristic says."""

from __future__ import annotations

from variant import Variant, device

from llmfast_kernels.linear.launch import block_m, choose_launch, prefetch_cols


def _linear(
    dtype: str, tokens: int, n: int, k: int, target: str, *, act: str | None, bias: bool
) -> Variant:
    everywhere = target == "sm_80"
    gpu = device(target, everywhere=everywhere)
    operation = "dense_linear" if act is None else "gated_linear"
    launch = choose_launch(operation, n, k, tokens, gpu)
    pointer = f"*{dtype}:16"
    signature = dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr"), pointer) | {"n": "i32"}
    signature["k"] = "i32" if k % 16 else "i32:16"
    constexprs: dict[str, object] = {
        "ACT": act,
        "EVEN_K": k % launch.block_k == 0,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launch.block_k,
    }
    present = {"bias_ptr": bias, "residual_ptr": act is None}
    signature |= {name: pointer for name, there in present.items() if there}
    constexprs |= {name: None for name, there in present.items() if not there}
    if launch.tier == "tiles":
        signature["n_tokens"] = "i32"
        constexprs |= {"BLOCK_M": block_m(tokens), "PREFETCH": prefetch_cols(tokens, gpu)}
    return Variant(
        name=f"linear/{launch.tier} {act or 'dense'} {dtype} {tokens}x{k}x{n}",
        kernel=f"llmfast_kernels.linear.kernel:_{launch.tier}_kernel",
        signature=signature,
        constexprs=constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        targets=(target,),
        everywhere=everywhere,
    )


VARIANTS = [
    _linear("bf16", 1, 6144, 4096, "sm_90", act=None, bias=True),
    _linear("fp16", 1, 1536, 576, "sm_80", act="silu", bias=False),
    _linear("bf16", 16, 4096, 14336, "sm_90", act=None, bias=False),
    _linear("fp16", 8, 14336, 4096, "sm_100", act="gelu_tanh", bias=True),
    _linear("bf16", 16, 4096, 14336, "gfx942", act=None, bias=True),
]
