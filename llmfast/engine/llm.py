"""``LLM``: many requests on one model, a step at a time."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

from .build import build_core
from .config import EngineConfig, EngineOptions, config_of
from .processor import Prompt
from .request import RequestOutput
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LLM:
    """Serves many requests with one model: continuous batching over a paged cache.

    Requests of any lengths run together: a step computes one token of each decoding sequence and
    chunks of new prompts. Prompts that begin alike share their blocks. The answer to a request does
    not depend on the requests that run beside it, except for rounding.

    Any number of threads may call it at the same time. They share steps: one thread runs them, and
    each gets its own outputs.

    Papers: Yu et al., Orca (OSDI 2022): batching by steps; Kwon et al., PagedAttention,
    arXiv:2309.06180; Agrawal et al., Sarathi-Serve, arXiv:2403.02310: chunked prefill.

    Attributes:
        core: the engine core, for callers that run steps themselves.
        tokenizer: the tokenizer, or None.
        max_model_len: tokens of a prompt and its answer, at most.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        *,
        tokenizer: Any = None,
        config: EngineConfig | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        """
        Args:
            model: what :func:`llmfast.load` opens (``"embedded"``, a folder, a GGUF file, an id of
                the Hugging Face hub), or a model of transformers, which must not be moved or
                changed until :meth:`close`.
            tokenizer: of a model that is given; None: prompts are token ids and answers have no
                text.
            config: all other options at once.
            options: or one by one, ``max_num_seqs=64`` for instance: the attributes of
                :class:`llmfast.EngineConfig`.

        Raises:
            UserError: the model cannot be loaded or run, its cache does not fit, or its weights
                cannot be quantized so.
            ValueError: an argument that is out of range, or both config and options.
            TypeError: an unknown option.
        """
        self.core = build_core(model, tokenizer, config_of(config, options))
        self.tokenizer = self.core.processor.tokenizer
        self.max_model_len = self.core.processor.max_model_len

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
        requests = self.core.processor.process(prompts, sampling_params, priority)
        progress: Any = None
        unfinished = requests

        def collect() -> list[RequestOutput] | None:
            nonlocal unfinished
            before = len(unfinished)
            unfinished = [request for request in unfinished if not request.finished]
            if progress is not None:
                progress.update(before - len(unfinished))
            return None if unfinished else [self.core.output(request) for request in requests]

        try:
            self.core.add(requests)
            if use_tqdm:
                from tqdm.auto import tqdm  # type: ignore[import-untyped]

                progress = tqdm(total=len(requests), desc="Requests", dynamic_ncols=True)
            return self.core.run_until(collect)
        finally:
            if progress is not None:
                progress.close()
            self.core.abort(requests)

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
        """Return the prompt that the chat template makes of a conversation.

        Raises:
            UserError: there is no tokenizer, or it has no chat template.
        """
        return self.core.processor.chat_prompt(messages)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> Generator[RequestOutput]:
        """Answer prompts, and yield the output of a request each time that it has grown.

        An output has everything so far. Its text has no half characters, and ends before anything
        that may be the beginning of a stop text. The requests are queued when the first output is
        asked for. Leaving the loop aborts unfinished requests. Several streams may be read in turn
        or in several threads: a step runs the requests of all. Arguments and errors are those of
        :meth:`generate`.
        """
        requests = self.core.processor.process(prompts, sampling_params, priority)
        unfinished = requests

        def collect() -> list[RequestOutput] | None:
            changed = [request for request in unfinished if request.changed]
            outputs = [self.core.output(request) for request in changed]
            for request in changed:
                request.changed = False
            return outputs or None

        try:
            self.core.add(requests, streaming=True)
            while unfinished:
                outputs = self.core.run_until(collect)
                finished = {output.request_id for output in outputs if output.finished}
                yield from outputs
                unfinished = [request for request in unfinished if request.id not in finished]
        finally:
            self.core.abort(requests)

    def abort(self, request_id: str) -> None:
        """End a request before the next step; its finish reason is ``"abort"``.

        An id without an unfinished request is ignored.
        """
        self.core.abort_id(request_id)

    def close(self) -> None:
        """Abort unfinished requests, free the cache, and leave a given model as it was."""
        self.core.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
