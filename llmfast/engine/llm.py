"""``LLM``: many requests on one model, a step at a time."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import UserError
from ..loading.load import load
from ..model.patch import refuse
from ..quantization.select import select_weights
from ..runner.cache import BLOCK_SIZE
from ..runner.inputs import MAX_STEP_TOKENS
from ..weights.model_weights import detach
from ..weights.quantized import Quantized
from .block_manager import BlockManager
from .chunking import chunk_sizer_of
from .core import EngineCore
from .model_runner import ModelRunner
from .outputs import Outputs
from .processor import InputProcessor, Prompt, end_tokens_of
from .request import RequestOutput
from .sampling_params import SamplingParams
from .scheduler import Scheduler


class LLM(EngineCore):
    """Serves many requests with one model: continuous batching over a paged cache.

    Requests of any lengths run together; a step computes one token of each that decodes and
    chunks of new prompts. Prompts that begin alike share their blocks. What a request yields does
    not depend on what runs beside it, but for rounding. Not for several threads at once;
    :meth:`abort` alone may be called from another.

    Papers: Yu et al., Orca (OSDI 2022): batching by steps; Kwon et al., PagedAttention,
    arXiv:2309.06180; Agrawal et al., Sarathi-Serve, arXiv:2403.02310: chunked prefill.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        *,
        tokenizer: Any = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        block_size: int = BLOCK_SIZE,
        num_blocks: int | None = None,
        enforce_eager: bool = False,
        seed: int = 0,
        weights: str | Quantized | None = None,
        group_size: int | str | None = "auto",
    ) -> None:
        """
        Args:
            model: what :func:`llmfast.load` opens (``"embedded"``, a folder, a GGUF file, an id of
                the Hugging Face hub), or a model of transformers, which must not be moved or
                changed until :meth:`close`.
            tokenizer: of a model that is given; None: prompts are token ids and answers have no
                text.
            dtype, device: of a model that is loaded.
            max_model_len: tokens of a prompt and its answer; None: what the model was made for,
                or the cache holds if that is less.
            gpu_memory_utilization: the share of the GPU's memory that may be taken, with weights
                and what others hold; the cache gets what is left of it.
            max_num_seqs: answers that are worked on at the same time.
            max_num_batched_tokens: tokens of a step; None: 4,096, or max_num_seqs if that is more.
                Smaller ones shorten the steps that others wait for.
            enable_prefix_caching: keep finished blocks, for prompts that begin alike.
            enable_chunked_prefill: split long prompts, and run the chunks beside sequences that
                decode. Otherwise those wait while there are prompts to run, which are run whole:
                as many as max_num_batched_tokens takes, or one that is longer.
            block_size: tokens of a block: 16, 32, 64, 128 or 256.
            num_blocks: of the cache, instead of what gpu_memory_utilization gives.
            enforce_eager: run every step without CUDA graphs. Otherwise, on a GPU, those in which
                every sequence decodes, and small ones with prompts, are captured here.
            seed: of the seeds of requests that have none.
            weights, group_size: as of :func:`llmfast.patch`: ``"int4"`` or ``"int8"`` rounds the
                decoder's linear layers until :meth:`close`.

        Raises:
            UserError: the model cannot be loaded or run, its cache does not fit, or its weights
                cannot be quantized so.
            ValueError: an argument that is out of range.
        """
        if max_num_batched_tokens is None:
            max_num_batched_tokens = max(MAX_STEP_TOKENS, max_num_seqs)
        for name, value in (
            ("max_model_len", max_model_len),
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("num_blocks", num_blocks),
        ):
            if value is not None and value < 1:
                raise ValueError(f"LLM: {name} must be 1 or more; got {value}")
        if block_size not in (16, 32, 64, 128, 256):
            raise ValueError(f"LLM: block_size must be 16, 32, 64, 128 or 256; got {block_size}")
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(
                "LLM: gpu_memory_utilization must be more than 0 and at most 1; "
                f"got {gpu_memory_utilization}"
            )
        if isinstance(model, (str, os.PathLike)):
            model, loaded_tokenizer = load(model, device=device, dtype=dtype)
            tokenizer = loaded_tokenizer if tokenizer is None else tokenizer
        elif dtype is not None or device is not None:
            raise ValueError(
                "LLM: dtype and device are of a model that is loaded; this one was given"
            )
        refuse(model, "LLM")
        select_weights(model, weights, group_size, what="LLM")
        self._rounded = None if weights is None else model
        self.tokenizer = tokenizer
        end_tokens = end_tokens_of(model, tokenizer)
        try:
            self._executor = ModelRunner(
                model,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                utilization=gpu_memory_utilization,
                block_size=block_size,
                num_blocks=num_blocks,
                chunked=enable_chunked_prefill,
                eager=enforce_eager,
            )
        except BaseException:
            self._put_back()
            raise
        self.max_model_len = self._executor.max_model_len
        num_blocks = self._executor.num_blocks
        self._blocks = BlockManager(num_blocks, block_size, caching=enable_prefix_caching)
        self._scheduler = Scheduler(
            self._blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            chunked=enable_chunked_prefill,
            chunk_sizer=chunk_sizer_of(model),
        )
        self._processor = InputProcessor(
            tokenizer,
            end_tokens,
            vocabulary=self._executor.vocabulary,
            max_model_len=self.max_model_len,
            room=num_blocks * block_size,
            seed=seed,
        )
        self._outputs = Outputs(tokenizer, end_tokens)
        super().__init__()

    # -------------------------------------------------------------------------- for callers

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Answer prompts, all at once.

        Args:
            prompts: texts, lists of token ids, or dictionaries ``{"prompt": text}`` or
                ``{"prompt_token_ids": ids}``; one of them or a list.
            sampling_params: for all prompts, or a list with one for each.
            use_tqdm: show a progress bar.
            priority: for all prompts, or a list with one for each: lower ones go first.

        Returns:
            An output for each prompt, in their order. A request that cannot be run (an empty
            prompt, say) has the finish reason ``"error"`` and says why in ``error``; the others
            are answered.

        Raises:
            UserError: text without a tokenizer.
            ValueError: another number of ``sampling_params`` or priorities than of prompts.
            TypeError: something that is no prompt.
        """
        requests = self._add(prompts, sampling_params, priority, streaming=False)
        progress: Any = None
        try:
            if use_tqdm:
                from tqdm.auto import tqdm  # type: ignore[import-untyped]

                progress = tqdm(total=len(requests), desc="Requests", dynamic_ncols=True)
            unfinished = {request.id for request in requests}
            while unfinished:
                before = len(unfinished)
                unfinished = unfinished & self._requests.keys()
                if progress is not None:
                    progress.update(before - len(unfinished))
                if unfinished:
                    self._step()
            return [self._output(request) for request in requests]
        finally:
            if progress is not None:
                progress.close()
            self._drop(requests)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Answer conversations: lists of ``{"role": ..., "content": ...}``; one, or a list of them.

        Raises:
            UserError: there is no tokenizer, or it has no chat template; otherwise as
                :meth:`generate`.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        prompts = [self.chat_prompt(conversation) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm, priority=priority)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The prompt that the chat template makes of a conversation, for generate or stream.

        Raises:
            UserError: there is no tokenizer, or it has no chat template.
        """
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise UserError("LLM.chat: wants a tokenizer with a chat template; this has none")
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer.encode(text, add_special_tokens=False)  # the template has them
        return {"prompt": text, "prompt_token_ids": ids}

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> Generator[RequestOutput]:
        """Answer prompts, and yield the output of a request each time that it has grown.

        An output has everything so far. Its text has no half characters, nor anything that may
        turn out to be the beginning of a stop text. The requests are queued when the first output
        is asked for; leaving the loop aborts what is not finished. Several streams may be read in
        turn: a step runs the requests of all. Arguments and errors are those of :meth:`generate`.
        """
        requests = self._add(prompts, sampling_params, priority, streaming=True)
        try:
            while requests:
                if not any(request.changed for request in requests):
                    self._step()
                for request in requests:
                    if request.changed:
                        request.changed = False
                        yield self._output(request)
                # another stream's step may have finished one since it was yielded
                requests = [r for r in requests if r.changed or not r.finished]
        finally:
            self._drop(requests)

    def abort(self, request_id: str) -> None:
        """End a request before the next step; its finish reason is ``"abort"``.

        Of an id that is not, or no more, known nothing happens.
        """
        self._aborted.add(request_id)

    def close(self) -> None:
        """Free the cache, and leave a model that was given as it was."""
        if self._closed:
            return
        self._drop(list(self._requests.values()))
        self._closed = True
        self._in_flight.clear()
        self._executor.close()
        self._put_back()

    def _put_back(self) -> None:
        """Give a model that was rounded here its own weights."""
        if self._rounded is not None:
            detach(self._rounded)
        self._rounded = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
