"""Convert layers of checkpoint formats to and from :class:`QuantizedWeight`, bit for bit.

A reader takes the tensors of one linear layer as the file has them and copies their bits; a writer
returns the same tensors. Values are never rounded: a weight that a format cannot hold is refused.
Words are little-endian, as on every machine that PyTorch supports.

A reader makes a weight symmetric (no zeros) if every zero point is the middle of the codes,
``2 ** (bits - 1)``. The values and the written bits are the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .quantized import QuantizedWeight, check_bits

# the column, in a run of eight, of each four bits of an AWQ word, lowest bits first
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PACK_QUANTIZED = "pack-quantized"  # the format of compressed-tensors that is read and written
GGUF_BLOCK = 32
# bytes of a block: the float16 scale, the minimum if the type has one, the codes
GGUF_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def from_gptq(tensors: Mapping[str, torch.Tensor], *, bits: int, version: int) -> QuantizedWeight:
    """Read a GPTQ layer.

    Args:
        tensors: ``qweight`` int32 ``[k * bits / 32, n]``: each word holds the codes of neighbouring
            inputs, lowest bits first. ``qzeros`` int32 ``[groups, n * bits / 32]``: the zero points
            of neighbouring outputs, likewise. ``scales`` ``[groups, n]``. ``g_idx`` int32 ``[k]``,
            the group of each input; may be missing.
        bits: 4 or 8.
        version: 1 if a zero point is stored minus one (checkpoint format ``gptq``), 2 if as it is
            (``gptq_v2``). In version 1 a zero point of 0 is stored as the largest code.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a tensor that is missing, shapes that do not match, bits or version unknown.
    """
    what = "from_gptq"
    offset = _version_offset(what, version)
    check_bits(what, bits)
    qweight = _words(what, tensors, "qweight")
    qzeros = _words(what, tensors, "qzeros")
    codes = _unpack(qweight.T, bits)
    n, k = codes.shape
    scales = _scales(what, tensors, "scales").T.contiguous()
    if scales.shape[0] != n:
        raise ValueError(f"{what}: scales must have {n} columns as qweight; got {len(scales)}")
    zeros = _unpack(qzeros, bits)
    zeros = ((zeros.int() + offset) % 2**bits).to(torch.uint8).T.contiguous()
    group_size = _group_size(what, k, scales)
    g_idx = tensors.get("g_idx")
    return QuantizedWeight(
        codes=codes,
        bits=bits,
        group_size=group_size,
        scales=scales,
        zeros=_unless_middle(zeros, bits),
        g_idx=_unless_in_order(g_idx, group_size),
    )


def to_gptq(w: QuantizedWeight, *, version: int) -> dict[str, torch.Tensor]:
    """Write a GPTQ layer: the tensors that :func:`from_gptq` reads, ``g_idx`` always among them.

    Raises:
        ValueError: float minima, or n or k that does not fill whole words.
    """
    what = "to_gptq"
    offset = _version_offset(what, version)
    _no_minima(what, w)
    zeros = ((w.zero_points().int() - offset) % 2**w.bits).to(torch.uint8)
    return {
        "qweight": _pack(what, w.codes, w.bits).T.contiguous(),
        "qzeros": _pack(what, zeros.T, w.bits),
        "scales": w.scales.T.contiguous(),
        "g_idx": w.group_of_input().to(torch.int32),
    }


def from_awq(tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
    """Read an AWQ layer of the gemm layout; its codes have 4 bits.

    Args:
        tensors: ``qweight`` int32 ``[k, n / 8]``: each word holds the codes of eight neighbouring
            outputs, from the lowest bits on those of outputs 0, 2, 4, 6, 1, 3, 5, 7. ``qzeros``
            int32 ``[groups, n / 8]``: likewise. ``scales`` ``[groups, n]``.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a tensor that is missing, or shapes that do not match.
    """
    what = "from_awq"
    codes = _from_awq_order(_unpack(_words(what, tensors, "qweight"), 4)).T.contiguous()
    zeros = _from_awq_order(_unpack(_words(what, tensors, "qzeros"), 4)).T.contiguous()
    scales = _scales(what, tensors, "scales").T.contiguous()
    if len(scales) != len(codes):
        raise ValueError(
            f"{what}: scales must have {len(codes)} columns as qweight; got {len(scales)}"
        )
    return QuantizedWeight(
        codes=codes,
        bits=4,
        group_size=_group_size(what, codes.shape[1], scales),
        scales=scales,
        zeros=_unless_middle(zeros, 4),
    )


def to_awq(w: QuantizedWeight) -> dict[str, torch.Tensor]:
    """Write an AWQ layer of the gemm layout: the tensors that :func:`from_awq` reads.

    Raises:
        ValueError: codes of 8 bits, float minima, act-order, or n that is no multiple of 8.
    """
    what = "to_awq"
    _no_minima(what, w)
    if w.bits != 4:
        raise ValueError(f"{what}: codes must have 4 bits; got {w.bits}")
    if w.g_idx is not None:
        raise ValueError(f"{what}: the format has no act-order; got a g_idx")
    return {
        "qweight": _pack(what, _to_awq_order(what, w.codes.T), 4),
        "qzeros": _pack(what, _to_awq_order(what, w.zero_points().T), 4),
        "scales": w.scales.T.contiguous(),
    }


def from_compressed_tensors(tensors: Mapping[str, torch.Tensor], *, bits: int) -> QuantizedWeight:
    """Read a layer of compressed-tensors' ``pack-quantized`` format.

    Args:
        tensors: ``weight_packed`` int32 ``[n, ceil(k * bits / 32)]``: each word holds the codes of
            neighbouring inputs, lowest bits first. ``weight_scale`` ``[n, groups]``.
            ``weight_shape``: integers n and k. ``weight_zero_point``, if there is one: int32
            ``[ceil(n * bits / 32), groups]`` packed along the outputs, or int8 ``[n, groups]``,
            then less by ``2 ** (bits - 1)``. ``weight_g_idx`` int32 ``[k]``, if there is one; all
            -1 is none.
        bits: 4 or 8.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a tensor that is missing, shapes that do not match, or unknown bits.
    """
    what = "from_compressed_tensors"
    check_bits(what, bits)
    packed = _words(what, tensors, "weight_packed")
    shape = _get(what, tensors, "weight_shape").flatten().tolist()
    per_word = 32 // bits
    if len(shape) != 2 or tuple(packed.shape) != (shape[0], -(-shape[1] // per_word)):
        raise ValueError(
            f"{what}: weight_packed of shape {tuple(packed.shape)} does not hold a weight_shape of"
            f" {shape}"
        )
    n, k = shape
    scales = _scales(what, tensors, "weight_scale")
    zeros = tensors.get("weight_zero_point")
    if zeros is not None and zeros.dtype == torch.int32:
        if tuple(zeros.shape) != (-(-n // per_word), scales.shape[1]):
            raise ValueError(
                f"{what}: weight_zero_point of shape {tuple(zeros.shape)} does not hold"
                f" {tuple(scales.shape)} zero points"
            )
        zeros = _unpack(zeros.T, bits)[:, :n].T.contiguous()
    elif zeros is not None:
        if zeros.dtype != torch.int8:
            raise TypeError(f"{what}: weight_zero_point must be int32 or int8; got {zeros.dtype}")
        zeros = (zeros.int() + 2 ** (bits - 1)).to(torch.uint8)
    g_idx = tensors.get("weight_g_idx")
    if g_idx is not None and bool((g_idx == -1).all()):
        g_idx = None
    group_size = _group_size(what, k, scales)
    return QuantizedWeight(
        codes=_unpack(packed, bits)[:, :k].contiguous(),
        bits=bits,
        group_size=group_size,
        scales=scales,
        zeros=None if zeros is None else _unless_middle(zeros, bits),
        g_idx=_unless_in_order(g_idx, group_size),
    )


def to_compressed_tensors(w: QuantizedWeight) -> dict[str, torch.Tensor]:
    """Write a layer of ``pack-quantized``: the tensors that :func:`from_compressed_tensors` reads.

    Zero points are packed. The last word of a row is padded with zeros.

    Raises:
        ValueError: float minima.
    """
    what = "to_compressed_tensors"
    _no_minima(what, w)
    tensors = {
        "weight_packed": _pack(what, _fill_up(w.codes, w.bits), w.bits),
        "weight_scale": w.scales,
        "weight_shape": torch.tensor(w.shape),
    }
    if w.zeros is not None:
        packed = _pack(what, _fill_up(w.zeros.T, w.bits), w.bits)
        tensors["weight_zero_point"] = packed.T.contiguous()
    if w.g_idx is not None:
        tensors["weight_g_idx"] = w.g_idx
    return tensors


def from_gguf(rows: torch.Tensor, kind: str) -> QuantizedWeight:
    """Read a GGUF tensor in its own bits.

    Args:
        rows: uint8 ``[n, bytes of a row]``, blocks of 32 weights one after another. A block is the
            float16 scale, for Q4_1 the float16 minimum, and the codes. With four bits, byte i holds
            code i in its low half and code i + 16 in its high half; with eight bits, a code is one
            signed byte.
        kind: ``"Q4_0"``, ``"Q4_1"`` or ``"Q8_0"``.

    Raises:
        TypeError: rows are not uint8.
        ValueError: another kind, rows that are no whole blocks, or a scale that is not finite.
    """
    what = "from_gguf"
    size = _gguf_bytes(what, kind)
    if rows.dtype != torch.uint8:
        raise TypeError(f"{what}: rows must be uint8; got {rows.dtype}")
    if rows.ndim != 2 or rows.shape[1] % size or 0 in rows.shape:
        raise ValueError(
            f"{what}: rows of {kind} must be a matrix of blocks of {size} bytes; got"
            f" {tuple(rows.shape)}"
        )
    n = len(rows)
    blocks = rows.reshape(n, -1, size)
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    minima = None
    if kind == "Q4_1":
        minima = blocks[..., 2:4].contiguous().view(torch.float16)[..., 0]
    if kind == "Q8_0":
        codes = blocks[..., 2:] ^ 128  # from two's complement to the distance from -128
    else:
        halves = blocks[..., size - 16 :]
        codes = torch.cat((halves & 15, halves >> 4), -1)
    return QuantizedWeight(
        codes=codes.reshape(n, -1),
        bits=8 if kind == "Q8_0" else 4,
        group_size=GGUF_BLOCK,
        scales=scales,
        minima=minima,
    )


def to_gguf(w: QuantizedWeight, kind: str) -> torch.Tensor:
    """Write a GGUF tensor: the rows that :func:`from_gguf` reads.

    Raises:
        ValueError: another kind, or a weight that is not of the kind: Q4_0 and Q8_0 are symmetric,
            Q4_1 has float minima; groups of 32, float16 scales, no act-order.
    """
    what = "to_gguf"
    _gguf_bytes(what, kind)
    if w.group_size != GGUF_BLOCK or w.scales.dtype != torch.float16 or w.g_idx is not None:
        raise ValueError(
            f"{what}: {kind} has groups of 32 neighbours with float16 scales; got groups of"
            f" {w.group_size}{'' if w.g_idx is None else ' in act-order'} with {w.scales.dtype}"
        )
    bits = 8 if kind == "Q8_0" else 4
    if w.bits != bits or w.zeros is not None or (w.minima is not None) != (kind == "Q4_1"):
        form = (
            "zero points" if w.zeros is not None else "minima" if w.minima is not None else "none"
        )
        raise ValueError(
            f"{what}: {kind} has codes of {bits} bits and"
            f" {'minima' if kind == 'Q4_1' else 'no zero points or minima'}; got {w.bits} bits and"
            f" {form}"
        )
    n = len(w.codes)
    codes = w.codes.view(n, -1, GGUF_BLOCK)
    parts = [w.scales.contiguous()[..., None].view(torch.uint8)]
    if w.minima is not None:
        parts.append(w.minima.contiguous()[..., None].view(torch.uint8))
    parts.append(codes ^ 128 if bits == 8 else codes[..., :16] | codes[..., 16:] << 4)
    return torch.cat(parts, -1).view(n, -1)


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack uint8 codes ``[rows, columns * 32 / bits]`` from int32 words, lowest bits first."""
    octets = _copy(words).view(torch.uint8)
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), -1).flatten(-2)


