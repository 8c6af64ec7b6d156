"""The model and its paged cache: runs the steps that the scheduler plans."""

from __future__ import annotations

import logging
import time
from collections import abc
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from transformers import PreTrainedModel

from llmfast_kernels import sample_tokens

from ..errors import UserError
from ..model.costs import kv_bytes
from ..model.patch import evaluating
from ..model.sizes import ModelSizes
from ..model.trace import NotTraced
from ..runner.cache import PagedCache
from ..runner.model import StepModel, make_step_model
from ..runner.step import Chunk, make_step
from .fill import Filler
from .graphs import MIXED_TOKENS, StepGraphs, graph_sizes
from .inputs import Inputs, Size, buffer_bytes, step_of, views
from .penalties import Counts
from .request import Answer, Sequence
from .sampler import SampledToken, choose, drawing
from .sampling_params import SamplingParams
from .scheduler import SchedulerOutput

logger = logging.getLogger("llmfast")

GRAPHS: dict[str, type[StepGraphs]] = {"cuda": StepGraphs}  # where steps can be captured
WARM_PROMPTS = 15  # of a step: sampling lays out many rows in another way than few
CPU_CACHE_BYTES = 2**30  # no GPU's memory is there to be filled
_SAMPLING_COPIES = 8  # of the logits in float32: what a choice with every parameter may hold


@dataclass(eq=False)
class Flight:
    """A step that was started."""

    rows: dict[Sequence, int]  # of those whose token it chooses
    scored: dict[Sequence, int]  # of how many tokens of a sequence there are logits
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # of these, end to end
    choices: list[SampledToken] = field(default_factory=list)
    result: torch.Tensor | None = None  # tokens and status, once it is done
    done: torch.cuda.Event | None = None


