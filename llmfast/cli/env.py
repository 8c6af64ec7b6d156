"""``llmfast env``: installed versions, the GPU, and the kernels that run on it. Never fails."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Annotated, Any

import typer

from .. import __version__
from ..loading.embedded import INSTALL, embedded_model_path

PACKAGES = ("torch", "triton", "transformers", "gguf")
MISSING = "not installed"
OLDEST_CAPABILITY = (8, 0)


def env_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show versions, the GPU, which kernels run and the embedded model."""
    facts = environment()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    gpu = facts["gpu"]
    lines = {
        "llmfast": facts["llmfast"],
        "Python": facts["python"],
        **{name: facts[name] or MISSING for name in PACKAGES},
        "GPU": "none"
        if gpu is None
        else f"{gpu['name']}, compute capability {gpu['capability']}, driver {gpu['driver']}",
        "kernels": facts["kernels"],
        "embedded model": facts["embedded_model"] or f"{MISSING}: {INSTALL}",
        "threads": facts["threads"] or "unknown",
    }
    for name, value in lines.items():
        print(f"{name:<16} {value}")


def environment() -> dict[str, Any]:
    """Return what ``llmfast env --json`` prints. None: absent or unknown."""
    facts: dict[str, Any] = {"llmfast": __version__, "python": platform.python_version()}
    facts |= {name: _version(name) for name in PACKAGES}
    embedded = embedded_model_path()
    facts |= {"gpu": None, "embedded_model": str(embedded.parent) if embedded else None}
    facts["threads"] = None
    try:
        import torch
    except Exception as failure:  # the reader wants to see a missing or broken library
        return facts | {"kernels": f"none: torch does not import ({_first_line(failure)})"}
    facts["torch"] = torch.__version__  # with its build, which the package's version may lack
    facts["threads"] = torch.get_num_threads()
    try:
        if torch.cuda.is_available():
            name = torch.cuda.get_device_name()
            capability = torch.cuda.get_device_capability()
            facts["gpu"] = {
                "name": name,
                "capability": ".".join(map(str, capability)),
                "driver": _driver(),
                "count": torch.cuda.device_count(),
            }
            return facts | {"kernels": _tier(capability, facts["triton"])}
    except Exception as failure:
        return facts | {"kernels": f"none: the GPU does not answer ({_first_line(failure)})"}
    return facts | {"kernels": "PyTorch references on the CPU"}


def _tier(capability: tuple[int, int], triton: str | None) -> str:
    if capability < OLDEST_CAPABILITY:
        major, minor = OLDEST_CAPABILITY
        return f"refused: this GPU is older than compute capability {major}.{minor}"
    if triton is None:
        return "refused: Triton is not installed"
    return "Triton kernels on the GPU"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except Exception:  # also metadata that cannot be read
        return None


def _driver() -> str:
    """Return the NVIDIA driver's version, which torch does not report."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    try:
        result = subprocess.run(
            [program, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (result.stdout.split() or ["unknown"])[0]


def _first_line(failure: Exception) -> str:
    return (str(failure).splitlines() or [type(failure).__name__])[0]
