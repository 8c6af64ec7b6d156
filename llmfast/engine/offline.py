"""Offline serving: more requests than run at once, answered as they finish."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from .core import EngineCore
from .processor import Prompt
from .request import Request, RequestOutput
from .sampling_params import SamplingParams

Key = TypeVar("Key")


def answer_all(
    core: EngineCore, prompts: Iterable[tuple[Key, Prompt, SamplingParams]], *, ahead: int
) -> Iterator[tuple[Key, RequestOutput]]:
    """Answer requests, and yield each with its key when it is finished.

    Leaving the loop aborts unfinished requests.

    Args:
        prompts: read further as requests finish.
        ahead: requests that are queued or run, at most.

    Raises:
        UserError, TypeError: as :meth:`LLM.generate`.
    """
    source = iter(prompts)
    live: list[tuple[Key, Request]] = []

    def collect() -> list[tuple[Key, RequestOutput]] | None:
        done = [entry for entry in live if entry[1].finished]
        return [(key, core.output(request)) for key, request in done] or None

    try:
        while True:
            while len(live) < ahead and (following := next(source, None)) is not None:
                key, prompt, params = following
                requests = core.processor.process([prompt], params)
                live.append((key, requests[0]))
                core.add(requests)
            if not live:
                return
            outputs = core.run_until(collect)
            finished = {output.request_id for _, output in outputs}
            live = [entry for entry in live if entry[1].id not in finished]
            yield from outputs
    finally:
        core.abort([request for _, request in live])
