"""A static batch: rows that start together and advance on the device until all are done."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..cache import BLOCK_SIZE
from ..executor import Executor, Owner
from ..graphs import decode_shape, row_bucket
from ..inputs import MAX_STEP_TOKENS, GraphKey, SamplingOps, StepInputs
from ..resident import MAX_STOP_TOKENS, RowOptions
from ..results import StepHandle, StepResult
from ..step_model import StepModel

logger = logging.getLogger("llmfast")

OWNER = Owner(
    "generate",
    cache_advice="generate fewer or shorter sequences at once",
    graph_advice="generate fewer at once",
)


@dataclass(frozen=True)
class BatchSampling:
    """How tokens are sampled on the device, the same for every row of a batch."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    min_new_tokens: int = 0  # no stop token is chosen before
    pad_token: int = 0  # the token of a row after its stop token

    @property
    def ops(self) -> SamplingOps:
        """The parts of sampling that a step needs."""
        return SamplingOps(
            draws=self.temperature > 0,
            filters=self.temperature > 0,
            repetition_penalty=self.repetition_penalty != 1.0,
            suppress_stop_tokens=self.min_new_tokens > 0 and bool(self.stop_tokens),
        )


class StaticBatch:
    """Runs one batch of sequences after the other on an :class:`Executor` of its own.

    Not for several threads at once: :class:`.override.GenerateOverride` holds a lock around a call.
    """

    def __init__(
        self,
        model: StepModel,
        *,
        max_rows: int,
        max_length: int,
        num_blocks: int | None = None,
        use_graphs: bool | None = None,
    ) -> None:
        """
        Args:
            model: its blocks share weights with the user's model.
            max_rows: sequences of a batch.
            max_length: tokens of a sequence, prompt and output.
            num_blocks: blocks of the cache; None: enough for every row at its longest.
            use_graphs: None: where the device has graphs.

        Raises:
            UserError: the cache does not fit into the GPU's memory.
        """
        rows, width = row_bucket(max_rows), -(-max_length // BLOCK_SIZE)
        self.model, self.device = model, model.device
        self.max_rows, self.max_length = rows, width * BLOCK_SIZE
        self.num_blocks = rows * width if num_blocks is None else num_blocks
        self.executor = Executor(
            model,
            num_blocks=self.num_blocks,
            max_rows=rows,
            max_length=self.max_length,
            owner=OWNER,
            fixed_shapes=[decode_shape(rows, width)],
            use_graphs=use_graphs,
        )
        self.warm = False  # after a warm-up: kernels compiled later are logged
        self._rows = 0
        self._blocks: list[list[int]] = []

    def has_room(self, rows: int, length: int, blocks: int) -> bool:
        """Return whether a batch of ``rows`` fits, with ``blocks`` of the cache in all."""
        return (
            row_bucket(rows) <= self.max_rows
            and length <= self.max_length
            and blocks <= self.num_blocks
        )

    def close(self) -> None:
        """Free the graphs and the cache; the batch cannot be used afterwards."""
        self.executor.close()

    def key_for(self, rows: int, sampling: BatchSampling | None) -> GraphKey:
        """Return the key of the steps that advance ``rows`` rows; None: the host samples."""
        shape = decode_shape(row_bucket(rows), self.executor.width)
        return GraphKey(shape, None if sampling is None else sampling.ops, self_advancing=True)

    @torch.no_grad()
    def start(
        self,
        input_ids: torch.Tensor,
        lengths: Sequence[int],
        max_new_tokens: int,
        sampling: BatchSampling | None,
        seeds: torch.Tensor | None = None,
        *,
        also_seen: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> StepHandle:
        """Prefill a batch, and sample the first token of each row.

        Args:
            input_ids: int64 [tokens], the prompts end to end.
            lengths: tokens of each prompt, at least 1.
            max_new_tokens: no row will be stepped further.
            sampling: None: the caller chooses each token from the handle's ``logits`` and gives
                it to :meth:`feed`.
            seeds: int64 [rows]; required unless greedy.
            also_seen: rows and tokens that the repetition penalty counts beside the prompts.
        """
        assert not self._rows, "the batch before was not ended"
        options = sampling or BatchSampling()
        stops = tuple(t for t in options.stop_tokens if 0 <= t < self.model.vocabulary)
        if len(stops) > MAX_STOP_TOKENS:
            raise ValueError(f"runner: wants at most {MAX_STOP_TOKENS} stop tokens, got {stops}")
        key = self.key_for(len(lengths), sampling)
        self.executor.prepare_rows(key)
        known = self._compiled()
        self._rows = len(lengths)
        for length in lengths:
            self._blocks.append(self.executor.cache.allocate(length + max_new_tokens))
        table = np.zeros((self._rows, self.executor.width), np.int64)
        for row, blocks in enumerate(self._blocks):
            table[row, : len(blocks)] = blocks
        first_position = self.executor.admit(max(lengths) + max_new_tokens)
        input_ids = input_ids.cpu()
        logits = self._prefill(input_ids.numpy(), lengths, table, first_position)
        handle = self.executor.start_rows(
            self._first_step(key, lengths, table, options, seeds),
            logits,
            RowOptions(
                first_position=first_position,
                repetition_penalty=options.repetition_penalty,
                stop_tokens=stops,
                min_new_tokens=options.min_new_tokens,
                pad_token=options.pad_token,
            ),
            self._seen(key, input_ids, lengths, also_seen),
        )
        new = self._compiled() - known
        if self.warm and new:
            names = ", ".join(new.elements())
            logger.warning("llmfast: compiled in the middle of a call: %s", names)
        return handle

    def step(self) -> StepHandle:
        """Put the latest token of each row into the cache, and sample the next one."""
        return self.executor.advance()

    def collect(self, handle: StepHandle) -> StepResult:
        """Wait for the tokens of a step; rows that are done have the pad."""
        return self.executor.collect(handle)

    def feed(self, tokens: torch.Tensor) -> None:
        """Set the tokens that the host chose: int64 [rows].

        A token outside the vocabulary, such as the pad of a row that is done, runs as token 0.
        """
        known = (tokens >= 0) & (tokens < self.model.vocabulary)
        self.executor.feed(torch.where(known, tokens, 0))

    def end(self) -> None:
        """Drop the batch: every block is free again."""
        for blocks in self._blocks:
            self.executor.cache.free(blocks)
        self._blocks = []
        self._rows = 0
        self.executor.end_rows()

    def _prefill(
        self, ids: np.ndarray, lengths: Sequence[int], table: np.ndarray, first_position: int
    ) -> torch.Tensor:
        """Prefill all prompts, MAX_STEP_TOKENS per step. Return the logits of their last tokens."""
        bounds = np.concatenate(([0], np.cumsum(lengths)))  # each row's place in the flat tokens
        total, parts = int(bounds[-1]), []
        for first in range(0, total, MAX_STEP_TOKENS):
            until = min(first + MAX_STEP_TOKENS, total)
            # the rows that begin before the step's end, and end after its beginning
            row = int(np.searchsorted(bounds, first, side="right")) - 1
            stop = int(np.searchsorted(bounds, until - 1, side="right"))
            # the tokens of each of these rows that are in this step
            begin = np.maximum(bounds[row:stop], first) - bounds[row:stop]
            end = np.minimum(bounds[row + 1 : stop + 1], until) - bounds[row:stop]
            counts = end - begin
            complete = int((bounds[row + 1 : stop + 1] <= until).sum())  # all but perhaps the last
            inputs = self.executor.new_step(
                num_tokens=until - first,
                num_rows=len(counts),
                max_query_len=int(counts.max()),
                num_prompts=len(counts),  # one attention kernel for all of them
                max_context_len=int(end.max()),
                num_logits=complete,
                sampling=None,
                width=self.executor.width,  # the same stride in every call: one kernel variant
            )
            ends = inputs.place(
                begin,
                counts,
                [table[row:stop]],
                block_size=BLOCK_SIZE,
                first_position=first_position,
            )
            inputs.arrays["token_ids"][: until - first] = ids[first:until]
            inputs.arrays["logit_tokens"][:complete] = ends[:complete] - 1
            logits = self.executor.launch(inputs).logits
            if complete:
                assert logits is not None
                parts.append(logits.clone() if inputs.captured and total > until else logits)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _first_step(
        self,
        key: GraphKey,
        lengths: Sequence[int],
        table: np.ndarray,
        options: BatchSampling,
        seeds: torch.Tensor | None,
    ) -> StepInputs:
        """Return the inputs that rows start from, whose prompts are in the cache."""
        rows, inputs = len(lengths), StepInputs(key, pinned=self.device.type == "cuda")
        context = np.array(lengths, np.int64)
        one = np.ones(rows, np.int64)
        inputs.place(context - one, one, [table], block_size=BLOCK_SIZE, first_position=0)
        arrays = inputs.arrays
        arrays["logit_tokens"][:] = np.arange(key.shape.rows)
        arrays["temperature"][:] = options.temperature
        arrays["top_k"][:] = options.top_k
        arrays["top_p"][:] = options.top_p
        arrays["min_p"][:] = options.min_p
        if seeds is not None:
            arrays["seeds"][:rows] = seeds.cpu().numpy()
        return inputs

    def _seen(
        self,
        key: GraphKey,
        input_ids: torch.Tensor,
        lengths: Sequence[int],
        also: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Return the places of the tokens that a repetition penalty counts; empty without one."""
        if key.sampling is None or not key.sampling.repetition_penalty:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        rows = np.repeat(np.arange(len(lengths)), lengths)
        pairs = [(torch.from_numpy(rows), input_ids), *([] if also is None else [also])]
        places = []
        for row, token in pairs:
            known = (token >= 0) & (token < self.model.vocabulary)  # padding may be any number
            places.append((row * self.model.vocabulary + token)[known])
        return torch.cat(places)

    def _compiled(self) -> Counter[str]:
        if self.device.type != "cuda":
            return Counter()
        from llmfast_kernels.common.launch import compilations  # imports Triton, CPUs may lack it

        return compilations()
