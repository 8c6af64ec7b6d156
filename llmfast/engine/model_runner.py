"""From the scheduler's output to sampled tokens: builds steps, launches and collects them.

The only part of the engine that knows the runner. Launches, CUDA graphs, the tensors of the cache,
pinned buffers and events belong to the executor.
"""

from __future__ import annotations

import logging
from collections import abc
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ..errors import UserError
from ..model.patch import evaluating
from ..model.sizes import ModelSizes
from ..model.trace import NotTraced
from ..runner.cache import group_windows
from ..runner.executor import Executor, Owner
from ..runner.graphs import step_shapes
from ..runner.inputs import GraphKey, SamplingOps
from ..runner.make_model import make_step_model
from ..runner.memory import count_blocks, group_blocks
from ..runner.results import StepHandle
from ..runner.warmup import compile_steps
from .batch import BatchBuilder
from .penalties import Counts
from .request import Answer, Sequence
from .sampling import SampledToken, choose, sampling_ops
from .scheduler_output import SchedulerOutput

logger = logging.getLogger("llmfast")

OWNER = Owner(
    "LLM",
    cache_advice="lower num_blocks or gpu_memory_utilization",
    graph_advice="lower gpu_memory_utilization, or use enforce_eager=True",
)
_CAPTURED = SamplingOps(draws=True, filters=True)  # the values say what is kept: that costs little


@dataclass(eq=False)
class LaunchedBatch:
    """A scheduled step that was launched."""

    step: StepHandle
    rows: dict[Sequence, int]  # row of each sequence whose token it samples
    scored: dict[Sequence, int]  # number of a sequence's tokens with logits
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # those logits, end to end
    chosen: list[SampledToken] | None = None  # by the host


class ModelRunner:
    """Runs the steps that the scheduler plans on an :class:`Executor` of its own."""

    @torch.inference_mode(False)  # its tensors outlive the mode of the caller
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
            with evaluating(model):
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
            self.num_blocks, self.max_model_len = num_blocks, longest
            layers = self._model.layer_caches
            counts = group_blocks(
                layers,
                num_blocks,
                block_size=block_size,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
            )
            # window and blocks of each cache group
            self.cache_groups = list(zip(group_windows(layers), counts, strict=True))
            width = -(-longest // block_size)
            shapes = []
            if not eager:
                shapes = step_shapes(max_num_seqs, max_num_batched_tokens, width, len(counts))
            self.executor = executor = Executor(
                self._model,
                num_blocks=counts,
                block_size=block_size,
                max_rows=max_num_seqs,
                max_length=longest,
                fixed_shapes=shapes,
                use_graphs=False if eager else None,
                owner=OWNER,
            )
            logger.info("llmfast: a cache of %d blocks of %d tokens", num_blocks, block_size)
            self._builder = BatchBuilder(
                executor.new_step,
                rows=max_num_seqs,
                width=width,
                block_size=block_size,
                # one choice for all requests, so that they can share blocks
                first_position=executor.admit(longest),
                groups=len(counts),
            )
            self._counts = Counts(max_num_seqs)
            executor.capture([GraphKey(shape, _CAPTURED) for shape in shapes])
            if executor.asynchronous:
                compile_steps(executor, max_num_batched_tokens)
        except BaseException as error:
            self._free()
            if isinstance(error, NotTraced):
                raise UserError(f"LLM: {name} cannot be run: {error}") from None
            raise
        self.vocabulary = self._model.vocabulary
        self.device = self._model.device

    @property
    def asynchronous(self) -> bool:
        """True if :meth:`launch` returns before the step has run."""
        return self.executor.asynchronous

    @property
    def waited(self) -> float:
        """Seconds that the host spent only waiting for steps."""
        return self.executor.waited

    def launch(
        self,
        scheduled: SchedulerOutput,
        answers: abc.Sequence[Answer],
        previous: LaunchedBatch | None,
        scored: dict[Sequence, int] | None = None,
    ) -> LaunchedBatch:
        """Start a step; on a GPU this returns before it has run.

        Args:
            scheduled: the tokens that the step computes.
            answers: of the scheduled sequences whose next token is sampled, in their order.
            previous: the step launched before, if the tokens it samples may be unknown.
            scored: for some sequences, of how many first tokens logits are wanted.

        Returns:
            The argument of :meth:`collect`.
        """
        scored = scored or {}
        on_device = all(answer.sampled_on_device for answer in answers)
        ops = sampling_ops(answers) if on_device else None
        known = {} if previous is None else previous.rows
        inputs = self._builder.build(scheduled, answers, known, scored, ops)
        rows = {answer.sequence: row for row, answer in enumerate(answers)}
        batch = LaunchedBatch(self.executor.launch(inputs), rows, scored)
        logits = batch.step.logits
        if logits is None:
            return batch
        if not on_device:
            own, logits = logits[: len(answers)], logits[len(answers) :]
            batch.chosen = choose(own, answers, self._counts)
            self.executor.feed(torch.tensor([each.token for each in batch.chosen], device="cpu"))
        if scored:
            batch.logits = logits
        batch.step.logits = None
        return batch

    def collect(self, batch: LaunchedBatch) -> list[SampledToken]:
        """Wait for a step and return the token of each of its answers."""
        result = self.executor.collect(batch.step)
        if batch.chosen is not None:
            return batch.chosen
        tokens = result.tokens.tolist()
        status = [0] * len(tokens) if result.status is None else result.status.tolist()
        return [SampledToken(*row, None, []) for row in zip(tokens, status, strict=True)]

    def close(self) -> None:
        """Free the cache and undo the changes of the user's model."""
        self._counts = Counts(0)
        self._free()
        del self._model

    def _free(self) -> None:
        """Free graphs and cache first: the user's dense weights need that memory."""
        executor = vars(self).get("executor")
        if executor is not None:
            executor.close()
        self._model.restore()


def _longest(model: PreTrainedModel, wanted: int | None) -> int:
    made_for = ModelSizes.of(model).context_length
    if made_for is not None and wanted is not None and wanted > made_for:
        raise UserError(f"LLM: max_model_len is {wanted}; the model was made for {made_for} tokens")
    longest: int = wanted or made_for or 2048
    return longest
