"""The compile gate's variants of norm: operations, dtypes, widths and targets pairwise."""

from __future__ import annotations

from variant import Variant

from llmfast_kernels.norm.kernel import choose_launch


def _norm(
    op: str, dtype: str, n_cols: int, target: str, *, few_rows: bool, unit_offset: bool
) -> Variant:
    launch = choose_launch(n_cols, few_rows)
    pointer = f"*{dtype}:16"
    add = op == "add_rms_norm"
    signature = {
        "x_ptr": pointer,
        "weight_ptr": pointer,
        "y_ptr": pointer,
        "n_rows": "i32",
        "stride_x_row": "i32" if n_cols % 16 else "i32:16",
        "eps": "fp32",
    }
    constexprs: dict[str, object] = {
        "HAS_RESIDUAL": add,
        "UNIT_OFFSET": unit_offset,
        "N_COLS": n_cols,
        "ROWS": launch.rows,
        "BLOCK_N": launch.block_n,
    }
    if add:
        signature |= {"residual_ptr": pointer, "sum_ptr": pointer}
    else:
        constexprs |= {"residual_ptr": None, "sum_ptr": None}
    return Variant(
        name=f"norm/{op}{' gemma' if unit_offset else ''} {dtype} {n_cols}"
        f"{' few rows' if few_rows else ''}",
        kernel="llmfast_kernels.norm.kernel:_rms_norm_kernel",
        signature=signature,
        constexprs=constexprs,
        num_warps=launch.num_warps,
        targets=(target,),
    )


VARIANTS = [
    _norm("add_rms_norm", "bf16", 4096, "sm_90", few_rows=False, unit_offset=False),
    _norm("add_rms_norm", "bf16", 4096, "sm_100", few_rows=True, unit_offset=True),
    _norm("rms_norm", "fp16", 4096, "sm_80", few_rows=True, unit_offset=False),
    _norm("add_rms_norm", "fp32", 32768, "sm_80", few_rows=False, unit_offset=False),
    _norm("add_rms_norm", "bf16", 4096, "gfx942", few_rows=False, unit_offset=False),
]
