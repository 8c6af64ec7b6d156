"""The suites and metrics that a results file may hold, and the unit of each metric."""

from __future__ import annotations

from dataclasses import dataclass

UNITS = {
    "us": "us",
    "us_per_block": "us",
    "ms": "ms",
    "ms_per_step": "ms",
    "ttft_ms": "ms",
    "ttft_mean_ms": "ms",
    "host_ms_per_step": "ms",
    "gpu_ms_per_step": "ms",
    **{f"{time}_p{share}_ms": "ms" for time in ("ttft", "itl", "e2e") for share in (50, 90, 99)},
    "s": "s",
    "start_to_first_token_s": "s",
    "gb_per_s": "GB/s",
    "tflops": "TFLOP/s",
    "tok_per_s": "tok/s",
    "out_tok_per_s": "tok/s",
    "total_tok_per_s": "tok/s",
    "req_per_s": "req/s",
    "peak_over_weights_cache_gib": "GiB",
    "peak_over_weights_gib": "GiB",
    "roofline_share": "1",
    "gpu_busy_share": "1",
    "perplexity": "1",
    "perplexity_ratio": "1",
    "kl_to_dense": "nat",
    "top1_agreement": "1",
}


@dataclass(frozen=True)
class Suite:
    """A suite of figures: its subject, its metrics and the command that writes its file."""

    about: str
    metrics: tuple[str, ...]
    command: str | None = None  # None: no command writes it yet


_OPS = ("us", "gb_per_s")
_SERVE = (
    *(f"{time}_p{share}_ms" for time in ("ttft", "itl", "e2e") for share in (50, 90, 99)),
    "ttft_mean_ms",
    "req_per_s",
    "out_tok_per_s",
)
_DECODE = (
    "tok_per_s",
    "ms_per_step",
    "roofline_share",
    "peak_over_weights_cache_gib",
    "ttft_ms",
    "start_to_first_token_s",
)

SUITES: dict[str, Suite] = {
    "ceilings": Suite("limits of the GPU", ("gb_per_s", "tflops"), "pytest bench"),
    "norm": Suite("normalisation", _OPS, "pytest bench/bench_norm.py"),
    "activation": Suite("gated activations", _OPS, "pytest bench/bench_activation.py"),
    "rope": Suite("rotary position embedding", _OPS, "pytest bench/bench_rope.py"),
    "kv_cache": Suite("writes to the cache", _OPS, "pytest bench/bench_kv_cache.py"),
    "linear": Suite(
        "the four linear layers of a decoder block",
        ("us_per_block", "gb_per_s"),
        "pytest bench/bench_linear.py bench/bench_quantized_linear.py",
    ),
    "attention_decode": Suite(
        "attention of one new token over a long context", _OPS, "pytest bench/bench_attention.py"
    ),
    "prefill": Suite(
        "attention of a whole prompt, causal", ("tflops",), "pytest bench/bench_attention.py"
    ),
    "decode_step": Suite(
        "begin_step and end_step, around the model", ("us",), "pytest bench/bench_decode_step.py"
    ),
    "sampling": Suite("sampling of the next token", ("us",), "pytest bench/bench_sampling.py"),
    "patch": Suite("the time patch(model) takes", ("s",), "pytest bench/bench_patch.py"),
    "quantize": Suite(
        "the time quantizing takes",
        ("s", "peak_over_weights_gib"),
        "pytest bench/bench_quantize.py",
    ),
    "decode": Suite("token by token generation", _DECODE, "llmfast bench decode"),
    "model_prefill": Suite("a whole model over a prompt", ("ms", "tok_per_s")),
    "throughput": Suite(
        "offline throughput of many requests",
        (
            "out_tok_per_s",
            "total_tok_per_s",
            "s",
            "gpu_busy_share",
            "host_ms_per_step",
            "gpu_ms_per_step",
        ),
        "llmfast bench throughput",
    ),
    "latency": Suite("latency of a whole batch", ("s",), "llmfast bench latency"),
    "serve": Suite("requests that arrive over time", _SERVE, "llmfast bench serve"),
    "quality": Suite(
        "quality of quantized and patched models",
        ("perplexity", "perplexity_ratio", "kl_to_dense", "top1_agreement"),
        "llmfast eval",
    ),
}
