"""Measure which launch of a 16-bit linear layer is the fastest on this GPU."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from .figures import Progress, no_progress
from .shapes import linear_sizes
from .timing import Timing, time_in_graph

if TYPE_CHECKING:
    from llmfast_kernels.linear.launch import Key, Launch

TOKENS = (1, 16, 32, 64, 128)
MARGIN = 0.99  # ours is chosen where it takes at most this share of the library's time
MAX_WORKERS = 16  # each holds a CUDA context
SECONDS = 0.03  # spent on one candidate
TOGETHER = 12  # candidates that are timed side by side


Layer = tuple[str, int, int]  # an operation, features of its result, in_features


def layers_of(config: Any) -> list[Layer]:
    """Return the linear layers of a decoding model, gate and up also with their activation."""
    sizes = linear_sizes(config)
    found = [("dense_linear", *size) for size in (*sizes.block, sizes.head)]
    found.append(("gated_linear", sizes.gate_up[0] // 2, sizes.gate_up[1]))
    return list(dict.fromkeys(found))


def candidates(operation: str, k: int, tokens: int, shared_memory: int) -> list[Launch]:
    """Return the launches of our kernels that are worth timing. Pure: it asks no device."""
    from llmfast_kernels.linear.launch import Launch, block_m

    factor = 2 if operation == "gated_linear" else 1
    widest = 1 << (k - 1).bit_length()
    found: list[Launch] = []
    if tokens == 1:
        for block_n, block_k, num_warps in product(
            (1, 2, 4, 8), (512, 1024, 2048, 4096), (2, 4, 8)
        ):
            if block_k <= widest and 16 <= factor * block_n * block_k // (32 * num_warps) <= 64:
                found.append(Launch("gemv", block_n, block_k, num_warps))
        return found
    for block_n, block_k in product((16, 32, 64, 128), (64, 128, 256, 512)):
        num_warps = 8 if block_n == 128 else 4
        sums = factor * block_n * block_m(tokens) // (32 * num_warps)
        if block_k > widest or sums > 128 or block_n * block_k < 4096:
            continue
        stage = (factor * block_n + block_m(tokens)) * block_k * 2
        for programs in (1, 2, 3):  # per SM, each with as many stages as fit
            num_stages = min(shared_memory // programs // stage, 8)
            if num_stages > 1:
                found.append(Launch("tiles", block_n, block_k, num_warps, num_stages))
    return list(dict.fromkeys(found))


def tune(
    layers: Iterable[Layer],
    tokens: Iterable[int] = TOKENS,
    *,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = no_progress,
) -> dict[Key, Launch]:
    """Time every candidate for every layer and number of tokens; return the fastest of each.

    Candidates and cuBLAS are timed side by side in CUDA graphs, over rotated weights. A gated layer
    is fused where that beats the dense layer, as it was tuned just before, and the activation.

    Raises:
        UserError: there is no CUDA device.
    """
    from llmfast_kernels.common.device import device_at

    shared_memory = device_at(torch.cuda.current_device()).shared_memory
    todo = {
        (*layer, count): candidates(layer[0], layer[2], count, shared_memory)
        for layer, count in product(sorted(layers), tokens)  # dense layers first
    }
    for done, total in _compile(todo, dtype):
        progress("compiling", done, total)
    found: dict[Key, Launch] = {}
    for done, (key, launches) in enumerate(todo.items()):
        operation, n, k, count = key
        progress(f"{operation} {k} to {n}, {count} tokens", done, len(todo))
        found[key] = _fastest(key, launches, dtype, found.get(("dense_linear", 2 * n, k, count)))
    return found


def _compile(todo: Mapping[Key, list[Launch]], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Compile all candidates, one process per core; yield the number done and the number in all.

    A variant does not depend on the number of rows, so each is launched once, on very few rows.
    """
    from llmfast_kernels.linear.launch import block_m

    jobs = {
        (key[0], block_m(key[3]), key[2] % launch.block_k, launch): (key, launch, dtype)
        for key, launches in todo.items()
        for launch in launches
    }
    workers = min(os.cpu_count() or 1, MAX_WORKERS, len(jobs))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(_compile_one, *job) for job in jobs.values()]
        for done, _ in enumerate(as_completed(running), 1):  # a failure shows when it is timed
            yield done, len(running)


def _compile_one(key: Key, launch: Launch, dtype: torch.dtype) -> None:
    operation, _, k, count = key
    rows = launch.block_n * (2 if operation == "gated_linear" else 1)
    x, weight = (torch.zeros(size, k, device="cuda", dtype=dtype) for size in (count, rows))
    _run_of(operation)(x, weight, launch=launch)


def _run_of(operation: str) -> Callable[..., torch.Tensor]:
    from llmfast_kernels.linear.kernel import launch_dense_linear, launch_gated_linear

    return launch_dense_linear if operation == "dense_linear" else launch_gated_linear


def _fastest(
    key: Key, launches: Sequence[Launch], dtype: torch.dtype, dense: Launch | None
) -> Launch:
    from llmfast_kernels import silu_mul
    from llmfast_kernels.linear.launch import VENDOR

    operation, n, k, tokens = key
    rows = n if operation == "dense_linear" else 2 * n

    def make_inputs() -> tuple[torch.Tensor, ...]:
        x = torch.randn(tokens, k, device="cuda", dtype=dtype)
        return x, torch.randn(rows, k, device="cuda", dtype=dtype) / k**0.5

    library = partial(_run_of("dense_linear"), launch=dense or VENDOR["dense_linear"])
    best, share = VENDOR[operation], MARGIN
    for start in range(0, len(launches), TOGETHER):
        some = {str(i): launch for i, launch in enumerate(launches[start : start + TOGETHER])}
        impls: dict[str, Callable[..., torch.Tensor]] = {
            name: partial(_run_of(operation), launch=launch) for name, launch in some.items()
        }
        if operation == "dense_linear":
            impls["library"] = library
        else:
            impls["library"] = lambda x, weight: silu_mul(library(x, weight))
        times = time_in_graph(impls, make_inputs, seconds=SECONDS * len(impls))
        peer = times.pop("library")
        if not isinstance(peer, Timing):
            raise RuntimeError(f"tune: the library could not be timed: {peer.reason}")
        for name, timing in times.items():  # a candidate may fail: too many registers, say
            if isinstance(timing, Timing) and timing.us.value / peer.us.value < share:
                best, share = some[name], timing.us.value / peer.us.value
    return best
