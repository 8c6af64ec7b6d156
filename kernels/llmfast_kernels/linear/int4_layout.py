"""How four-bit weights lie in memory, and what they stand for.

A word of 32 bits holds eight codes of one row, whose columns are CHUNK apart at most. Of the codes
of a chunk of 128 columns, column ``32 * p + 2 * c + h`` is in word ``c``, in the four bits from
``16 * h + 4 * p`` on: so one shift and one mask give two neighbours in the two halves of a word,
as tensor cores take a pair of 16-bit numbers.
"""

from __future__ import annotations

import torch

CHUNK = 128  # columns whose codes lie in the same words
_PAIRS, _WORDS = 4, 16  # of a chunk: pairs in a word, words in a row
MIDDLE = 8  # the code that stands for 0 where there are no zero points


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Pack four-bit codes.

    Args:
        codes: uint8 ``(n, k)``, each below 16.

    Returns:
        int32 ``(n, ceil(k / CHUNK) * CHUNK / 8)``, contiguous; codes past column k are 0.

    Raises:
        TypeError: codes are not uint8.
        ValueError: not two dimensions, or a code of 16 or more.
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"pack_int4: codes must be torch.uint8, got {codes.dtype}")
    if codes.ndim != 2 or (codes.numel() and int(codes.max()) > 15):
        raise ValueError(
            f"pack_int4: codes must be (n, k), each below 16; got shape {tuple(codes.shape)}"
            + (f" with a {int(codes.max())}" if codes.numel() else "")
        )
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -k % CHUNK))
    columns = padded.view(n, -1, _PAIRS, _WORDS, 2).long()  # chunk, pair, word, half
    pairs = torch.arange(_PAIRS, device=codes.device)[:, None, None]
    halves = torch.arange(2, device=codes.device)
    words = (columns << (4 * pairs + 16 * halves)).sum((2, 4))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).reshape(n, -1)


def unpack_int4(packed: torch.Tensor, k: int) -> torch.Tensor:
    """The codes, uint8 ``(n, k)``, that :func:`pack_int4` packed."""
    words = packed.view(len(packed), -1, 1, _WORDS, 1)
    pairs = torch.arange(_PAIRS, device=packed.device)[:, None, None]
    halves = torch.arange(2, device=packed.device)
    columns = (words >> (4 * pairs + 16 * halves)) & 15
    return columns.to(torch.uint8).reshape(len(packed), -1)[:, :k].contiguous()


def dequantize_int4(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    k: int,
    group_size: int,
    dtype: torch.dtype,
    minima: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weights ``(n, k)``, computed in ``dtype``: ``scale * (code - zero)``, or
    ``scale * code + minimum``."""
    codes = unpack_int4(packed, k).to(dtype)
    group = torch.arange(k, device=packed.device) // group_size
    if minima is not None:
        return scales.to(dtype)[:, group] * codes + minima.to(dtype)[:, group]
    middle = MIDDLE if zeros is None else zeros.to(dtype)[:, group]
    return scales.to(dtype)[:, group] * (codes - middle)
