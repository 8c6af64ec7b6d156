"""``EngineConfig``: the options of an engine, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from ..runner.cache import BLOCK_SIZE
from ..runner.inputs import MAX_STEP_TOKENS

if TYPE_CHECKING:
    import torch

    from ..weights.quantized import Quantized

BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The options of :class:`llmfast.LLM` and :class:`llmfast.AsyncLLM`.

    Attributes:
        dtype, device: of a model that is loaded.
        max_model_len: tokens of a prompt and its answer; None: the length that the model was made
            for, or that the cache holds if that is less.
        gpu_memory_utilization: the share of the GPU's memory that may be taken, with weights
            and other processes included; the cache gets the rest of it.
        max_num_seqs: sequences that run at the same time, at most.
        max_num_batched_tokens: tokens of a step; None: 4,096, or max_num_seqs if that is more.
            Smaller steps delay the tokens of other requests less.
        enable_prefix_caching: keep finished blocks for prompts that begin alike.
        enable_chunked_prefill: split long prompts, and run the chunks beside decodes. Otherwise
            prompts run whole, and decodes wait while there are any. A step then holds as many
            prompts as max_num_batched_tokens takes, or one that is longer.
        block_size: tokens of a cache block: 16, 32, 64, 128 or 256.
        num_blocks: of the cache, instead of as many as gpu_memory_utilization allows; layers with a
            sliding window beside full attention have no more.
        enforce_eager: run every step without CUDA graphs. Otherwise, on a GPU, steps in which every
            sequence decodes, and small ones with prompts, are captured when the engine is made.
        seed: of the seeds of requests without one.
        weights, group_size: as of :func:`llmfast.patch`: ``"int4"`` or ``"int8"`` quantizes the
            decoder's linear layers until the engine is closed.

    Raises:
        ValueError: a value that is out of range.
        TypeError: an unknown option.
    """

    dtype: str | torch.dtype | None = None
    device: str | torch.device | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    block_size: int = BLOCK_SIZE
    num_blocks: int | None = None
    enforce_eager: bool = False
    seed: int = 0
    weights: str | Quantized | None = None
    group_size: int | str | None = "auto"

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"LLM: {name} must be 1 or more; got {value}")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(
                f"LLM: block_size must be 16, 32, 64, 128 or 256; got {self.block_size}"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                "LLM: gpu_memory_utilization must be more than 0 and at most 1; "
                f"got {self.gpu_memory_utilization}"
            )

    @property
    def step_tokens(self) -> int:
        """``max_num_batched_tokens``, or its default."""
        return self.max_num_batched_tokens or max(MAX_STEP_TOKENS, self.max_num_seqs)


class EngineOptions(TypedDict, total=False):
    """The attributes of :class:`EngineConfig` as keyword arguments."""

    dtype: str | torch.dtype | None
    device: str | torch.device | None
    max_model_len: int | None
    gpu_memory_utilization: float
    max_num_seqs: int
    max_num_batched_tokens: int | None
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    block_size: int
    num_blocks: int | None
    enforce_eager: bool
    seed: int
    weights: str | Quantized | None
    group_size: int | str | None


def config_of(config: EngineConfig | None, options: EngineOptions) -> EngineConfig:
    """Return the config, or one made of options.

    Raises:
        ValueError: both are given, or a value is out of range.
        TypeError: an unknown option, or a config of another type.
    """
    if config is None:
        return EngineConfig(**options)
    if not isinstance(config, EngineConfig):
        raise TypeError(f"LLM: config must be an EngineConfig; got {type(config).__name__}")
    if options:
        raise ValueError(f"LLM: wants either config or options; got both: {', '.join(options)}")
    return config
