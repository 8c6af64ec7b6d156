"""The executor: one model, its paged cache and its CUDA graphs; runs one step at a time.

It owns everything on the GPU that changes. It knows tokens, positions and blocks, but no requests:
callers describe a step in one host buffer and get back sampled tokens or logits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from ..errors import UserError
from .cache import BLOCK_SIZE, PagedCache
from .graphs import CAPTURES, StepGraphs
from .inputs import GraphKey, SamplingOps, StepInputs, StepShape, StepTensors, buffer_bytes, views
from .model import StepModel
from .sampling import sample_rows
from .step import step_of

logger = logging.getLogger("llmfast")


@dataclass(frozen=True)
class Owner:
    """The part of llmfast that an executor works for, as errors about memory name it."""

    name: str
    cache_advice: str  # what the user can do if the cache does not fit
    graph_advice: str  # or if there is no memory for a CUDA graph


@dataclass(eq=False)
class StepHandle:
    """A step that was launched."""

    num_sampled: int
    logits: torch.Tensor | None = None  # rows of logits that the step did not sample from
    result: torch.Tensor | None = None  # int64 [2, rows] on the host, once the step has run
    done: torch.cuda.Event | None = None


@dataclass(frozen=True)
class StepResult:
    """The tokens that a step sampled on the device, int64 ``[num_sampled]`` each, on the host."""

    tokens: torch.Tensor
    status: torch.Tensor  # of sample_tokens; 0: the token is good


class Executor:
    """Runs steps on the model's device, on a GPU most of them as CUDA graphs.

    Not for several threads at once.
    """

    def __init__(
        self,
        model: StepModel,
        *,
        num_blocks: int,
        max_rows: int,
        max_length: int,
        owner: Owner,
        block_size: int = BLOCK_SIZE,
        graph_shapes: Iterable[StepShape] = (),
        use_graphs: bool | None = None,
    ) -> None:
        """
        Args:
            model: its blocks share weights with the user's model.
            num_blocks: blocks of the cache.
            max_rows: rows of a step at most.
            max_length: tokens of a row at most, with those in the cache.
            block_size: tokens per block.
            graph_shapes: the shapes of steps that may be captured.
            use_graphs: None: where the device has graphs.

        Raises:
            UserError: the cache does not fit into the device's memory.
        """
        self.model = model
        self.device = model.device
        self.max_rows, self.max_length = max_rows, max_length
        self.width = -(-max_length // block_size)  # blocks per row of the block table
        self.waited = 0.0  # seconds that the host spent only waiting for steps
        if use_graphs is None:
            use_graphs = self.device.type in CAPTURES
        self._graphs = StepGraphs(
            self.device, enabled=use_graphs, owner=owner.name, advice=owner.graph_advice
        )
        self.cache = _make_cache(model, num_blocks, block_size, owner)
        try:
            model.resize(max_length)
            # of the latest step: the tokens that were sampled, and their status
            self._sampled = torch.zeros(2, max_rows, dtype=torch.int64, device=self.device)
            largest = max(map(buffer_bytes, graph_shapes), default=0) if use_graphs else 0
            self._buffer = torch.zeros(largest, dtype=torch.uint8, device=self.device)
        except BaseException:
            self.close()
            raise

    @property
    def asynchronous(self) -> bool:
        """Whether :meth:`launch` returns before the step has run."""
        return self.device.type == "cuda"

    @property
    def use_graphs(self) -> bool:
        """Whether steps are captured."""
        return self._graphs.enabled

    @property
    def num_graphs(self) -> int:
        """How many steps have been captured."""
        return len(self._graphs)

    # ------------------------------------------------------------------------------- steps

    def new_step(
        self,
        *,
        num_tokens: int,
        num_rows: int,
        max_query_len: int,
        num_prompts: int,
        max_context_len: int,
        num_logits: int,
        sampling: SamplingOps | None,
        num_sampled: int = 0,
        num_copies: int = 0,
        eager: bool = False,
    ) -> StepInputs:
        """Return the inputs of a step for the caller to fill: its first tokens, rows and logits.

        Args:
            num_tokens, num_rows: tokens of the step, and sequences that they belong to.
            max_query_len: the most tokens of a row.
            num_prompts: rows with several tokens.
            max_context_len: the most tokens of a row in the cache once the step has run.
            num_logits: rows of logits; the first ``num_sampled`` of them are sampled on the device.
            sampling: None: the step ends at the logits.
            num_copies: blocks that are copied before the step.
            eager: run it without a graph in any case.
        """
        key = None
        if not eager and (sampling is None or num_logits == num_sampled):
            key = self._graphs.find(
                tokens=num_tokens,
                rows=num_rows,
                max_query_len=max_query_len,
                prompts=num_prompts,
                sampling=sampling,
            )
        captured = key is not None
        if key is None:
            width = max(1, -(-max_context_len // self.cache.block_size))
            prompts = num_prompts if num_prompts < num_rows else None
            shape = StepShape(num_tokens, num_rows, width, num_logits, max_query_len, prompts)
            key = GraphKey(shape, sampling)
        return StepInputs(
            key,
            num_sampled=num_sampled,
            num_copies=num_copies,
            max_context_len=max_context_len,
            captured=captured,
            pinned=self.device.type == "cuda",
        )

    @torch.no_grad()
    def launch(self, inputs: StepInputs) -> StepHandle:
        """Start a step. On a GPU this returns before the step has run."""
        key, count = inputs.key, inputs.num_sampled
        handle = StepHandle(count)
        self._copy_blocks(inputs)
        if inputs.captured:
            self._upload(inputs)
            self._graphs.replay(key)
        else:
            tensors = views(inputs.buffer.to(self.device, non_blocking=True), inputs.shape)
            logits = self._forward(tensors, inputs.shape, inputs.max_context_len)
            if count and key.sampling is not None:
                self._sample(logits[:count], tensors, key.sampling)
            if len(logits) > count:
                handle.logits = logits[count:]
        if count:
            handle.result = self._results()
        self._record(handle)
        return handle

    def feed(self, tokens: torch.Tensor) -> None:
        """Set the tokens of the latest step's first rows, which the host chose: int64 ``[n]``."""
        self._sampled[0, : len(tokens)] = tokens.to(self._sampled)

    def collect(self, handle: StepHandle) -> StepResult:
        """Wait for a step and return the tokens that it sampled on the device."""
        if handle.done is not None:
            started = time.perf_counter()
            handle.done.synchronize()
            self.waited += time.perf_counter() - started
        if handle.result is None:
            nothing = torch.empty(0, dtype=torch.int64, device="cpu")
            return StepResult(nothing, nothing)
        tokens, status = handle.result[:, : handle.num_sampled]
        return StepResult(tokens, status)

    def _copy_blocks(self, inputs: StepInputs) -> None:
        if inputs.shape.copies:
            copies = torch.from_numpy(inputs.arrays["block_copies"]).to(self.device)
            self.cache.copy(copies[:, 0], copies[:, 1])

    def _forward(
        self, tensors: StepTensors, shape: StepShape, max_context_len: int | None = None
    ) -> torch.Tensor:
        """Run the model over a step whose unknown tokens are those that the latest one sampled."""
        sampled = self._sampled[0][tensors.source_row.clamp(min=0)]
        tokens = torch.where(tensors.source_row < 0, tensors.token_ids, sampled)
        step = step_of(tensors, shape, max_context_len=max_context_len, token_ids=tokens)
        return self.model(step, self.cache, tensors.logit_tokens)

    def _sample(self, logits: torch.Tensor, tensors: StepTensors, ops: SamplingOps) -> None:
        sampled = sample_rows(logits, tensors, ops)
        self._sampled[0, : len(logits)] = sampled.tokens
        self._sampled[1, : len(logits)] = sampled.status

    def _results(self) -> torch.Tensor:
        """Return what the latest step sampled, on its way to the host."""
        if self._sampled.device.type != "cuda":
            return self._sampled.clone()
        result = torch.empty(self._sampled.shape, dtype=self._sampled.dtype, pin_memory=True)
        return result.copy_(self._sampled, non_blocking=True)

    def _record(self, handle: StepHandle) -> None:
        if self.device.type == "cuda":
            handle.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            handle.done.record(torch.cuda.current_stream(self.device))

    # ------------------------------------------------------------------------------ graphs

    def capture(self, keys: Sequence[GraphKey]) -> None:
        """Capture steps, their shapes among ``graph_shapes``; no sequence may be running.

        Raises:
            UserError: the GPU has no memory left for them.
        """
        self._graphs.capture(keys, self._make_idle, self._captured_step)

    def _make_idle(self, key: GraphKey) -> None:
        inputs = StepInputs(key)
        inputs.make_idle()
        self._upload(inputs)

    def _upload(self, inputs: StepInputs) -> None:
        size = buffer_bytes(inputs.key.shape)  # without the block copies, which follow
        self._buffer[:size].copy_(inputs.buffer[:size], non_blocking=True)

    @torch.no_grad()
    def _captured_step(self, key: GraphKey) -> None:
        """Run the step of a key over the fixed buffers: what a graph captures."""
        tensors = views(self._buffer, key.shape)
        logits = self._forward(tensors, key.shape)
        if key.sampling is not None:
            self._sample(logits, tensors, key.sampling)

    # ------------------------------------------------------------------------------ memory

    def close(self) -> None:
        """Free the graphs and the cache; the executor cannot be used afterwards."""
        self._graphs.clear()
        self.cache.close()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _make_cache(model: StepModel, num_blocks: int, block_size: int, owner: Owner) -> PagedCache:
    with suppress(RuntimeError):  # the allocator's; its traceback would keep what was allocated
        return PagedCache(model.cache_shapes, num_blocks, model.dtype, model.device, block_size)
    raise UserError(
        f"{owner.name}: a cache of {num_blocks} blocks of {block_size} tokens does not fit in the "
        f"memory of {model.device}; {owner.cache_advice}"
    )