def _pack(what: str, codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes: the inverse of :func:`_unpack`."""
    per_word = 32 // bits
    if codes.shape[1] % per_word:
        raise ValueError(
            f"{what}: {codes.shape[1]} codes of {bits} bits do not fill whole words of {per_word}"
        )
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return _copy(codes).view(torch.int32)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy in row order; ``contiguous()`` would keep the strides of a single column."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _fill_up(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % (32 // bits)))


def _from_awq_order(codes: torch.Tensor) -> torch.Tensor:
    place = torch.tensor(AWQ_ORDER, device=codes.device).argsort()
    return codes.view(len(codes), -1, 8)[..., place].flatten(1)


def _to_awq_order(what: str, codes: torch.Tensor) -> torch.Tensor:
    if codes.shape[1] % 8:
        raise ValueError(f"{what}: outputs must be a multiple of 8; got {codes.shape[1]}")
    return codes.reshape(len(codes), -1, 8)[..., list(AWQ_ORDER)].flatten(1)


def _unless_middle(zeros: torch.Tensor, bits: int) -> torch.Tensor | None:
    return None if bool((zeros == 2 ** (bits - 1)).all()) else zeros


def _unless_in_order(g_idx: torch.Tensor | None, group_size: int) -> torch.Tensor | None:
    if g_idx is None:
        return None
    plain = torch.arange(len(g_idx), device=g_idx.device) // group_size
    return None if torch.equal(g_idx.long(), plain) else g_idx


def _group_size(what: str, k: int, scales: torch.Tensor) -> int:
    groups = scales.shape[1]
    if groups == 0 or k % groups:
        raise ValueError(f"{what}: {groups} groups do not divide the {k} inputs")
    return k // groups


def _version_offset(what: str, version: int) -> int:
    if version not in (1, 2):
        raise ValueError(f"{what}: version must be 1 or 2; got {version}")
    return 2 - version


def _gguf_bytes(what: str, kind: str) -> int:
    if kind not in GGUF_BYTES:
        raise ValueError(f"{what}: kind must be Q4_0, Q4_1 or Q8_0; got {kind!r}")
    return GGUF_BYTES[kind]


def _no_minima(what: str, w: QuantizedWeight) -> None:
    if w.minima is not None:
        raise ValueError(f"{what}: the format has zero points only; got float minima")


def _get(what: str, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        raise ValueError(
            f"{what}: {name} is missing; got {', '.join(sorted(tensors)) or 'nothing'}"
        )
    return tensors[name]


def _words(what: str, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    words = _get(what, tensors, name)
    if words.dtype != torch.int32:
        raise TypeError(f"{what}: {name} must be int32; got {words.dtype}")
    if words.ndim != 2 or 0 in words.shape:
        raise ValueError(
            f"{what}: {name} must be a matrix that is not empty; got {tuple(words.shape)}"
        )
    return words


def _scales(what: str, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    scales = _get(what, tensors, name)
    if scales.ndim != 2:
        raise ValueError(f"{what}: {name} must be a matrix; got {tuple(scales.shape)}")
    return scales
