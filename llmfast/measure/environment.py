"""Where and with what a run is measured, found out when asked and never at import."""

from __future__ import annotations

import re
import secrets
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .results import Env


def capture_env(*, commit: str | None = None) -> Env:
    """Find out where and with what this process measures, now.

    Args:
        commit: of the sources, for a machine whose copy of them has no history. None: asked of git.
    """
    import torch

    from .. import __version__

    cuda = torch.cuda.is_available()
    return Env(
        gpu=torch.cuda.get_device_name() if cuda else "none",
        driver=_driver() if cuda else "none",
        torch=torch.__version__,
        triton=_version("triton"),
        transformers=_version("transformers"),
        llmfast=__version__,
        commit=commit or _commit(),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def run_id(env: Env) -> str:
    """Make a name for a run: `20261121T225101Z-1f2e3d4c5b6a-9c0e`, another one at each call."""
    return f"{re.sub(r'[-:]', '', env.date)}-{env.commit}-{secrets.token_hex(2)}"


def gpu_folder(gpu: str) -> str:
    """Name a GPU's folder after the device: "NVIDIA H100 80GB HBM3" gives "h100"."""
    words = re.sub(r"(?i)\b(nvidia|geforce|tesla|amd|instinct|quadro)\b", " ", gpu).split()
    if words and re.fullmatch(r"(?i)(rtx|gtx|titan)", words[0]):
        kept = [w for w in words if not re.fullmatch(r"(?i)\d+gb", w)]
    else:
        kept = re.split(r"[-_]", words[0])[:1] if words else []
    return re.sub(r"[^a-z0-9]+", "-", " ".join(kept).lower()).strip("-") or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (_output(query) or "unknown").splitlines()[0].strip()


def _commit() -> str:
    """The commit of the checkout this package is in, with "-dirty" if tracked sources differ."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "unknown"
    head = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    # the figures themselves change while they are made
    sources = ["--untracked-files=no", "--", ".", ":!bench/results", ":!docs/benchmarks.md"]
    changed = _output(["git", "-C", str(root), "status", "--porcelain", *sources])
    return "unknown" if not head else head + ("-dirty" if changed else "")


def _output(command: list[str]) -> str | None:
    """What a command prints, stripped; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
