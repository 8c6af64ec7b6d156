"""Patched model.generate against transformers' own, and the time patch(model) takes: an 8B shape.

The weights are random, made on the GPU, so nothing is downloaded. As a script it is the child
process that times one patch: `python bench/bench_model.py patch-seconds` prints JSON.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from llmfast.measure.record import make_row
from llmfast.measure.results import format_case
from llmfast.measure.stats import Estimate, median_estimate

SHAPE = "llama-3.1-8b"
BATCHES = (1, 32)
PROMPT, NEW = 512, 16
ROUNDS = 3  # in each of the three processes that a published figure comes from


def make_model() -> Any:
    """A causal language model of the Llama-3.1-8B shape in bfloat16, on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=None,  # random weights must not end an answer early
        pad_token_id=0,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def seconds_of_generate(model: Any, prompt: torch.Tensor) -> float:
    """Time one greedy answer of NEW tokens, prompt included."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        do_sample=False,
    )
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    if out.shape != (len(prompt), PROMPT + NEW):
        raise RuntimeError(f"generate: wanted {NEW} new tokens, got shape {tuple(out.shape)}")
    return seconds


def bench_generate(recorder):
    """One model, patched and unpatched in turn in every round; whoever comes first changes too."""
    from llmfast import patch, unpatch

    model = make_model()
    vocab, device = model.config.vocab_size, model.device
    prompts = {b: torch.randint(1, vocab, (b, PROMPT), device=device) for b in BATCHES}
    times: dict[tuple[str, int], list[float]] = {
        (impl, batch): [] for impl in ("llmfast", "transformers") for batch in BATCHES
    }

    def measure(impl: str, keep: bool) -> None:
        if impl == "llmfast":
            report = patch(model)
            if not report.swapped:
                raise RuntimeError(f"patch swapped nothing:\n{report}")
        for batch, prompt in prompts.items():
            seconds = seconds_of_generate(model, prompt)
            if keep:
                times[impl, batch].append(seconds)
        if impl == "llmfast":
            unpatch(model)

    for index in range(-1, ROUNDS):  # round -1 warms up
        order = ("llmfast", "transformers")
        for impl in order if index % 2 else order[::-1]:
            measure(impl, keep=index >= 0)

    for batch in BATCHES:
        case = format_case(
            {"shape": SHAPE, "weights": "bf16", "batch": batch, "prompt": PROMPT, "new": NEW}
        )
        for impl in ("llmfast", "transformers"):
            rate = median_estimate(times[impl, batch]).map(lambda s, n=batch * NEW: n / s)
            recorder.add("generate", make_row(case, impl, "tok_per_s", rate, ROUNDS))
        pairs = zip(times["llmfast", batch], times["transformers", batch], strict=True)
        ratio = median_estimate([ours / theirs for ours, theirs in pairs])
        recorder.add("generate", make_row(case, "llmfast", "time_ratio", ratio, ROUNDS))


def bench_patch(recorder, tmp_path):
    """The time of patch(model), in a process of its own: first with no compiled kernel, then all.

    Only Triton's cache is emptied; the files of torch and CUDA may be in the system's memory.
    """
    torch.cuda.empty_cache()  # the child's model needs the room
    for start in ("cold", "warm"):
        seconds = _child_seconds(tmp_path / "triton")
        case = format_case({"shape": SHAPE, "start": start})
        row = make_row(case, "llmfast", "s", Estimate(seconds, seconds, seconds), 1)
        recorder.add("patch", row)


def _child_seconds(triton_cache: Path) -> float:
    done = subprocess.run(
        [sys.executable, __file__, "patch-seconds"],
        env=os.environ | {"TRITON_CACHE_DIR": str(triton_cache)},  # Triton's own way to be told
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the process that times patch failed:\n{done.stderr[-2000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    if not figures["swapped"]:
        raise RuntimeError("patch swapped nothing in the process that times it")
    return float(figures["seconds"])


def patch_seconds() -> dict[str, float]:
    """Make the model and time one patch of it, with what it imports and compiles."""
    from llmfast import patch

    model = make_model()
    torch.cuda.synchronize()
    started = time.perf_counter()
    report = patch(model)
    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - started, "swapped": report.swapped}


if __name__ == "__main__":
    if sys.argv[1:] != ["patch-seconds"]:
        raise SystemExit("usage: python bench/bench_model.py patch-seconds  (or: pytest bench)")
    print(json.dumps(patch_seconds()))
