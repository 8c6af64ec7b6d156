"""Which quantized layers Hopper's own kernels take, and how. The numbers were found on an H100."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ..relaunch import aligned
from .int4_layout import CHUNK
from .kernel import is_hopper
from .workspace import MAX_TICKETS

ROWS = 64  # of the weight, that a warpgroup multiplies: a stream's unit, half of a tile
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
_MULTIPROCESSORS = 132
# from so many tokens on tiles are the faster, if they are as many; up to so many other kernels
# share columns, and beyond there is cuBLAS with the weights in a workspace
_TILES_FROM = {4: 129, 8: 65}
_TILES = {4: 96, 8: 1}
_SHARED_TO = 256


@dataclass(frozen=True)
class HopperLaunch:
    """``stream`` for few tokens, or ``tiles``."""

    tier: str
    tokens: int  # of a program, or of a tile


@cache
def choose_hopper_launch(
    n: int, k: int, tokens: int, bits: int, *, streams: bool, tiles: bool
) -> HopperLaunch | None:
    """Pick the launch for ``tokens`` tokens of ``k`` features to ``n``, or None: others are faster.

    Pure: it asks no device.

    Args:
        bits: 4 or 8.
        streams, tiles: whether either takes these tensors.
    """
    if streams and _STREAM_FROM[bits] <= tokens <= max(STREAM[bits]):
        width = next(width for width in STREAM[bits] if tokens <= width)
        if -(-n // ROWS) <= MAX_TICKETS:
            return HopperLaunch("stream", width)
    if not tiles or tokens < _TILES_FROM[bits] or k < CHUNK * max(TILE_STAGES[bits].values()):
        return None
    found = []
    for width, tile_us in _TILE_US.items():
        number = -(-n // (2 * ROWS)) * -(-tokens // width)
        found.append((-(-number // _MULTIPROCESSORS) * tile_us * k / 4096, width, number))
    us, width, number = min(found)
    if tokens <= _SHARED_TO:
        chosen = number >= _TILES[bits]
    else:
        chosen = us < _workspace_us(n, k, tokens, bits)
    return HopperLaunch("tiles", width) if chosen else None


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
        )  # fmt: skip
    return y
