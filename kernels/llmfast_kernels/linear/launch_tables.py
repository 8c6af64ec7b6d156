"""Tables of measured launches: JSON files, each for one kind of GPU.

``llmfast tune`` writes a user's table. The first of these that exists is used: the user's table for
the GPU's name, the package's for the name, the package's for the architecture and number of SMs.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

from ..common.device import Device
from .launch import VENDOR, Key, Launch

logger = logging.getLogger("llmfast")

SCHEMA = 2
PACKAGED = Path(__file__).with_name("tables")
OWN = Path.home() / ".cache/llmfast/linear"  # what `llmfast tune` wrote on this machine


class BadTable(ValueError):
    """A table that is damaged, or for another kind of GPU."""


def table_name(device: Device) -> str:
    """Return the file name of the table for a GPU's name."""
    spaced = "".join(c if c.isalnum() else " " for c in device.name.lower())
    return "-".join(spaced.split()) + ".json"


def shared_table_name(device: Device) -> str:
    """Return the file name of the table for a GPU's architecture and number of SMs."""
    return f"{device.arch}-{device.sm_count}sm.json"


@cache
def table_of(device: Device) -> dict[Key, Launch] | None:
    """Return the table for a GPU, None without one. Logs once that there is none or a bad one."""
    paths = (
        OWN / table_name(device),
        PACKAGED / table_name(device),
        PACKAGED / shared_table_name(device),
    )
    bad = False
    for path in filter(Path.is_file, paths):
        try:
            return read_table(path, device)
        except BadTable as error:
            bad = True
            logger.warning("llmfast: %s; launches are chosen without it", error)
    if bad:
        return None
    logger.warning(
        "llmfast: no launches of linear layers were measured on %s (%s, %d SMs); `llmfast tune` "
        "measures them, which may make decoding a few per cent faster",
        device.name, device.arch, device.sm_count,
    )  # fmt: skip
    return None


def read_table(path: Path, device: Device) -> dict[Key, Launch]:
    """Read a table.

    Raises:
        BadTable: the file is no table for a GPU of this name, or of this architecture and number of
            SMs.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadTable(f"linear: {path} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise BadTable(
            f"linear: {path} is no table of schema {SCHEMA}; delete it and run llmfast tune"
        )
    kind = (data.get("arch"), data.get("sms"))
    if data.get("gpu") != device.name and kind != (device.arch, device.sm_count):
        raise BadTable(f"linear: {path} is for {data.get('gpu')!r}, this GPU is {device.name!r}")
    try:
        return dict(_entry(entry) for entry in data["launches"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadTable(
            f"linear: {path} is damaged: {error!r}; delete it and run llmfast tune"
        ) from error


def _entry(entry: dict[str, Any]) -> tuple[Key, Launch]:
    operation, (n, k, tokens) = entry["operation"], (entry[name] for name in ("n", "k", "tokens"))
    launch = Launch(**{field.name: entry[field.name] for field in fields(Launch)})
    numbers = (n, k, tokens, launch.block_n, launch.block_k, launch.num_warps, launch.num_stages)
    if operation not in VENDOR or launch.tier not in ("gemv", "tiles", VENDOR[operation].tier):
        raise ValueError(f"{operation}, {launch.tier}")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{numbers}")
    if launch.tier in ("gemv", "tiles"):
        powers = (launch.block_n, launch.block_k, launch.num_warps)
        if launch.num_stages < 1 or not all(p > 0 and p & (p - 1) == 0 for p in powers):
            raise ValueError(f"{launch}")
    if launch.tier == "gemv" and tokens != 1:
        raise ValueError(f"{launch} for {tokens} tokens")
    return (operation, n, k, tokens), launch


def write_table(path: Path, device: Device, launches: dict[Key, Launch]) -> None:
    """Write a table with one entry per line, so that a diff shows what changed."""
    lines = [
        json.dumps(dict(zip(("operation", "n", "k", "tokens"), key, strict=True)) | asdict(launch))
        for key, launch in sorted(launches.items())
    ]
    gpu = {"gpu": device.name, "arch": device.arch, "sms": device.sm_count}
    head = json.dumps({"schema": SCHEMA} | gpu)[:-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + ', "launches": [\n ' + ",\n ".join(lines) + "\n]}\n")
