"""The executor: one model, its paged cache and its CUDA graphs; runs one step at a time.

It owns everything on the GPU that changes. It knows tokens, positions and blocks, but no requests:
callers describe a step in one host buffer and get back sampled tokens or logits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from llmfast_kernels.quantized_linear import workspace_bytes

from ..errors import UserError
from .cache import BLOCK_SIZE, PagedCache
from .graphs import CAPTURES, Replayable, StepGraphs
from .inputs import GraphKey, SamplingOps, StepInputs, StepShape, StepTensors, buffer_bytes, views
from .resident import ResidentRows, RowOptions
from .results import HostResults, StepHandle, StepResult
from .sampling import sample_rows
from .step import step_of
from .step_model import StepModel

logger = logging.getLogger("llmfast")


@dataclass(frozen=True)
class Owner:
    """The part of llmfast that an executor works for, as errors about memory name it."""

    name: str
    cache_advice: str  # what the user can do if the cache does not fit
    graph_advice: str  # or if there is no memory for a CUDA graph


class Executor:
    """Runs steps on the model's device, on a GPU most of them as CUDA graphs.

    A step either reads its inputs from one host buffer (:meth:`launch`), or advances rows that stay
    on the device (:meth:`start_rows`, :meth:`advance`). Not for several threads at once.
    """

    def __init__(
        self,
        model: StepModel,
        *,
        num_blocks: int | Sequence[int],
        max_rows: int,
        max_length: int,
        owner: Owner,
        block_size: int = BLOCK_SIZE,
        fixed_shapes: Iterable[StepShape] = (),
        use_graphs: bool | None = None,
    ) -> None:
        """
        Args:
            model: its blocks share weights with the user's model.
            num_blocks: blocks of the cache; a sequence: of each of its groups.
            max_rows: rows of a step at most.
            max_length: tokens of a row at most, with those in the cache.
            block_size: tokens per block.
            fixed_shapes: the shapes of steps that may be captured or advance on their own, or the
                largest of them: they share a buffer on the device.
            use_graphs: None: where the device has graphs.

        Raises:
            UserError: the cache does not fit into the device's memory.
        """
        self.model = model
        self.device = model.device
        self.max_rows, self.max_length = max_rows, max_length
        self.width = -(-max_length // block_size)  # blocks per row of the block table
        if use_graphs is None:
            use_graphs = self.device.type in CAPTURES
        self._graphs = StepGraphs(
            self.device, enabled=use_graphs, owner=owner.name, advice=owner.graph_advice
        )
        self.cache = _make_cache(model, num_blocks, block_size, owner)
        try:
            model.resize(max_length)
            # the tokens that the latest step sampled; their status, or the tokens for the host
            even = max_rows + max_rows % 2  # so that both rows begin at a multiple of 16 bytes
            self._sampled = torch.zeros(2, even, dtype=torch.int64, device=self.device)
            self.results = HostResults(self._sampled)
            self._logits: torch.Tensor | None = None  # written by graphs that end at the logits
            self._resident: ResidentRows | None = None
            self._rows_key: GraphKey | None = None  # key of the rows that advance
            self._rows_graph: Replayable | None = None
            self._num_resident = 0
            largest = max(map(buffer_bytes, fixed_shapes), default=0)
            self._buffer = torch.zeros(largest, dtype=torch.uint8, device=self.device)
        except BaseException:
            self.close()
            raise

    @property
    def asynchronous(self) -> bool:
        """True if :meth:`launch` returns before the step has run."""
        return self.device.type == "cuda"

    @property
    def waited(self) -> float:
        """Seconds that the host spent only waiting for steps."""
        return self.results.waited

    @property
    def use_graphs(self) -> bool:
        """True if steps are captured."""
        return self._graphs.enabled

    @property
    def num_graphs(self) -> int:
        """How many steps have been captured."""
        return len(self._graphs)

    # ------------------------------------------------------------------------------- steps

    def admit(self, length: int) -> int:
        """Return the first position of sequences that may reach ``length`` tokens.

        Must be called before the steps of such sequences: rotary tables are filled here.

        Raises:
            NotTraced: only some of the model's rotary tables depend on the length.
        """
        return self.model.admit(length)

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
        width: int | None = None,
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
            width: blocks per row of the table in a step without a graph; None: as many as the
                longest context takes.
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
            width = width or max(1, -(-max_context_len // self.cache.block_size))
            prompts = num_prompts if num_prompts < num_rows else None
            shape = StepShape(
                num_tokens,
                num_rows,
                width,
                num_logits,
                max_query_len,
                prompts,
                groups=self.cache.num_groups,
            )
            key = GraphKey(shape, sampling)
        return StepInputs(
            key,
            num_logits=num_logits,
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
            if key.sampling is None and self._logits is not None:
                handle.logits = self._logits[: inputs.num_logits]
        else:
            tensors = views(inputs.buffer.to(self.device, non_blocking=True), inputs.shape)
            logits = self._forward(tensors, inputs.shape, inputs.max_context_len)
            if count and key.sampling is not None:
                self._sample(logits[:count], tensors, key.sampling)
            if len(logits) > count:
                handle.logits = logits[count:]
        if count:
            self.results.send(handle)
        self.results.mark_end(handle)
        return handle

    def feed(self, tokens: torch.Tensor) -> None:
        """Set the tokens of the latest step's first rows, which the host chose: int64 ``[n]``."""
        self._sampled[0, : len(tokens)] = tokens.to(self._sampled)

    def collect(self, handle: StepHandle) -> StepResult:
        """Wait for a step and return the tokens that it sampled on the device."""
        return self.results.collect(handle)

    def _copy_blocks(self, inputs: StepInputs) -> None:
        if not inputs.shape.copies:
            return
        wanted = inputs.arrays["block_copies"]
        for group in range(self.cache.num_groups):
            copies = torch.from_numpy(wanted[wanted[:, 0] == group]).to(self.device)
            self.cache.copy(group, copies[:, 1], copies[:, 2])

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

    # ------------------------------------------------------------------------ resident rows

    def prepare_rows(self, key: GraphKey) -> None:
        """Allocate what self-advancing steps of ``key`` need, and capture one.

        Raises:
            UserError: the GPU has no memory left for the graph.
        """
        if self._resident is None:
            self._resident = ResidentRows(self.max_rows, self.model.vocabulary, self.device)
        self._resident.prepare(key.sampling)
        self.capture([key])

    @torch.no_grad()
    def start_rows(
        self,
        inputs: StepInputs,
        logits: torch.Tensor,
        options: RowOptions,
        seen: torch.Tensor,
    ) -> StepHandle:
        """Load rows whose prompts are in the cache, and sample the first token of each.

        Args:
            inputs: a step of a key that was prepared. Its ``context_len``, ``block_tables`` and
                sampling parameters count; the rows' tokens are not read.
            logits: ``[rows, vocabulary]`` of each prompt's last token.
            seen: places of the tokens that a repetition penalty counts: ``row * vocabulary +
                token``, int64.
        """
        key, count = inputs.key, len(logits)
        assert self._resident is not None, "the rows were not prepared"
        self._rows_key, self._rows_graph = key, self._graphs.get(key)
        self._num_resident = count
        self._upload(inputs)
        self._resident.load(options, seen.to(self.device))
        tensors = views(self._buffer, key.shape)
        self._choose(logits, tensors.context_len[:count], tensors, key)
        return self._rows_handle()

    @torch.no_grad()
    def advance(self) -> StepHandle:
        """Put the latest token of each row into the cache, and sample the next one."""
        assert self._rows_key is not None, "no rows were started"
        if self._rows_graph is not None:
            self._rows_graph.replay()
        else:
            self._advance(self._rows_key)
        return self._rows_handle()

    def end_rows(self) -> None:
        """Drop the rows that advance."""
        self._rows_key = self._rows_graph = None

    def _advance(self, key: GraphKey) -> None:
        """Run a self-advancing step over the fixed buffers."""
        tensors = views(self._buffer, key.shape)
        assert self._resident is not None
        step = self._resident.next_step(key, tensors, self._sampled[0], self.cache)
        logits = self.model(step, self.cache, tensors.logit_tokens)
        self._choose(logits, step.context_len, tensors, key)

    def _choose(
        self, logits: torch.Tensor, context_len: torch.Tensor, tensors: StepTensors, key: GraphKey
    ) -> None:
        """Sample the next token of each row, or leave that to the host."""
        assert self._resident is not None
        if key.sampling is None:
            self._keep_logits(logits)
            tensors.context_len[: len(logits)] = context_len
        else:
            self._resident.sample(logits, context_len, tensors, self._sampled, key.sampling)

    def _rows_handle(self) -> StepHandle:
        assert self._rows_key is not None
        handle = StepHandle(self._num_resident, self_advancing=True)
        if self._rows_key.sampling is None:
            assert self._logits is not None
            handle.num_sampled = 0
            handle.logits = self._logits[: self._num_resident]
        else:
            self.results.send(handle)
            self.results.mark_end(handle)
        return handle

    # ------------------------------------------------------------------------------ graphs

    def capture(self, keys: Sequence[GraphKey]) -> None:
        """Capture steps, their shapes among ``fixed_shapes``; no sequence may be running.

        Raises:
            UserError: the GPU has no memory left for them.
        """
        if self._logits is None and any(key.sampling is None for key in keys):
            shape = (self.max_rows, self.model.vocabulary)
            self._logits = torch.zeros(shape, dtype=self.model.dtype, device=self.device)
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
        if key.self_advancing:
            self._advance(key)
            return
        tensors = views(self._buffer, key.shape)
        logits = self._forward(tensors, key.shape)
        if key.sampling is None:
            self._keep_logits(logits)
        else:
            self._sample(logits, tensors, key.sampling)

    def _keep_logits(self, logits: torch.Tensor) -> None:
        assert self._logits is not None
        self._logits[: len(logits)] = logits

    # ------------------------------------------------------------------------------ memory

    @property
    def memory(self) -> dict[str, int]:
        """Bytes held beside the model, by purpose.

        ``penalties``: which tokens a row has had. ``workspace``: what libraries and the allocator
        keep for the next step.
        """
        graphs, workspace = self._graphs.held_memory()
        if graphs or workspace:
            workspace += workspace_bytes(self.device)
        resident, counts = self._resident, None
        state = [self._sampled, self._buffer, *([] if self._logits is None else [self._logits])]
        size = sum(tensor.nbytes for tensor in state)
        if resident is not None:
            size, counts = size + resident.nbytes, resident.counts
        return {
            "cache": self.cache.nbytes,
            "state": size,
            "penalties": 0 if counts is None else counts.nbytes,
            "graphs": graphs,
            "workspace": workspace,
        }

    def close(self) -> None:
        """Free the graphs and the cache, and drop the model; only properties may be read then."""
        self._graphs.clear()
        self._resident = self._logits = self._rows_graph = None
        self.cache.close()
        vars(self).pop("model", None)  # it has packed weights, and a user may hold a closed engine
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _make_cache(
    model: StepModel, num_blocks: int | Sequence[int], block_size: int, owner: Owner
) -> PagedCache:
    with suppress(RuntimeError):  # the allocator's; its traceback would keep what was allocated
        return PagedCache(model.layer_caches, num_blocks, model.device, block_size)
    first = num_blocks if isinstance(num_blocks, int) else num_blocks[0]
    raise UserError(
        f"{owner.name}: a cache of {first} blocks of {block_size} tokens does not fit in the "
        f"memory of {model.device}; {owner.cache_advice}"
    )
