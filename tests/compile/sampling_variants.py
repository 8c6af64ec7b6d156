"""What the compile gate compiles of sampling: everything asked for at once."""

from __future__ import annotations

from variant import Variant

from llmfast_kernels.sampling.kernel import choose_launch

N_VOCAB = 128256
STRIDES = ("stride_logits", "stride_seen", "stride_counts", "stride_bias")
PER_ROW = (
    "temperature_ptr",
    "top_p_ptr",
    "min_p_ptr",
    "repetition_ptr",
    "presence_ptr",
    "frequency_ptr",
)


def _sample(target: str, dtype: str) -> Variant:
    launch = choose_launch(N_VOCAB)
    return Variant(
        name=f"sampling/sample {dtype} {N_VOCAB}",
        kernel="llmfast_kernels.sampling.kernel:_sample_kernel",
        signature={
            "logits_ptr": f"*{dtype}:16",
            **dict.fromkeys((*PER_ROW, "bias_ptr", "z_ptr"), "*fp32:16"),
            **dict.fromkeys(("top_k_ptr", "counts_ptr", "status_ptr"), "*i32:16"),
            **dict.fromkeys(("seeds_ptr", "positions_ptr", "tokens_ptr"), "*i64:16"),
            "seen_ptr": "*u8:16",
            "n_vocab": "i32",
            **dict.fromkeys(STRIDES, "i32:16"),
        },
        constexprs={"BLOCK_V": launch.block_v},
        num_warps=launch.num_warps,
        targets=(target,),
        options={"enable_fp_fusion": False},
    )


def _logprobs(target: str, dtype: str) -> Variant:
    launch = choose_launch(N_VOCAB)
    return Variant(
        name=f"sampling/logprobs {dtype} {N_VOCAB}",
        kernel="llmfast_kernels.sampling.kernel:_logprobs_kernel",
        signature={
            "logits_ptr": f"*{dtype}:16",
            **dict.fromkeys(("tokens_ptr", "top_tokens_ptr"), "*i64:16"),
            "status_ptr": "*i32:16",
            **dict.fromkeys(("logprobs_ptr", "top_logprobs_ptr"), "*fp32:16"),
            **dict.fromkeys(("n_vocab", "n_top"), "i32"),
            "stride_logits": "i32:16",
        },
        constexprs={"BLOCK_V": launch.block_v},
        num_warps=launch.num_warps,
        targets=(target,),
    )


VARIANTS = [_sample("sm_80", "bf16"), _logprobs("sm_90", "fp32")]