class Executor:
    """Runs steps on the model's device; on a GPU most of them as CUDA graphs."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_model_len: int | None,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        utilization: float,
        block_size: int,
        num_blocks: int | None,
        chunked: bool = True,
        eager: bool = False,
    ) -> None:
        """Arguments and errors are those of :class:`.llm.LLM`."""
        longest = _longest(model, max_model_len)
        if not chunked:  # a prompt of any length is one step
            max_num_batched_tokens = max(max_num_batched_tokens, longest)
        name = type(model).__name__
        try:
            with torch.inference_mode(False), evaluating(model):
                self._model = make_step_model(model)
        except NotTraced as error:
            raise UserError(f"LLM: {name} cannot be run: {error}") from None
        try:
            if num_blocks is None:
                num_blocks = count_blocks(
                    self._model,
                    block_size=block_size,
                    utilization=utilization,
                    max_model_len=longest,
                    max_num_seqs=max_num_seqs,
                    max_num_batched_tokens=max_num_batched_tokens,
                    eager=eager,
                )
            if max_model_len is None:
                longest = min(longest, num_blocks * block_size)
            self._model.resize(longest)
            # one choice for all requests, so that they can share blocks
            self._first_row = self._model.admit(longest)
            self.cache = _make_cache(self._model, num_blocks, block_size)
            logger.info("llmfast: a cache of %d blocks of %d tokens", num_blocks, block_size)
            self.num_blocks, self.max_model_len = num_blocks, longest
            width = -(-longest // block_size)
            sizes = graph_sizes(max_num_seqs, max_num_batched_tokens, width)
            self._make_buffers(max_num_seqs, width, [] if eager else sizes)
            if self.asynchronous:
                self.warm_up(max_num_seqs, max_num_batched_tokens)
        except BaseException as error:
            self._give_back(vars(self).get("cache"))
            if isinstance(error, NotTraced):
                raise UserError(f"LLM: {name} cannot be run: {error}") from None
            raise
        self.vocabulary = self._model.vocabulary

    def _make_buffers(self, rows: int, width: int, sizes: list[Size]) -> None:
        """What graphs read and write, and the graphs of ``sizes``; rows of ``width`` blocks."""
        device = self._model.device
        self.device = device
        self.waited = 0.0  # seconds in which the host did nothing but wait for steps
        # of the latest step: the tokens that were chosen, and their status
        self._chosen = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self._sampled = self._chosen[0]
        self._counts = Counts(rows)
        self._filler = Filler(
            rows,
            width,
            block_size=self.cache.block_size,
            first_row=self._first_row,
            pinned=device.type == "cuda",
        )
        self._graphs: StepGraphs | None = None
        graphs = GRAPHS.get(device.type)
        if graphs is not None and sizes:
            largest = max(map(buffer_bytes, sizes))
            self._buffer = torch.zeros(largest, dtype=torch.uint8, device=device)
            self._graphs = graphs(self._fixed_step, self._make_idle, device, sizes)

    def warm_up(self, max_rows: int, max_tokens: int) -> None:
        """Run steps without graphs, so that none compiles in front of a request.

        What they leave in the cache is not read by anybody.
        """
        ways = (SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=8))
        small = min(MIXED_TOKENS, max_tokens)
        graphs, self._graphs = self._graphs, None
        try:
            for tokens, prompts, params in (
                (max_tokens, 1, ways[0]),
                *((small, 1, params) for params in ways),
                *((small, WARM_PROMPTS, params) for params in ways),
            ):
                plan = self._plan_of_prompts(tokens, prompts, max_rows)
                answers = [
                    Answer(0, sequence, params, 0, frozenset())
                    for sequence in plan.num_scheduled_tokens
                ]
                if answers:
                    self.collect(self.launch(plan, answers, None))
        finally:
            self._graphs = graphs

    def _plan_of_prompts(self, tokens: int, prompts: int, max_rows: int) -> SchedulerOutput:
        """A step of ``tokens`` tokens, as far as rows and blocks reach: one sequence that decodes,
        and so many prompts, or more if they would be too long.
        """
        plan, used = SchedulerOutput(), 0
        longest = max(1, min(self.max_model_len, -(-tokens // prompts)))
        while tokens and len(plan.num_scheduled_tokens) < max_rows:
            decodes = not plan.num_scheduled_tokens  # the first one
            count = 1 if decodes else min(tokens, longest)
            sequence = Sequence([0] * (count + decodes), count, count + 2, computed=int(decodes))
            blocks = -(-len(sequence.tokens) // self.cache.block_size)
            if used + blocks > self.num_blocks:
                break
            sequence.blocks = list(range(used, used + blocks))
            used += blocks
            tokens -= count
            plan.num_scheduled_tokens[sequence] = count
        return plan

    @property
    def asynchronous(self) -> bool:
        """Whether :meth:`launch` returns before the step has run."""
        return self.device.type == "cuda"

    def launch(
        self,
        plan: SchedulerOutput,
        answers: abc.Sequence[Answer],
        previous: Flight | None,
        scored: dict[Sequence, int] | None = None,
    ) -> Flight:
        """Start a step; on a GPU this returns before it has run.

        Args:
            plan: what the step computes.
            answers: of the plan's sequences whose next token is to be chosen, in its order.
            previous: the step that was started before, if the tokens it chooses may be unknown.
            scored: of some of the plan's sequences, of how many first tokens logits are wanted.

        Returns:
            What :meth:`collect` takes.
        """
        self._copy_blocks(plan.block_copies)
        plain = all(answer.sampled_on_device for answer in answers)
        counts = plan.num_scheduled_tokens.values()
        prompts = sum(count > 1 for count in counts)
        rows = {answer.sequence: row for row, answer in enumerate(answers)}
        flight = Flight(rows, scored or {})
        graph = None
        if plain and not scored and self._graphs is not None:
            graph = self._graphs.get(sum(counts), len(counts), prompts)
        if graph is not None:
            buffer = self._fill(graph.size, plan, answers, previous)
            self._buffer[: len(buffer)].copy_(buffer, non_blocking=True)
            graph.replay()
        else:
            longest = max(len(sequence.blocks) for sequence in plan.num_scheduled_tokens)
            size = Size(sum(counts), len(counts), longest, prompts)
            buffer = self._fill(size, plan, answers, previous)
            inputs = views(buffer.to(self._model.device, non_blocking=True), size)
            apart = prompts if prompts < len(counts) else None
            step = step_of(inputs, self._sampled, max(counts), apart)
            step.max_context_len = max(s.computed + n for s, n in plan.num_scheduled_tokens.items())
            wanted = inputs.last[: len(answers)]
            if scored:
                wanted = torch.cat((wanted, self._scored_rows(plan, scored)))
            logits = self._model(step, self.cache, wanted)
            logits, flight.logits = logits[: len(answers)], logits[len(answers) :]
            if not plain:
                flight.choices = choose(logits, answers, self._counts)
                tokens = torch.tensor([choice.token for choice in flight.choices])
                self._sampled[: len(answers)] = tokens.to(self._sampled)
            elif answers:
                self._draw(logits, inputs, *drawing(answers))
        if plain and answers:
            flight.result = self._results()
        if self._model.device.type == "cuda":
            flight.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            flight.done.record()
        return flight

    def collect(self, flight: Flight) -> list[SampledToken]:
        """Wait for a step, and give what was chosen for each of its answers."""
        if flight.done is not None:
            started = time.perf_counter()
            flight.done.synchronize()
            self.waited += time.perf_counter() - started
        if flight.result is not None:
            tokens, status = flight.result[:, : len(flight.rows)].tolist()
            flight.choices = [
                SampledToken(*row, None, []) for row in zip(tokens, status, strict=True)
            ]
        return flight.choices

    def _scored_rows(self, plan: SchedulerOutput, scored: dict[Sequence, int]) -> torch.Tensor:
        rows: list[int] = []
        starts = accumulate(plan.num_scheduled_tokens.values(), initial=0)
        for sequence, start in zip(plan.num_scheduled_tokens, starts, strict=False):
            rows += range(start, start + scored.get(sequence, 0))
        return torch.tensor(rows, device=self.device)

    def _copy_blocks(self, copies: abc.Sequence[tuple[int, int]]) -> None:
        if copies:
            source, target = torch.tensor(copies, device=self._model.device).T
            for tensor in (*self.cache.keys, *self.cache.values):
                tensor[target] = tensor[source]

    def _results(self) -> torch.Tensor:
        """What the latest step has chosen, of all rows, on its way to the host."""
        if self._chosen.device.type != "cuda":
            return self._chosen.clone()
        result = torch.empty(self._chosen.shape, dtype=self._chosen.dtype, pin_memory=True)
        return result.copy_(self._chosen, non_blocking=True)

    def _fill(
        self,
        size: Size,
        plan: SchedulerOutput,
        answers: abc.Sequence[Answer],
        previous: Flight | None,
    ) -> torch.Tensor:
        """The buffer of a step, on the host; rows past the plan's are idle."""
        rows = {} if previous is None else previous.rows
        return self._filler.fill(size, plan.num_scheduled_tokens, answers, rows)

    def _draw(self, logits: torch.Tensor, inputs: Inputs, draws: bool, filters: bool) -> None:
        """Choose the tokens of plain rows."""
        n = len(logits)
        sampled = sample_tokens(
            logits,
            temperature=inputs.temperature[:n] if draws else None,
            top_k=inputs.top_k[:n] if filters else None,
            top_p=inputs.top_p[:n] if filters else None,
            min_p=inputs.min_p[:n] if filters else None,
            seeds=inputs.seeds[:n] if draws else None,
            positions=inputs.numbers[:n] if draws else None,
        )
        self._chosen[0, :n] = sampled.tokens
        self._chosen[1, :n] = sampled.status

    def _make_idle(self, size: Size) -> None:
        """Let the buffer say that every row of a step of ``size`` is idle."""
        buffer = self._fill(size, SchedulerOutput(), [], None)
        self._buffer[: len(buffer)].copy_(buffer)

    def _fixed_step(self, size: Size) -> None:
        """A step over fixed buffers, of tokens chosen by the sampler alone: what a graph captures.

        Every row is drawn with all filters, whose values say what they keep: that costs little.
        """
        inputs = views(self._buffer, size)
        longest = size.tokens if size.prompts else 1
        step = step_of(inputs, self._sampled, longest, size.prompts or None)
        self._draw(self._model(step, self.cache, inputs.last), inputs, True, True)

    def close(self) -> None:
        """Let go of the cache, and of what was changed of the user's model."""
        device = self._model.device
        self._counts = Counts(0)
        self._give_back(self.cache)
        del self._model
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _give_back(self, cache: PagedCache | None) -> None:
        """Free graphs and cache; then the user's model, whose dense weights need that memory."""
        self._graphs = None
        if cache is not None:
            cache.keys.clear()  # whoever still has the cache, has no memory of it
            cache.values.clear()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        self._model.restore()


