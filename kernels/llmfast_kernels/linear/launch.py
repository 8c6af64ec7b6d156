"""How a linear layer is laid on programs: from a table measured on this GPU, or by a heuristic.

A table is a JSON file for one GPU, which ``llmfast tune`` makes. Those in ``tables/`` come with
the package; one in the user's cache goes before them.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger("llmfast")

MAX_TOKENS = 128  # more are no longer bound by the weights' bytes
SCHEMA = 1
WANTED = os.environ.get("LLMFAST_LINEAR", "1") != "0"  # ours, and not the library's alone
PACKAGED = Path(__file__).with_name("tables")
OWN = Path.home() / ".cache/llmfast/linear"  # what `llmfast tune` wrote on this machine

# (operation, out_features of the result, in_features, bucket of tokens)
Key = tuple[str, int, int, int]


@dataclass(frozen=True)
class Launch:
    """``gemv``: one token, summed by lanes. ``tiles``: tensor cores. ``cublas``: not ours.

    ``apart``, of a gated layer: a dense layer as it is launched alone, then the activation.
    """

    tier: str
    block_n: int = 0  # rows of the weight that a program takes
    block_k: int = 0  # columns of them at a time
    num_warps: int = 4
    num_stages: int = 3  # of the loop over columns, of tiles

    def fits(self, tokens: int, gated: bool, shared_memory: int) -> bool:
        """Whether the stages of a program fit in ``shared_memory`` bytes."""
        if self.tier != "tiles":
            return True  # nothing is staged
        rows = self.block_n * (2 if gated else 1) + block_m(tokens)
        return rows * self.block_k * 2 * self.num_stages <= shared_memory


# by operation, what is taken where no kernel of ours is faster
VENDOR = {"dense_linear": Launch("cublas"), "gated_linear": Launch("apart")}


class BadTable(ValueError):
    """A table that is damaged, or another GPU's."""


def bucket(tokens: int) -> int:
    """1, or what a tile holds: 16 and the powers of 2 above. What a table distinguishes."""
    return 1 if tokens == 1 else block_m(tokens)


def block_m(tokens: int) -> int:
    """Tokens of a tile; a dot takes 16 at the least."""
    return max(16, 1 << (tokens - 1).bit_length())


def prefetched(tokens: int) -> int:
    """Elements of each row that a program of tiles asks for before its input is there.

    It is alone on its multiprocessor, with nothing on its way until then: 2% of a step on an H100.
    With more tokens the tiles are fewer and larger, and it does not pay.
    """
    return 512 if tokens <= 32 else 0


def choose_launch(
    operation: str,
    n: int,
    k: int,
    tokens: int,
    *,
    shared_memory: int,
    table: dict[Key, Launch] | None = None,
) -> Launch:
    """Pick the launch for ``tokens`` tokens of ``k`` features to ``n``. Pure: it asks no device.

    Args:
        operation: ``dense_linear`` or ``gated_linear``.
        n: features of the result, so half the rows of a gated layer's weight.
        tokens: at least 1.
        shared_memory: what one program may use, in bytes.
        table: of this GPU.
    """
    if tokens > MAX_TOKENS or not WANTED:
        return VENDOR[operation]
    measured = (table or {}).get((operation, n, k, bucket(tokens)))
    if measured is not None:
        return measured
    return _heuristic(n, k, tokens, operation == "gated_linear", shared_memory)


def _heuristic(n: int, k: int, tokens: int, gated: bool, shared_memory: int) -> Launch:
    widest = 1 << (k - 1).bit_length()
    if tokens == 1:
        block_k = min(4096 if gated else 2048, widest)
        num_warps = max(block_k // 512, 1)
        if k >= 4096:  # as all such layers in the H100's table
            num_warps = 4 if gated else 8
        return Launch("gemv", 1 if gated else 2, block_k, num_warps)
    if tokens > 32:
        return VENDOR["gated_linear" if gated else "dense_linear"]
    # enough programs for every multiprocessor, and enough bytes on their way in each
    block_k = max(min(128 if gated else 256, widest), 16)
    for num_stages in range(8, 1, -1):
        launch = Launch("tiles", 32, block_k, 4, num_stages)
        if launch.fits(tokens, gated, shared_memory):
            break
    return launch


# ---------------------------------------------------------------------------------------- tables


def table_name(gpu: str) -> str:
    """The file name of a GPU's table."""
    return "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split()) + ".json"


@cache
def table_of(gpu: str) -> dict[Key, Launch] | None:
    """The table of a GPU by its name; None where there is none. A bad one is logged, once."""
    for folder in (OWN, PACKAGED):
        path = folder / table_name(gpu)
        if not path.is_file():
            continue
        try:
            return read_table(path, gpu)
        except BadTable as error:
            logger.warning("llmfast: %s; launches are chosen without it", error)
    return None


def read_table(path: Path, gpu: str) -> dict[Key, Launch]:
    """Read a table.

    Raises:
        BadTable: the file is no table of this GPU.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadTable(f"linear: {path} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise BadTable(f"linear: {path} is no table of schema {SCHEMA}; make one: llmfast tune")
    if data.get("gpu") != gpu:
        raise BadTable(f"linear: {path} is of {data.get('gpu')!r}, this GPU is {gpu!r}")
    try:
        return dict(_entry(entry) for entry in data["launches"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadTable(f"linear: {path} is damaged: {error!r}; make one: llmfast tune") from error


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


def write_table(path: Path, gpu: str, launches: dict[Key, Launch]) -> None:
    """Write a table; a line for each entry, so that a difference shows what changed."""
    lines = [
        json.dumps(dict(zip(("operation", "n", "k", "tokens"), key, strict=True)) | asdict(launch))
        for key, launch in sorted(launches.items())
    ]
    head = json.dumps({"schema": SCHEMA, "gpu": gpu})[:-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + ', "launches": [\n ' + ",\n ".join(lines) + "\n]}\n")
