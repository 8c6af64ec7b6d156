"""Many more requests than are worked on at once, answered as they finish."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from .llm import LLM
from .processor import Prompt
from .request import Request, RequestOutput
from .sampling_params import SamplingParams

Key = TypeVar("Key")


def answer_all(
    llm: LLM, asked: Iterable[tuple[Key, Prompt, SamplingParams]], *, ahead: int
) -> Iterator[tuple[Key, RequestOutput]]:
    """Answer requests, each yielded with its key when it is finished.

    Leaving the loop aborts what is not.

    Args:
        asked: taken from as requests finish.
        ahead: requests that are queued or run at most.

    Raises:
        UserError, TypeError: as :meth:`LLM.generate`.
    """
    source = iter(asked)
    live: list[tuple[Key, Request]] = []
    try:
        while True:
            while len(live) < ahead and (following := next(source, None)) is not None:
                key, prompt, params = following
                (request,) = llm._add([prompt], params, streaming=False)
                live.append((key, request))
            if not live:
                return
            if not any(request.finished for _, request in live):
                llm._step()
            done = [entry for entry in live if entry[1].finished]
            live = [entry for entry in live if not entry[1].finished]
            for key, request in done:
                yield key, llm._output(request)
    finally:
        llm._drop([request for _, request in live])
