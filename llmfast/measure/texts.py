"""The texts of evaluation and calibration: two novels in the package, or a file."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError

TEXTS = {"persuasion": "persuasion.txt", "pride-and-prejudice": "pride_and_prejudice.txt"}


class Text(NamedTuple):
    """A text and its name in a results file."""

    name: str
    text: str


def read_text(name: str) -> Text:
    """Read a text of the package by name, or the UTF-8 file at that path.

    Raises:
        UserError: neither a known name nor a readable file, or an empty file.
    """
    if name in TEXTS:
        source = files("llmfast.measure").joinpath("data", TEXTS[name])
        return Text(name, source.read_text(encoding="utf-8"))
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"text must be {' or '.join(TEXTS)} or a file; {name!r}: {error.strerror}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"text: {path} is not UTF-8: {error.reason}") from None
    if not text.strip():
        raise UserError(f"text: {path} is empty")
    return Text(path.stem, text)
