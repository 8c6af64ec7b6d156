"""The compile gate's variants of activation: functions, dtypes, layouts and targets pairwise."""

from __future__ import annotations

from variant import Variant

from llmfast_kernels.activation.kernel import choose_launch


def _activation(act: str, dtype: str, n_cols: int, target: str, *, merged: bool) -> Variant:
    launch = choose_launch(n_cols)
    number = "i32" if n_cols % 16 else "i32:16"
    signature = {
        "gate_ptr": f"*{dtype}:16",
        "y_ptr": f"*{dtype}:16",
        "n_cols": number,
        "stride_gate_row": number,
        "stride_up_row": number,
    }
    constexprs: dict[str, object] = {
        "ACT": act,
        "MERGED": merged,
        "MANY_ROWS": False,
        "BLOCK_N": launch.block_n,
    }
    if merged:
        constexprs["up_ptr"] = None
    else:
        signature["up_ptr"] = f"*{dtype}:16"
    return Variant(
        name=f"activation/{act} {dtype} {n_cols} {'merged' if merged else 'separate'}",
        kernel="llmfast_kernels.activation.kernel:_act_mul_kernel",
        signature=signature,
        constexprs=constexprs,
        num_warps=launch.num_warps,
        targets=(target,),
    )


VARIANTS = [
    _activation("silu", "bf16", 14336, "sm_90", merged=True),
    _activation("gelu_tanh", "bf16", 14336, "sm_100", merged=False),
    _activation("gelu", "fp16", 14336, "sm_80", merged=False),
    _activation("gelu_tanh", "fp16", 14336, "gfx942", merged=True),
]
