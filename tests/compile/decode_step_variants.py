"""The compile gate's variants of decode_step: integers only, so one of each kernel."""

from __future__ import annotations

from variant import Variant

from llmfast_kernels.decode_step.kernel import BLOCK

VARIANTS = [
    Variant(
        name="decode_step/begin block=64",
        kernel="llmfast_kernels.decode_step.kernel:_begin_step_kernel",
        signature={
            "context_ptr": "*i32:16",
            "first_row_ptr": "*i64:16",
            "block_table_ptr": "*i32:16",
            "positions_ptr": "*i64:16",
            "slots_ptr": "*i64:16",
            "context_len_ptr": "*i32:16",
            "n_rows": "i32",
            "stride_table": "i32",
        },
        constexprs={"BLOCK_SIZE": 64, "BLOCK": BLOCK},
        num_warps=4,
        targets=("sm_90",),
    ),
    Variant(
        name="decode_step/end seen",
        kernel="llmfast_kernels.decode_step.kernel:_end_step_kernel",
        signature={
            "sampled_ptr": "*i64:16",
            "status_ptr": "*i32:16",
            "context_len_ptr": "*i32:16",
            "stop_tokens_ptr": "*i64:16",
            "pad_ptr": "*i64:16",
            "tokens_ptr": "*i64:16",
            "host_tokens_ptr": "*i64:16",
            "context_ptr": "*i32:16",
            "generated_ptr": "*i32:16",
            "seen_ptr": "*u8:16",
            "n_rows": "i32",
            "stride_seen": "i32:16",
        },
        constexprs={"N_STOPS": 16, "BLOCK": BLOCK, "BLOCK_STOPS": 16},
        num_warps=4,
        targets=("sm_80", "gfx942"),
    ),
]
