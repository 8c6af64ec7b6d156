"""The environment of a run: GPU, versions and commit. Importing this module queries nothing."""

from __future__ import annotations

import re
import secrets
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .results import Env


def capture_env(*, commit: str | None = None) -> Env:
    """Return the environment of this process.

    Args:
        commit: of the sources, if the checkout has no history. None: ask git.
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
    """Make a unique name for a run: `20261121T225101Z-1f2e3d4c5b6a-9c0e`."""
    return f"{re.sub(r'[-:]', '', env.date)}-{env.commit}-{secrets.token_hex(2)}"


def gpu_folder(gpu: str) -> str:
    """Return the name of a GPU's folder: "NVIDIA H100 80GB HBM3" gives "h100"."""
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
    """Return the checkout's commit, with "-dirty" if tracked sources differ from it."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "unknown"
    head = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    # results and pages change while they are measured and written
    sources = ["--untracked-files=no", "--", ".", ":!bench/results", ":!docs/benchmarks.md"]
    changed = _output(["git", "-C", str(root), "status", "--porcelain", *sources])
    return "unknown" if not head else head + ("-dirty" if changed else "")


def _output(command: list[str]) -> str | None:
    """Return the stripped output of a command; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
