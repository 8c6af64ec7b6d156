"""The results of steps, on their way from the device to the host."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from llmfast_kernels.decode_step import NO_TOKEN


@dataclass(eq=False)
class StepHandle:
    """A step that was launched."""

    num_sampled: int
    # rows of logits that the step did not sample from; those of a graph last until the next step
    logits: torch.Tensor | None = None
    result: torch.Tensor | None = None  # int64 [2, rows] on the host, once the step has run
    done: torch.cuda.Event | None = None
    self_advancing: bool = False


@dataclass(frozen=True)
class StepResult:
    """The tokens that a step sampled on the device, on the host."""

    tokens: torch.Tensor  # int64 [num_sampled]
    status: torch.Tensor | None  # int64 [num_sampled], of sample_tokens; None: all are good


class HostResults:
    """Copies what steps sampled to the host, and waits for it."""

    def __init__(self, sampled: torch.Tensor) -> None:
        """
        Args:
            sampled: int64 ``[2, rows]``, written by steps: the tokens, and their status. The
                second row of a self-advancing step has the tokens as ``end_step`` writes them for
                the host.
        """
        self._sampled = sampled
        self._cuda = sampled.device.type == "cuda"
        self._free: list[torch.Tensor] = []  # pinned buffers
        self.waited = 0.0  # seconds that the host spent only waiting for steps

    def send(self, handle: StepHandle) -> None:
        """Start copying what the latest step sampled."""
        if not self._cuda:
            handle.result = self._sampled.clone()
            return
        if self._free:
            buffer = self._free.pop()
        else:
            buffer = torch.empty(
                self._sampled.shape, dtype=torch.int64, device="cpu", pin_memory=True
            )
        handle.result = buffer.copy_(self._sampled, non_blocking=True)

    def mark_end(self, handle: StepHandle) -> None:
        """Let :meth:`collect` wait for all that was launched so far."""
        if self._cuda:
            handle.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            handle.done.record(torch.cuda.current_stream(self._sampled.device))

    def collect(self, handle: StepHandle) -> StepResult:
        """Wait for a step and return the tokens that it sampled on the device."""
        if handle.done is not None:
            started = time.perf_counter()
            handle.done.synchronize()
            self.waited += time.perf_counter() - started
        result, handle.result = handle.result, None
        if result is None:
            return StepResult(torch.empty(0, dtype=torch.int64, device="cpu"), None)
        if handle.self_advancing:
            tokens = result[1, : handle.num_sampled].clone()
            failed = tokens < NO_TOKEN
            status = NO_TOKEN - tokens
        else:
            tokens, status = result[:, : handle.num_sampled].clone()
            failed = status != 0
        if self._cuda:
            self._free.append(result)  # the copy into it has ended
        return StepResult(tokens, torch.where(failed, status, 0) if bool(failed.any()) else None)
