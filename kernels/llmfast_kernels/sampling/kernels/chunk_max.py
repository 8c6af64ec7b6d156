"""The first pass, a program per chunk: the largest scores, and sums that bound top-p."""

from __future__ import annotations

import triton
import triton.language as tl

from ...common.pdl import wait_for_inputs
from .filters import load_top_k, load_top_p
from .scores import penalised_logits, scaled_by_temperature
from .sort_keys import NO_COL


@triton.jit
def chunk_max_kernel(
    inputs,  # ScoreInputs
    filters,  # Filters
    written,  # ChunkMaxima
    n_vocab,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    wait_for_inputs()
    pid = tl.program_id(0)
    n_chunks = tl.cdiv(n_vocab, CHUNK)
    row = (pid // n_chunks).to(tl.int64)  # int64: rows times columns may exceed 2**31
    groups = tl.arange(0, GROUPS)
    members = tl.arange(0, CHUNK // GROUPS)
    cols = pid % n_chunks * CHUNK + groups[:, None] * (CHUNK // GROUPS) + members[None, :]
    z = penalised_logits(inputs, row, cols, n_vocab)
    greedy = True
    if inputs.temperature_ptr is not None:
        temperature = tl.load(inputs.temperature_ptr + row)
        greedy = temperature <= 0.0
        if (temperature < float("inf")) == 0:  # -inf divided by it is NaN
            z = tl.where((z == float("-inf")) & (cols < n_vocab), float("inf"), z)
    maxima = tl.max(z, 1)  # division keeps the order, so only the maxima need it
    largest = tl.max(maxima, 0)
    scaled = scaled_by_temperature(maxima, inputs.temperature_ptr, row)
    tl.store(written.maxima_ptr + pid.to(tl.int64) * GROUPS + groups, scaled)
    if greedy:
        tl.store(written.first_ptr + pid, tl.min(tl.where(z == largest, cols, NO_COL)))
    k = 0
    if filters.top_k_ptr is not None:
        k = load_top_k(filters.top_k_ptr, row, n_vocab)
    if filters.top_p_ptr is not None:
        if (load_top_p(filters.top_p_ptr, row) < 1.0) & (k == 0):
            largest = tl.where(largest == float("-inf"), 0.0, largest)
            root = tl.exp((z - largest) * (0.5 / temperature))
            tl.store(written.sums_ptr + 2 * pid, tl.sum(root))
            tl.store(written.sums_ptr + 2 * pid + 1, tl.sum(root * root))
