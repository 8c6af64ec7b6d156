"""Which quantized layers Hopper's own kernels take, and how. The numbers were found on an H100."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ..common.launch import aligned
from .int4_layout import CHUNK
from .kernel import is_hopper
from .workspace import MAX_TICKETS

ROWS = 64  # of the weight, that a warpgroup multiplies at once; a stream's unit
# by bits and tokens of a program: stages, programs on a multiprocessor. With more stages those that
# are filled before the tokens come delay the tokens
STREAM = {
    4: {8: (3, 2), 16: (3, 2), 32: (3, 2), 64: (4, 1)},
    8: {8: (3, 2), 16: (3, 2), 32: (3, 2), 64: (3, 1)},
}
_STREAM_FROM = {4: 1, 8: 2}  # tokens; of one the product with a vector is the faster
# by bits and tokens of a tile: stages that shared memory holds
TILE_STAGES = {4: {128: 5, 256: 3}, 8: {128: 4, 256: 2}}
_TILE_US = {128: 28.5, 256: 46.0}  # of 4,096 columns, by tokens
_SPLIT_US = 3.0  # for each program of a tile: to leave its sums, and that they are added up
_SPLIT_TOKENS = 128  # of a tile; sums of more take longer than is won
_MIN_CHUNKS = 3  # of columns, for a split
_MULTIPROCESSORS = 132
_TILES_FROM = 65  # tokens
_WORKSPACE_FROM = 257  # tokens: cuBLAS, with the weights in a workspace


@dataclass(frozen=True)
class HopperLaunch:
    """``stream`` for few tokens, or ``tiles``."""

    tier: str
    tokens: int  # of a program, or of a tile
    splits: int = 1  # programs that share a tile's columns


@cache
def choose_hopper_launch(
    n: int, k: int, tokens: int, bits: int, *, streams: bool, tiles: bool, gated: bool = False
) -> HopperLaunch | None:
    """Pick the launch for ``tokens`` tokens of ``k`` features to ``n``, or None: others are faster.

    Pure: it asks no device.

    Args:
        bits: 4 or 8.
        streams, tiles: whether either takes these tensors.
        gated: with an activation; then columns are not split.
    """
    if streams and _STREAM_FROM[bits] <= tokens <= max(STREAM[bits]):
        width = next(width for width in STREAM[bits] if tokens <= width)
        if -(-n // ROWS) <= MAX_TICKETS:
            return HopperLaunch("stream", width)
    if not tiles or tokens < _TILES_FROM or k < CHUNK * max(TILE_STAGES[bits].values()):
        return None
    found = []
    for width, tile_us in _TILE_US.items():
        number = -(-n // (2 * ROWS)) * -(-tokens // width)
        us = -(-number // _MULTIPROCESSORS) * tile_us * k / 4096
        found.append((us, width, 1))
        most = min(_MULTIPROCESSORS // number, k // (CHUNK * _MIN_CHUNKS))
        if width == _SPLIT_TOKENS and not gated:
            found += [(us / s + _SPLIT_US * s, width, s) for s in range(2, most + 1)]
    us, width, splits = min(found)
    if tokens >= _WORKSPACE_FROM and us >= _workspace_us(n, k, tokens, bits):
        return None
    return HopperLaunch("tiles", width, splits)


def _workspace_us(n: int, k: int, tokens: int, bits: int) -> float:
    """Weights read in ``bits`` and written in 16 at 3 TB/s, then products at 700 TFLOP/s."""
    return n * k * (bits / 8 + 2) / 3e6 + 2 * n * k * tokens / 700e6 + 5


def run_on_hopper(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    minima: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    activation: str | None = None,
    launch: HopperLaunch | None = None,
) -> torch.Tensor | None:
    """The layer's outputs, or None where another kernel is to be taken."""
    *leading, k = x.shape
    n, n_tokens = len(packed), x.numel() // k
    group = group_size if scales.shape[1] > 1 else 0
    if launch is None:
        # TMA reads and writes at multiples of 16 bytes
        if not x.is_cuda or not is_hopper(x.get_device()):
            return None
        if n_tokens == 0 or k % 8 or not aligned(x, packed):
            return None
        whole = n % 16 == 0 and (residual is None or aligned(residual))
        same_dtype = scales.dtype == x.dtype and (minima is None or minima.dtype == x.dtype)
        launch = choose_hopper_launch(
            n,
            k,
            n_tokens,
            bits,
            streams=minima is None and group != 32,
            tiles=whole and same_dtype and (bits == 4 or group != 32),
            gated=activation is not None,
        )
        if launch is None:
            return None
    width = n if activation is None else n // 2
    y = torch.empty((*leading, width), dtype=x.dtype, device=x.device)
    if launch.tier == "stream":
        from .stream import launch_stream  # Gluon, for these GPUs alone

        launch_stream(
            x, packed, scales, zeros, bias, residual, y,
            bits=bits, group=group, activation=activation, tokens=launch.tokens,
        )  # fmt: skip
    else:
        from .hopper import launch_hopper

        launch_hopper(
            x, packed, scales, zeros, minima, bias, residual, y,
            bits=bits, group=group, activation=activation, tokens=launch.tokens,
            splits=launch.splits,
        )  # fmt: skip
    return y