def _longest(model: PreTrainedModel, wanted: int | None) -> int:
    made_for = ModelSizes.of(model).context_length
    if made_for is not None and wanted is not None and wanted > made_for:
        raise UserError(f"LLM: max_model_len is {wanted}; the model was made for {made_for} tokens")
    longest: int = wanted or made_for or 2048
    return longest


def _make_cache(model: StepModel, num_blocks: int, block_size: int) -> PagedCache:
    try:
        return PagedCache(model.cache_shapes, num_blocks, model.dtype, model.device, block_size)
    except RuntimeError:  # the allocator's
        raise UserError(
            f"LLM: a cache of {num_blocks} blocks of {block_size} tokens does not fit in the "
            f"memory of {model.device}; lower num_blocks or gpu_memory_utilization"
        ) from None


def count_blocks(
    model: StepModel,
    *,
    block_size: int,
    utilization: float,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    eager: bool = False,
) -> int:
    """Blocks that fit beside the weights and the largest step.

    On a GPU the largest step is run once and its peak taken from ``utilization`` of all memory,
    twice unless all steps are eager, since a CUDA graph of it has memory of its own, as is what
    others hold. On the CPU it is what ``max_num_seqs`` sequences of ``max_model_len``
    may need, 1 GiB at most.

    Raises:
        UserError: not one block fits.
    """
    token = sum(kv_bytes(heads, dim, model.dtype) for heads, dim in model.cache_shapes)
    each = token * block_size
    if model.device.type != "cuda":
        wanted = max_num_seqs * -(-max_model_len // block_size)
        return max(1, min(wanted, CPU_CACHE_BYTES // each))
    device = model.device
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _largest_step(model, block_size, max_model_len, max_num_seqs, max_num_batched_tokens)
    activations = torch.cuda.max_memory_allocated(device) - before
    activations *= 1 if eager else 2
    sampling = _SAMPLING_COPIES * max_num_seqs * model.vocabulary * 4
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    room = int(free - (1 - utilization) * total - activations - sampling)
    if room < each:
        raise UserError(
            f"LLM: no memory is left for the cache: {free / 2**30:.1f} GiB of "
            f"{total / 2**30:.1f} are free, a step takes {(activations + sampling) / 2**30:.1f} "
            f"and gpu_memory_utilization is {utilization}; raise it, or lower max_num_seqs or "
            "max_num_batched_tokens"
        )
    return room // each


def _largest_step(
    model: StepModel, block_size: int, max_model_len: int, max_num_seqs: int, tokens: int
) -> None:
    model.resize(max_model_len)
    first_row = model.admit(max_model_len)
    chunks = []
    blocks = 0
    while tokens:
        count = min(tokens, max_model_len)
        own = -(-count // block_size)
        chunks.append(Chunk([0] * count, 0, range(blocks, blocks + own), first_row))
        blocks += own
        tokens -= count
    cache = PagedCache(model.cache_shapes, blocks, model.dtype, model.device, block_size)
    table = max(len(chunk.blocks) for chunk in chunks)
    step = make_step(chunks, block_size, table, model.device)
    rows = torch.arange(max_num_seqs, device=model.device) % len(step.token_ids)
    model(step, cache, rows)
