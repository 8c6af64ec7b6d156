"""From a model and a config to the parts of an engine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..loading.load import load
from ..model.patch import refuse
from ..quantization.select import select_weights
from ..weights.model_weights import detach
from .block_manager import BlockManager
from .chunking import chunk_sizer_of
from .config import EngineConfig
from .core import EngineCore
from .model_runner import ModelRunner
from .outputs import OutputProcessor
from .policy import ChunkedPrefill, SchedulingPolicy, WholePrefill
from .processor import InputProcessor, end_tokens_of
from .scheduler import Scheduler

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_core(
    model: str | os.PathLike[str] | PreTrainedModel, tokenizer: Any, config: EngineConfig
) -> EngineCore:
    """Load a model if needed, quantize its weights if wanted, and build an engine over it.

    Arguments and errors are those of :class:`.llm.LLM`. If anything fails, a model that was given
    has its own weights again.
    """
    if isinstance(model, (str, os.PathLike)):
        model, loaded_tokenizer = load(model, device=config.device, dtype=config.dtype)
        tokenizer = loaded_tokenizer if tokenizer is None else tokenizer
    elif config.dtype is not None or config.device is not None:
        raise ValueError("LLM: dtype and device are of a model that is loaded; this one was given")
    refuse(model, "LLM")
    select_weights(model, config.weights, config.group_size, what="LLM")

    def restore_weights() -> None:
        if config.weights is not None:
            detach(model)

    try:
        return _core_of(model, tokenizer, config, restore_weights)
    except BaseException:
        restore_weights()
        raise


def _core_of(
    model: PreTrainedModel, tokenizer: Any, config: EngineConfig, restore_weights: Any
) -> EngineCore:
    end_tokens = end_tokens_of(model, tokenizer)
    model_runner = ModelRunner(
        model,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.step_tokens,
        utilization=config.gpu_memory_utilization,
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        chunked=config.enable_chunked_prefill,
        eager=config.enforce_eager,
    )
    groups = [
        BlockManager(count, config.block_size, window=window, caching=config.enable_prefix_caching)
        for window, count in model_runner.cache_groups
    ]
    policy: SchedulingPolicy = WholePrefill(config.step_tokens)
    if config.enable_chunked_prefill:
        policy = ChunkedPrefill(config.step_tokens, chunk_sizer_of(model))
    processor = InputProcessor(
        tokenizer,
        end_tokens,
        vocabulary=model_runner.vocabulary,
        max_model_len=model_runner.max_model_len,
        cache_tokens=model_runner.num_blocks * config.block_size,
        seed=config.seed,
    )
    return EngineCore(
        model_runner,
        Scheduler(groups, policy, max_num_seqs=config.max_num_seqs),
        processor,
        OutputProcessor(tokenizer, end_tokens),
        on_close=restore_weights,
    )
