"""``AsyncLLM``: the engine in a thread of its own, for asyncio."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

from .build import build_core
from .config import EngineConfig, EngineOptions, config_of
from .processor import Prompt, takes_long
from .request import Request, RequestOutput
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Result = RequestOutput | BaseException

_INPUT_THREADS = 4  # grammars that compile at the same time; tokenizing takes turns anyway


class _Reader:
    """The task that waits for a request's outputs. Only the latest output is kept."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.loop = asyncio.get_running_loop()
        self.request: Request | None = None  # once it is queued
        self.aborted = False
        self._latest: Result | None = None
        self._some = asyncio.Event()

    def put(self, result: Result) -> None:
        """Replace the latest output. Call it in the reader's own loop."""
        self._latest = result
        self._some.set()

    async def get(self) -> RequestOutput:
        """Wait for an output that was not read yet; raise an exception that came instead."""
        await self._some.wait()
        self._some.clear()
        assert self._latest is not None
        if isinstance(self._latest, BaseException):
            raise self._latest
        return self._latest


class AsyncLLM:
    """Serves requests that arrive at any time: one thread steps the engine while there are any.

    ::

        async with llmfast.AsyncLLM("embedded") as llm:
            async for output in llm.generate("Why is the sky blue?", params, "first"):
                print(output.outputs[0].text)

    Any number of tasks may generate at the same time, from several event loops too. Prompts are
    tokenized and grammars compiled in other threads, so that they delay no step. If a step raises,
    all current requests end with that exception, and new ones can be served.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        *,
        tokenizer: Any = None,
        config: EngineConfig | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        """Arguments and errors are those of :class:`llmfast.LLM`."""
        self.core = build_core(model, tokenizer, config_of(config, options))
        self.tokenizer = self.core.processor.tokenizer
        self.max_model_len = self.core.processor.max_model_len
        self._ids: dict[str, _Reader] = {}  # of unfinished requests
        self._made = itertools.count()
        self._live: dict[_Reader, Request] = {}  # whose outputs are handed over
        self._lock = Lock()  # over _ids, _live and _closed
        self._closed = False
        self._wake = Event()  # a request was added or aborted, or the engine is closing
        self._inputs = ThreadPoolExecutor(_INPUT_THREADS, thread_name_prefix="llmfast input")
        self._thread = Thread(target=self._work, name="llmfast engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a step must not run while the interpreter goes away

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput]:
        """Answer a prompt, and yield its output when it has grown; an output has all so far.

        A reader that is slower than the engine misses outputs, never the last. Leaving the loop,
        or cancelling the task, aborts the request; an ``async for`` that is left with ``break``
        does so as soon as the generator is closed.

        Args:
            prompt: a text, a list of token ids, or a dictionary as :meth:`llmfast.LLM.generate`
                takes it.
            request_id: an id that no unfinished request has; None: one is made.
            priority: lower ones go first.

        Raises:
            ValueError: the id of an unfinished request.
            RuntimeError: it is closed.
            Exception: what :meth:`llmfast.LLM.generate` raises of the arguments, or what a step
                raised.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("AsyncLLM: it is closed")
            if request_id is None:
                request_id = next(i for n in self._made if (i := f"r{n}") not in self._ids)
            if request_id in self._ids:
                raise ValueError(f"AsyncLLM: request {request_id!r} is in work already")
            reader = self._ids[request_id] = _Reader(request_id)

        def release_if_cancelled(task: asyncio.Task[Any]) -> None:
            if task.cancelled():
                self._release(reader)

        # a task that is cancelled while it does something else may never resume this generator
        task = asyncio.current_task()
        if task is not None:
            task.add_done_callback(release_if_cancelled)
        try:
            request = await self._process(prompt, sampling_params, request_id, priority)
            self._start(reader, request)
            finished = False
            while not finished:
                output = await reader.get()
                finished = output.finished
                if finished:
                    self._release(reader)
                yield output
        finally:
            if task is not None:
                task.remove_done_callback(release_if_cancelled)
            self._release(reader)

    async def abort(self, request_id: str) -> None:
        """End a request; its last output has the finish reason ``"abort"``.

        An id without an unfinished request is ignored.
        """
        with self._lock:
            reader = self._ids.get(request_id)
            if reader is None or self._closed:
                return
            reader.aborted = True
            request = reader.request
        if request is not None:  # else it is aborted when it is queued
            self._abort(request)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the prompt of a conversation: see :meth:`llmfast.LLM.chat_prompt`."""
        return self.core.processor.chat_prompt(messages)

    def close(self) -> None:
        """Abort unfinished requests, wait for the running step, and free the cache."""
        with self._lock:
            if not self._closed:
                self._closed = True
                atexit.unregister(self.close)
        self._wake.set()
        self._thread.join()
        self._inputs.shutdown(wait=False)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)

    # ------------------------------------------------------------------- in the event loops

    async def _process(
        self, prompt: Prompt, params: SamplingParams | None, request_id: str, priority: int
    ) -> Request:
        """Make the request, in another thread if that takes long."""
        # seeds are drawn in the order of the calls, whatever tokenizing takes
        drawn = getattr(params, "seed", None) is None
        seed = self.core.processor.draw_seed() if drawn else None

        def process() -> Request:
            prompts = prompt if isinstance(prompt, (str, Mapping)) else [prompt]
            given = None if params is None else [params]
            (request,) = self.core.processor.process(
                prompts, given, [priority], request_id=request_id, seed=seed
            )
            return request

        if not takes_long(prompt, params):
            return process()
        loop = asyncio.get_running_loop()
        try:
            pending = loop.run_in_executor(self._inputs, process)
        except RuntimeError:  # the executor is shut down
            raise RuntimeError("AsyncLLM: it is closed") from None
        return await pending

    def _start(self, reader: _Reader, request: Request) -> None:
        """Queue a reader's request.

        Raises:
            RuntimeError: the engine was closed since the request was made.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("AsyncLLM: it is closed")
            self._live[reader] = reader.request = request
            aborted = reader.aborted
            self.core.add([request], streaming=True)
        if aborted:
            self.core.abort([request])
        self._wake.set()

    def _abort(self, request: Request) -> None:
        self.core.abort([request])
        self._wake.set()

    def _release(self, reader: _Reader) -> None:
        """Free the id of a reader that waits no longer, and abort its request."""
        with self._lock:
            if self._ids.get(reader.request_id) is not reader:
                return
            del self._ids[reader.request_id]
            request = self._live.pop(reader, None)
        if request is not None:
            self._abort(request)

    # ------------------------------------------------------------------------- in the thread

    def _work(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            while not self._closed and (self._live or self.core.has_work):
                try:
                    results = self.core.run_until(self._collect)
                except BaseException as error:  # whatever it is, no reader may wait for ever
                    results = self._fail(error)
                for reader in _hand_over(results):
                    self._release(reader)
        self.core.close()
        _hand_over(self._collect() or [])

    def _collect(self) -> list[tuple[_Reader, Result]] | None:
        """Return the outputs that have changed; None if steps are to be run for some."""
        results: list[tuple[_Reader, Result]] = []
        with self._lock:
            for reader, request in list(self._live.items()):
                if request.changed:
                    request.changed = False
                    results.append((reader, self.core.output(request)))
                    if request.finished:
                        del self._live[reader]
            idle = self._closed or not (self._live or self.core.has_work)
        return results if results or idle else None

    def _fail(self, error: BaseException) -> list[tuple[_Reader, Result]]:
        """Abort all requests; their readers get the exception."""
        with self._lock:
            live = dict(self._live)
            self._live.clear()
        self.core.abort(list(live.values()))
        return [(reader, error) for reader in live]


def _hand_over(results: list[tuple[_Reader, Result]]) -> list[_Reader]:
    """Wake each event loop once. Return the readers whose loop is closed."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[_Reader, Result]]] = {}
    for reader, result in results:
        loops.setdefault(reader.loop, []).append((reader, result))
    gone: list[_Reader] = []
    for loop, own in loops.items():
        try:
            loop.call_soon_threadsafe(_put_all, own)
        except RuntimeError:  # the loop is closed
            gone += [reader for reader, _ in own]
    return gone


def _put_all(results: list[tuple[_Reader, Result]]) -> None:
    for reader, result in results:
        reader.put(result)
