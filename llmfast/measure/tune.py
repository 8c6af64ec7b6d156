"""Measure which launch of a linear layer is the fastest on this GPU: the tables of ``linear``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from .shapes import linear_sizes
from .timing import Timing, time_in_graph

if TYPE_CHECKING:
    from llmfast_kernels.linear.launch import Key, Launch

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
MARGIN = 0.99  # ours is taken where it needs at most this part of cuBLAS's time
SECONDS = 0.05  # of one candidate
TOGETHER = 12  # candidates that are timed side by side

Progress = Callable[[str, int, int], None]  # what is done now, layers done, layers in all
Layer = tuple[str, int, int]  # an operation, features of its result, in_features


def layers_of(config: Any) -> list[Layer]:
    """The linear layers that decoding a model runs, and gate and up with their activation."""
    sizes = linear_sizes(config)
    found = [("dense_linear", *size) for size in (*sizes.block, sizes.head)]
    found.append(("gated_linear", sizes.gate_up[0] // 2, sizes.gate_up[1]))
    return list(dict.fromkeys(found))


def candidates(operation: str, k: int, tokens: int, shared_memory: int) -> Iterator[Launch]:
    """Launches that are worth timing. Pure: it asks no device."""
    from llmfast_kernels.linear.launch import Launch, block_m

    gated = operation == "gated_linear"
    widest = 1 << (k - 1).bit_length()
    yield Launch("cublas")
    if tokens == 1:
        tiles = product((1, 2, 4, 8, 16), (512, 1024, 2048, 4096), (4, 8))
        for block_n, block_k, num_warps in tiles:
            of_a_lane = block_n * block_k // (32 * num_warps) * (2 if gated else 1)
            if block_k > widest or not 8 <= of_a_lane <= 64:
                continue
            for num_stages in (1, 3, 5):
                launch = Launch("gemv", block_n, block_k, num_warps, num_stages)
                if launch.fits(tokens, gated, shared_memory):
                    yield launch
    for block_n, block_k, num_warps in product((16, 32, 64, 128), (64, 128, 256, 512), (4, 8)):
        sums = block_n * block_m(tokens) // (32 * num_warps) * (2 if gated else 1)
        if block_k > widest or sums > 128 or block_n * num_warps > 1024:
            continue
        fitting = [
            launch
            for num_stages in (3, 4, 5, 6, 8)
            if (launch := Launch("tiles", block_n, block_k, num_warps, num_stages)).fits(
                tokens, gated, shared_memory
            )
        ]
        yield from fitting[-2:]  # the more bytes on their way, the better, as long as they fit


def tune(
    layers: Iterable[Layer],
    tokens: Iterable[int] = TOKENS,
    *,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = lambda what, done, total: None,
) -> dict[Key, Launch]:
    """Time every candidate for every layer and number of tokens; the fastest of each.

    Candidates and cuBLAS are timed side by side in CUDA graphs, over rotated weights.

    Raises:
        UserError: there is no CUDA device.
    """
    from llmfast_kernels.linear.kernel import shared_memory_of

    todo = list(product(layers, tokens))
    found: dict[Key, Launch] = {}
    for done, ((operation, n, k), count) in enumerate(todo):
        progress(f"{operation} {k} to {n}, {count} tokens", done, len(todo))
        shared_memory = shared_memory_of(torch.cuda.current_device())
        launches = list(candidates(operation, k, count, shared_memory))
        found[operation, n, k, count] = _fastest(operation, n, k, count, launches, dtype)
    return found


def _fastest(
    operation: str, n: int, k: int, tokens: int, launches: list[Launch], dtype: torch.dtype
) -> Launch:
    from llmfast_kernels.linear.kernel import launch_dense_linear, launch_gated_linear

    run = launch_dense_linear if operation == "dense_linear" else launch_gated_linear
    rows = n if operation == "dense_linear" else 2 * n

    def make_inputs() -> tuple[torch.Tensor, ...]:
        x = torch.randn(tokens, k, device="cuda", dtype=dtype)
        return x, torch.randn(rows, k, device="cuda", dtype=dtype) / k**0.5

    cublas, ours = launches[0], launches[1:]
    best, share = cublas, MARGIN
    for start in range(0, len(ours), TOGETHER):
        some = {str(i): ours[i] for i in range(start, min(start + TOGETHER, len(ours)))}
        impls = {name: partial(run, _launch=launch) for name, launch in some.items()}
        impls["cublas"] = partial(run, _launch=cublas)
        times = time_in_graph(impls, make_inputs, seconds=SECONDS * len(impls))
        peer = times.pop("cublas")
        if not isinstance(peer, Timing):
            raise RuntimeError(f"tune: cuBLAS could not be timed: {peer.reason}")
        for name, timing in times.items():  # a candidate may fail: too many registers, say
            if isinstance(timing, Timing) and timing.us.value / peer.us.value < share:
                best, share = some[name], timing.us.value / peer.us.value
    return best
