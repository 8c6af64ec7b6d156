"""What the compile gate compiles: every kernel, its dtypes and launches chosen pairwise.

Run through every pair of (dtype, width, operation, target), not every combination. A family with
many kernels keeps its list ``VARIANTS`` beside this file, in ``<family>_variants.py``.
"""

from __future__ import annotations

import importlib
from itertools import chain
from pathlib import Path

from variant import Variant

from llmfast_kernels.activation.kernel import choose_launch as choose_activation
from llmfast_kernels.norm.kernel import choose_launch as choose_norm

MAX_COMPILATIONS = 70  # of all families: the gate stays near a minute


def _norm(
    op: str, dtype: str, n_cols: int, target: str, *, few_rows: bool, unit_offset: bool
) -> Variant:
    launch = choose_norm(n_cols, few_rows)
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


def _activation(act: str, dtype: str, n_cols: int, target: str, *, merged: bool) -> Variant:
    launch = choose_activation(n_cols)
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
        name=f"activation/{act} {dtype} {n_cols} {'merged' if merged else 'apart'}",
        kernel="llmfast_kernels.activation.kernel:_act_mul_kernel",
        signature=signature,
        constexprs=constexprs,
        num_warps=launch.num_warps,
        targets=(target,),
    )


NORM = [
    _norm("add_rms_norm", "bf16", 4096, "sm_90", few_rows=False, unit_offset=False),
    _norm("add_rms_norm", "bf16", 4096, "sm_100", few_rows=True, unit_offset=True),
    _norm("rms_norm", "fp16", 4096, "sm_80", few_rows=True, unit_offset=False),
    _norm("add_rms_norm", "fp32", 32768, "sm_80", few_rows=False, unit_offset=False),
    _norm("add_rms_norm", "bf16", 4096, "gfx942", few_rows=False, unit_offset=False),
]
ACTIVATION = [
    _activation("silu", "bf16", 14336, "sm_90", merged=True),
    _activation("gelu_tanh", "bf16", 14336, "sm_100", merged=False),
    _activation("gelu", "fp16", 14336, "sm_80", merged=False),
    _activation("gelu_tanh", "fp16", 14336, "gfx942", merged=True),
]


def all_variants() -> list[Variant]:
    others = sorted(path.stem for path in Path(__file__).parent.glob("*_variants.py"))
    lists = (importlib.import_module(name).VARIANTS for name in others)
    return [*NORM, *ACTIVATION, *chain.from_iterable(lists)]
