"""The packed weight formats: how codes lie in memory, and which weights they mean.

Both formats order codes so that the words which a tensor core lane loads hold the codes that it
multiplies.

**Four bits.** A word of 32 bits holds eight codes of one row, from a chunk of 128 columns. Column
``32 * p + 2 * c + h`` of a chunk is in word ``c``, in the four bits from ``16 * h + 4 * p`` on. One
shift and one mask then give two neighbouring columns in the two halves of a word, as tensor cores
take a pair of 16-bit numbers. Rows are padded to whole chunks.

**Eight bits.** In a unit of 16 columns of a row, the codes of columns ``2 * c``, ``2 * c + 1``,
``2 * c + 8`` and ``2 * c + 9`` are the bytes of word ``c``. Rows are padded to whole units.

A weight is ``scale * (code - zero)``, or ``scale * code + minimum``; a group of columns shares its
scale and its zero point or minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

CHUNK = 128  # columns of a row whose four-bit codes share words
_PAIRS, _WORDS = 4, 16  # of a chunk: pairs of codes in a word, words in a row
INT8_UNIT = 16  # columns whose eight-bit codes are reordered among themselves
# the column of each byte of a unit
_INT8_ORDER = tuple(2 * (byte // 4) + byte % 2 + 8 * (byte % 4 // 2) for byte in range(INT8_UNIT))


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
    """Return the codes, uint8 ``(n, k)``, that :func:`pack_int4` packed."""
    words = packed.view(len(packed), -1, 1, _WORDS, 1)
    pairs = torch.arange(_PAIRS, device=packed.device)[:, None, None]
    halves = torch.arange(2, device=packed.device)
    columns = (words >> (4 * pairs + 16 * halves)) & 15
    return columns.to(torch.uint8).reshape(len(packed), -1)[:, :k].contiguous()


def pack_int8(codes: torch.Tensor) -> torch.Tensor:
    """Pack eight-bit codes.

    Args:
        codes: uint8 ``(n, k)``.

    Returns:
        uint8 ``(n, ceil(k / INT8_UNIT) * INT8_UNIT)``, contiguous; codes past column k are 0.

    Raises:
        TypeError: codes are not uint8.
        ValueError: not two dimensions.
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"pack_int8: codes must be torch.uint8, got {codes.dtype}")
    if codes.ndim != 2:
        raise ValueError(f"pack_int8: codes must be (n, k), got shape {tuple(codes.shape)}")
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % INT8_UNIT))
    order = torch.tensor(_INT8_ORDER, device=codes.device)
    return padded.view(len(codes), -1, INT8_UNIT)[:, :, order].reshape(len(codes), -1)


def unpack_int8(packed: torch.Tensor, k: int) -> torch.Tensor:
    """Return the codes, uint8 ``(n, k)``, that :func:`pack_int8` packed."""
    places = torch.tensor(_INT8_ORDER, device=packed.device).argsort()
    return packed.view(len(packed), -1, INT8_UNIT)[:, :, places].flatten(1)[:, :k].contiguous()


@dataclass(frozen=True)
class Format:
    """A packed weight format: everything about it that no kernel needs to know."""

    bits: int  # of a code
    packed_dtype: torch.dtype
    unit: int  # columns that rows are padded to whole multiples of
    packed_name: str  # of the elements of a packed row, in errors
    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor, int], torch.Tensor]

    @property
    def middle(self) -> int:
        """The code of weight 0 where there are neither zero points nor minima."""
        return 1 << (self.bits - 1)

    def packed_columns(self, k: int) -> int:
        """Return the elements of a packed row of ``k`` codes."""
        return -(-k // self.unit) * self.unit * self.bits // (8 * self.packed_dtype.itemsize)

    def dequantize(
        self,
        packed: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        k: int,
        group_size: int,
        dtype: torch.dtype,
        minima: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the weights ``(n, k)``, computed in ``dtype``.

        They are ``scale * (code - zero)``, or ``scale * code + minimum``.
        """
        codes = self.unpack(packed, k).to(dtype)
        group = torch.arange(k, device=packed.device) // group_size
        scale = scales.to(dtype)[:, group]
        if minima is not None:
            return scale * codes + minima.to(dtype)[:, group]
        return scale * (codes - (self.middle if zeros is None else zeros.to(dtype)[:, group]))


INT4 = Format(4, torch.int32, CHUNK, "words", pack_int4, unpack_int4)
INT8 = Format(8, torch.uint8, INT8_UNIT, "places", pack_int8, unpack_int8)
FORMATS = {4: INT4, 8: INT8}  # by bits
