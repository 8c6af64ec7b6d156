"""Fast inference of Hugging Face language models. Importing it touches no device and no Triton."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.async_llm import AsyncLLM
    from .engine.config import EngineConfig
    from .engine.llm import LLM
    from .engine.request import CompletionOutput, RequestOutput
    from .engine.sampling_params import SamplingParams, StructuredOutputsParams
    from .loading.load import Loaded, load
    from .model.report import Report
    from .patching import patch, patched, unpatch
    from .quantization.driver import quantize
    from .quantization.save import save_quantized
    from .runner.warmup import warmup
    from .weights.quantized import Quantized

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineConfig",
    "Loaded",
    "Quantized",
    "Report",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "load",
    "patch",
    "patched",
    "quantize",
    "save_quantized",
    "unpatch",
    "warmup",
]

_HOMES = {
    "AsyncLLM": ".engine.async_llm",
    "LLM": ".engine.llm",
    "CompletionOutput": ".engine.request",
    "EngineConfig": ".engine.config",
    "Loaded": ".loading.load",
    "Quantized": ".weights.quantized",
    "Report": ".model.report",
    "RequestOutput": ".engine.request",
    "SamplingParams": ".engine.sampling_params",
    "StructuredOutputsParams": ".engine.sampling_params",
    "load": ".loading.load",
    "patch": ".patching",
    "patched": ".patching",
    "quantize": ".quantization.driver",
    "save_quantized": ".quantization.save",
    "unpatch": ".patching",
    "warmup": ".runner.warmup",
}


def __dir__() -> list[str]:
    """List the public names, whether or not they have been imported."""
    return sorted((*__all__, "__version__"))


def __getattr__(name: str) -> Any:
    """Import a public name on first use: torch and transformers take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'llmfast' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
