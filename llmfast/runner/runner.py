"""The runner: a batch of sequences, from prompts to tokens, one step at a time.

It owns everything on the GPU that changes: the paged cache, the state of each row, the CUDA graphs.
A step of decoding reads and writes that state on the device alone, so the host only replays it.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from llmfast_kernels import begin_step, end_step, sample_tokens
from llmfast_kernels.quantized_linear import workspace_bytes

from ..errors import UserError
from .cache import BLOCK_SIZE, PagedCache
from .capture import StepGraph, capture, held_memory, new_pool
from .inputs import StepTensors
from .model import StepModel
from .step import Step

logger = logging.getLogger("llmfast")

PREFILL_TOKENS = 4096  # of one step: more take memory for activations and gain no speed
MAX_STOP_TOKENS = 16


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, the same for every row of a call."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    min_new_tokens: int = 0  # before these no stop token is chosen
    pad_token: int = 0  # what a row yields after its stop token


@dataclass(frozen=True)
class Plan:
    """What a graph is captured for."""

    rows: int
    draw: bool  # not greedy
    penalise: bool
    hold_back: bool  # stop tokens are barred at first
    sample: bool  # False: the step ends at the logits, the host chooses


class _State:
    """A row's state, in buffers that graphs read and write; a row without a context is idle."""

    def __init__(self, rows: int, max_blocks: int, device: torch.device) -> None:
        def full(value: float, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.full((rows, *shape), value, dtype=dtype, device=device)

        self.tokens = full(0, torch.int64)  # the latest of each row, not in the cache yet
        self.host_tokens = full(0, torch.int64)  # for the host: a token, the pad or a failure
        self.context = full(0, torch.int32)  # tokens in the cache; 0: idle
        self.generated = full(0, torch.int32)
        self.first_row = full(0, torch.int64)  # of the rotary tables
        self.block_table = full(-1, torch.int32, max_blocks)
        self.temperature = full(1.0, torch.float32)
        self.top_k = full(0, torch.int32)
        self.top_p = full(1.0, torch.float32)
        self.min_p = full(0.0, torch.float32)
        self.repetition = full(1.0, torch.float32)
        self.seeds = full(0, torch.int64)
        self.stop_tokens = torch.full((MAX_STOP_TOKENS,), -1, device=device)
        self.pad = torch.zeros((), dtype=torch.int64, device=device)
        self.min_new = torch.zeros((), dtype=torch.int32, device=device)
        self.numbers = torch.arange(rows + 1, device=device)
        self.starts = self.numbers.to(torch.int32)


class Runner:
    """Runs one :class:`BlockModel` on batches of sequences.

    Not for several threads at once; :mod:`.generate` holds a lock around a call.
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
            num_blocks: of the cache; None: enough for every row at its longest.
            use_graphs: None: on a GPU.

        Raises:
            UserError: the cache does not fit into the GPU's memory.
        """
        self.model = model
        self.device = model.device
        self.use_graphs = model.device.type == "cuda" if use_graphs is None else use_graphs
        self.max_rows = _bucket(max_rows)
        self.max_blocks = -(-max_length // BLOCK_SIZE)
        self.max_length = self.max_blocks * BLOCK_SIZE
        if num_blocks is None:
            num_blocks = self.max_rows * self.max_blocks
        fits = False
        with suppress(RuntimeError):  # the allocator's; a traceback would keep what it got so far
            self.cache = PagedCache(model.cache_shapes, num_blocks, model.dtype, model.device)
            fits = True
        if not fits:
            raise UserError(
                f"generate: a cache of {num_blocks} blocks of {BLOCK_SIZE} tokens does not fit in "
                f"the memory of {self.device}; generate fewer or shorter sequences at once"
            )
        model.resize(self.max_length)
        self._state = _State(self.max_rows, self.max_blocks, model.device)
        self._seen: torch.Tensor | None = None  # bool [rows, vocabulary], with penalties only
        self._logits: torch.Tensor | None = None  # of the latest step whose tokens the host chooses
        self._graphs: dict[Plan, StepGraph] = {}
        self._pool = new_pool() if self.use_graphs else None  # that the graphs share
        self.warm = False  # after a warm-up: what is compiled later is logged
        self._rows = 0
        self._blocks: list[list[int]] = []
        self._plan = Plan(1, False, False, False, True)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that the runner holds beside the model, by what they are for.

        ``penalties``: which tokens a row has had. ``workspace``: what libraries and
        the allocator keep for the next step.
        """
        graphs = workspace = 0
        if self._pool is not None:
            graphs, workspace = held_memory(self.device, self._pool)
            workspace += workspace_bytes(self.device)
        state = [*vars(self._state).values(), *([] if self._logits is None else [self._logits])]
        return {
            "cache": self.cache.nbytes,
            "state": sum(t.nbytes for t in state),
            "penalties": 0 if self._seen is None else self._seen.nbytes,
            "graphs": graphs,
            "workspace": workspace,
        }

    @property
    def num_graphs(self) -> int:
        """How many plans have a graph."""
        return len(self._graphs)

    def has_room(self, rows: int, length: int, blocks: int) -> bool:
        """Whether a batch of ``rows`` fits, ``blocks`` of the cache in all."""
        return (
            _bucket(rows) <= self.max_rows
            and length <= self.max_length
            and blocks <= self.cache.num_blocks
        )

    def close(self) -> None:
        """Let go of the graphs and the cache; the runner is of no use after."""
        self._graphs.clear()
        self._seen = self._logits = None
        self.cache.close()

    # ---------------------------------------------------------------------------- one batch

    @torch.no_grad()
    def start(
        self,
        input_ids: torch.Tensor,
        lengths: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        seeds: torch.Tensor | None = None,
        *,
        also_seen: tuple[torch.Tensor, torch.Tensor] | None = None,
        host_samples: bool = False,
    ) -> None:
        """Prefill a batch, and choose the first token of each row.

        Args:
            input_ids: int64 [tokens], the prompts end to end, on the model's device.
            lengths: tokens of each prompt, at least 1.
            max_new_tokens: no row will be stepped further.
            seeds: int64 [rows]; required unless greedy.
            also_seen: rows and tokens that the repetition penalty counts beside the prompts.
            host_samples: leave the choice to the caller, who finds the logits in
                :meth:`logits` and answers with :meth:`feed`.
        """
        assert not self._rows, "the batch before was not ended"
        rows = len(lengths)
        stops = [t for t in sampling.stop_tokens if 0 <= t < self.model.vocabulary]
        if len(stops) > MAX_STOP_TOKENS:
            raise ValueError(f"runner: wants at most {MAX_STOP_TOKENS} stop tokens, got {stops}")
        self._plan = Plan(
            rows=_bucket(rows),
            draw=sampling.temperature > 0,
            penalise=sampling.repetition_penalty != 1.0,
            hold_back=sampling.min_new_tokens > 0 and bool(stops),
            sample=not host_samples,
        )
        self.prepare(self._plan)
        known = self._compiled()
        self._rows = rows
        state = self._state
        for length in lengths:
            self._blocks.append(self.cache.allocate(length + max_new_tokens))
        longest = max(lengths) + max_new_tokens
        table = [blocks + [-1] * (self.max_blocks - len(blocks)) for blocks in self._blocks]
        state.block_table[:rows] = torch.tensor(table, dtype=torch.int32, device=self.device)
        state.first_row.fill_(self.model.admit(longest))
        state.temperature.fill_(sampling.temperature)
        state.top_k.fill_(sampling.top_k)
        state.top_p.fill_(sampling.top_p)
        state.min_p.fill_(sampling.min_p)
        state.repetition.fill_(sampling.repetition_penalty)
        if seeds is not None:
            state.seeds[:rows] = seeds
        stops += [-1] * (MAX_STOP_TOKENS - len(stops))
        state.stop_tokens.copy_(torch.tensor(stops, device=self.device))
        state.pad.fill_(sampling.pad_token)
        state.min_new.fill_(sampling.min_new_tokens)
        state.generated.zero_()
        counts = torch.tensor(lengths, device=self.device)
        if self._seen is not None and self._plan.penalise:
            of_row = torch.repeat_interleave(counts, output_size=len(input_ids))
            self._seen[:rows] = False
            self._seen[of_row, input_ids] = True
            if also_seen is not None:
                self._seen[also_seen] = True
        logits = self._prefill(input_ids, lengths)
        self._choose(logits, counts.to(torch.int32), self._plan, rows)
        new = self._compiled() - known
        if self.warm and new:
            logger.warning("llmfast: compiled in the middle of a call: %s", ", ".join(new))

    @torch.no_grad()
    def step(self) -> None:
        """Put the latest token of each row into the cache, and choose the next."""
        graph = self._graphs.get(self._plan)
        if graph is not None:
            graph.replay()
        else:
            self._decode(self._plan)

    def host_tokens(self) -> torch.Tensor:
        """Return the latest step's tokens, int64 [rows]; rows that are done have the pad.

        A number below ``NO_TOKEN`` says that the row had no token to choose, see
        :func:`llmfast_kernels.end_step`.
        """
        return self._state.host_tokens[: self._rows]

    def logits(self) -> torch.Tensor:
        """``[rows, vocabulary]`` of the latest step, with ``host_samples``."""
        assert self._logits is not None
        return self._logits[: self._rows]

    def feed(self, tokens: torch.Tensor) -> None:
        """Answer a step with ``host_samples``: int64 [rows].

        A token outside the vocabulary, such as the pad of a row that is done, runs as token 0.
        """
        known = (tokens >= 0) & (tokens < self.model.vocabulary)
        self._state.tokens[: self._rows] = torch.where(known, tokens, 0)

    def end(self) -> None:
        """Let go of the batch: every block is free again, every row idle."""
        for blocks in self._blocks:
            self.cache.free(blocks)
        self._blocks = []
        self._rows = 0
        self._state.context.zero_()
        self._state.block_table.fill_(-1)

    # ------------------------------------------------------------------------------- steps

    def _prefill(self, input_ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Write all prompts to the cache, some thousand tokens a step; logits of their last."""
        device, state = self.device, self._state
        last: list[torch.Tensor] = []
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        row = 0
        for first in range(0, starts[-1], PREFILL_TOKENS):
            until = min(first + PREFILL_TOKENS, starts[-1])
            while starts[row + 1] <= first:
                row += 1
            stop = row
            while stop < len(lengths) and starts[stop] < until:
                stop += 1
            # the part of each row from `row` to `stop` that this step has
            begin = [max(starts[r], first) - starts[r] for r in range(row, stop)]
            end = [min(starts[r + 1], until) - starts[r] for r in range(row, stop)]
            sizes = torch.tensor([e - b for b, e in zip(begin, end, strict=True)], device=device)
            count = until - first
            of_row = torch.repeat_interleave(sizes, output_size=count)
            bounds = torch.zeros(len(begin) + 1, dtype=torch.int32, device=device)
            bounds[1:] = sizes.cumsum(0)
            place = torch.arange(count, device=device)
            place += (torch.tensor(begin, device=device) - bounds[:-1])[of_row]
            table = state.block_table[row:stop]
            block = table[of_row, place // BLOCK_SIZE].long()
            step = _step(
                token_ids=input_ids[first:until],
                positions=place + state.first_row[row],
                slots=block * BLOCK_SIZE + place % BLOCK_SIZE,
                query_start=bounds,
                context_len=torch.tensor(end, dtype=torch.int32, device=device),
                block_table=table,
                max_query_len=max(e - b for b, e in zip(begin, end, strict=True)),
                max_context_len=max(end),
            )
            complete = [i for i, e in enumerate(end) if e == lengths[row + i]]
            wanted = (bounds[1:].long() - 1)[: len(complete)]  # all but perhaps the last row
            last.append(self.model(step, self.cache, wanted))
        return torch.cat(last)

    def _decode(self, plan: Plan) -> None:
        """One token of each row, read from the state and written to it. What a graph captures."""
        n, state = plan.rows, self._state
        table = state.block_table[:n]
        positions, slots, context_len = begin_step(
            state.context[:n], state.first_row[:n], table, block_size=BLOCK_SIZE
        )
        step = _step(
            token_ids=state.tokens[:n],
            positions=positions,
            slots=slots,
            query_start=state.starts[: n + 1],
            context_len=context_len,
            block_table=table,
            max_query_len=1,
        )
        logits = self.model(step, self.cache, state.numbers[:n])
        self._choose(logits, context_len, plan, n)

    def _choose(self, logits: torch.Tensor, context_len: torch.Tensor, plan: Plan, n: int) -> None:
        """Choose the tokens of ``n`` rows that have ``context_len`` tokens in the cache now."""
        state = self._state
        if not plan.sample:
            assert self._logits is not None
            self._logits[:n] = logits
            state.context[:n] = context_len
            return
        if plan.hold_back:
            early = (state.generated[:n] < state.min_new)[:, None]
            stops = torch.zeros_like(logits[0], dtype=torch.bool)
            stops.index_fill_(0, state.stop_tokens.clamp(min=0), True)  # -1 names token 0 too
            stops[0] = (state.stop_tokens == 0).any()
            logits = logits.masked_fill(early & stops, -torch.inf)
        sampled = sample_tokens(
            logits,
            temperature=state.temperature[:n] if plan.draw else None,
            top_k=state.top_k[:n] if plan.draw else None,
            top_p=state.top_p[:n] if plan.draw else None,
            min_p=state.min_p[:n] if plan.draw else None,
            repetition_penalty=state.repetition[:n] if plan.penalise else None,
            prompt_seen=self._seen[:n] if plan.penalise and self._seen is not None else None,
            seeds=state.seeds[:n] if plan.draw else None,
            positions=state.generated[:n] if plan.draw else None,
        )
        end_step(
            sampled.tokens,
            sampled.status,
            context_len,
            state.stop_tokens,
            state.pad,
            tokens=state.tokens[:n],
            host_tokens=state.host_tokens[:n],
            context=state.context[:n],
            generated=state.generated[:n],
            seen=self._seen[:n] if plan.penalise and self._seen is not None else None,
        )

    def _compiled(self) -> Counter[str]:
        if self.device.type != "cuda":
            return Counter()
        from llmfast_kernels.common.launch import compilations  # imports Triton, CPUs may lack it

        return compilations()

    # ------------------------------------------------------------------------------ graphs

    def prepare(self, plan: Plan) -> None:
        """Make what a plan needs, and capture its graph. The runner must be idle."""
        vocabulary = self.model.vocabulary
        if plan.penalise and self._seen is None:
            shape = (self.max_rows, vocabulary)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        if not plan.sample and self._logits is None:
            shape = (self.max_rows, vocabulary)
            self._logits = torch.zeros(shape, dtype=self.model.dtype, device=self.device)
        if not self.use_graphs or plan in self._graphs:
            return
        started = time.perf_counter()
        try:
            self._graphs[plan] = capture(lambda: self._decode(plan), self.device, self._pool)
        except torch.OutOfMemoryError as error:
            self._graphs.clear()
            self._pool = new_pool()  # one that no graph uses cannot be used again
            raise UserError(
                f"no memory left for a CUDA graph of {plan.rows} rows; generate fewer at once"
            ) from error
        except RuntimeError as error:
            if self.model.all_ours:
                raise
            self.use_graphs = False
            self._pool = None
            lines = str(error).splitlines() or [""]
            logger.warning("llmfast: steps run without CUDA graphs, since one raised: %s", lines[0])
            return
        finally:
            self._state.context.zero_()
        seconds = time.perf_counter() - started
        logger.info("llmfast: captured a step of %d rows in %.1f s", plan.rows, seconds)


def _step(*, max_query_len: int, max_context_len: int | None = None, **given: torch.Tensor) -> Step:
    """Return a step of the fields that its model reads."""
    names = [field.name for field in dataclasses.fields(StepTensors)]
    tensors: dict[str, Any] = dict.fromkeys(names, torch.empty(0)) | given
    return Step(**tensors, max_query_len=max_query_len, max_context_len=max_context_len)


def _bucket(rows: int) -> int:
    """The rows of the graph that a batch runs in: 1, 2, 4, 8, then multiples of 8, of 32."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 32
    return -(-rows // step) * step
