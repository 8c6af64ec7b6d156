"""How eight-bit weights lie in memory.

Of each 16 columns of a row, the codes of columns ``2 * c``, ``2 * c + 1``, ``2 * c + 8`` and
``2 * c + 9`` are the bytes of word ``c``: what a lane of the tensor cores multiplies lies in one
word. Rows are filled up to whole sixteens.
"""

from __future__ import annotations

import torch

UNIT = 16  # columns whose codes are reordered
# the column of each place
ORDER = tuple(2 * (place // 4) + place % 2 + 8 * (place % 4 // 2) for place in range(UNIT))


def pack_int8(codes: torch.Tensor) -> torch.Tensor:
    """Pack eight-bit codes.

    Args:
        codes: uint8 ``(n, k)``.

    Returns:
        uint8 ``(n, ceil(k / UNIT) * UNIT)``, contiguous; codes past column k are 0.

    Raises:
        TypeError: codes are not uint8.
        ValueError: not two dimensions.
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"pack_int8: codes must be torch.uint8, got {codes.dtype}")
    if codes.ndim != 2:
        raise ValueError(f"pack_int8: codes must be (n, k), got shape {tuple(codes.shape)}")
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % UNIT))
    order = torch.tensor(ORDER, device=codes.device)
    return padded.view(len(codes), -1, UNIT)[:, :, order].reshape(len(codes), -1)


def unpack_int8(packed: torch.Tensor, k: int) -> torch.Tensor:
    """The codes, uint8 ``(n, k)``, that :func:`pack_int8` packed."""
    places = torch.tensor(ORDER, device=packed.device).argsort()
    return packed.view(len(packed), -1, UNIT)[:, :, places].flatten(1)[:, :k].contiguous()
