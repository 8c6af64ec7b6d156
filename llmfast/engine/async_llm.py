"""``AsyncLLM``: the engine in a thread of its own, for asyncio."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from queue import SimpleQueue
from threading import Lock, Thread
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel

from .llm import LLM
from .processor import Prompt
from .request import Request, RequestOutput
from .sampling_params import SamplingParams

Result = RequestOutput | BaseException


class _Reader:
    """Who waits for a request's outputs. Only the latest is kept, so a slow one costs nothing."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.loop = asyncio.get_running_loop()
        self._latest: Result | None = None
        self._some = asyncio.Event()

    def put(self, result: Result) -> None:
        """In the reader's own loop."""
        self._latest = result
        self._some.set()

    async def get(self) -> RequestOutput:
        await self._some.wait()
        self._some.clear()
        assert self._latest is not None
        if isinstance(self._latest, BaseException):
            raise self._latest
        return self._latest


class AsyncLLM:
    """Serves requests that come at any time: one thread steps the engine while there are any.

    ::

        async with llmfast.AsyncLLM("embedded") as llm:
            async for output in llm.generate("Why is the sky blue?", params, "first"):
                print(output.outputs[0].text)

    Any number of tasks may generate at the same time, from several event loops too. If a step
    raises, every request there is ends with that exception, and new ones can be served.
    """

    def __init__(self, model: str | os.PathLike[str] | PreTrainedModel, **options: Any) -> None:
        """Arguments and errors are those of :class:`llmfast.LLM`."""
        self._llm = LLM(model, **options)
        self.tokenizer = self._llm.tokenizer
        self.max_model_len = self._llm.max_model_len
        self._ids: dict[str, _Reader] = {}  # in work
        self._made = itertools.count()
        self._lock = Lock()  # over _ids and _closed, and the order of what is asked for
        self._closed = False
        self._asked: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None: close
        self._live: dict[_Reader, Request] = {}  # the thread's own
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
            request_id: that no request in work has; None: one is made.
            priority: lower ones go first.

        Raises:
            ValueError: the id of a request that is in work.
            RuntimeError: it is closed.
            whatever :meth:`llmfast.LLM.generate` raises of the arguments, and what a step raised.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("AsyncLLM: it is closed")
            if request_id is None:
                request_id = next(i for n in self._made if (i := f"r{n}") not in self._ids)
            if request_id in self._ids:
                raise ValueError(f"AsyncLLM: request {request_id!r} is in work already")
            reader = self._ids[request_id] = _Reader(request_id)
            self._asked.put(lambda: self._add(reader, prompt, sampling_params, priority))

        def release_if_cancelled(task: asyncio.Task[Any]) -> None:
            if task.cancelled():
                self._release(reader)

        # a task that is cancelled while it does something else may never come back here
        task = asyncio.current_task()
        if task is not None:
            task.add_done_callback(release_if_cancelled)
        try:
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

    def _release(self, reader: _Reader) -> None:
        """Nobody waits for it any more: its request ends and its id is free."""
        with self._lock:
            if self._ids.get(reader.request_id) is not reader:
                return
            del self._ids[reader.request_id]
            if not self._closed:
                self._asked.put(lambda: self._leave(reader))

    async def abort(self, request_id: str) -> None:
        """End a request; its last output has the finish reason ``"abort"``.

        Of an id that is not, or no more, in work nothing happens.
        """
        with self._lock:
            if not self._closed:
                self._asked.put(lambda: self._abort(request_id))

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The prompt of a conversation: see :meth:`llmfast.LLM.chat_prompt`."""
        return self._llm.chat_prompt(messages)

    def close(self) -> None:
        """Abort what is in work, wait for the step that runs, and free the cache."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._asked.put(None)
                atexit.unregister(self.close)
        self._thread.join()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)

    # ------------------------------------------------------------------------- in the thread

    def _work(self) -> None:
        device = self._llm._executor.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own
        while True:
            while not self._live or not self._asked.empty():
                asked = self._asked.get()
                if asked is None:
                    self._llm.close()
                    self._deliver()
                    return
                asked()
            try:
                self._llm._step()
            except BaseException as error:  # whatever it is, nobody may wait for ever
                readers = list(self._live)
                self._llm._drop(list(self._live.values()))
                self._live.clear()
                _hand_over([(reader, error) for reader in readers])
            else:
                self._deliver()

    def _add(self, reader: _Reader, prompt: Any, params: Any, priority: int) -> None:
        prompts = prompt if isinstance(prompt, (str, Mapping)) else [prompt]
        try:
            (self._live[reader],) = self._llm._add(
                prompts,
                None if params is None else [params],
                [priority],
                streaming=True,
                request_id=reader.request_id,
            )
        except Exception as error:  # of the arguments
            _hand_over([(reader, error)])
        else:
            self._deliver()

    def _abort(self, request_id: str) -> None:
        for reader, request in self._live.items():
            if reader.request_id == request_id:
                self._llm._drop([request])
        self._deliver()

    def _leave(self, reader: _Reader) -> None:
        request = self._live.pop(reader, None)
        if request is not None:
            self._llm._drop([request])

    def _deliver(self) -> None:
        """Hand over what has changed."""
        changed: list[tuple[_Reader, Result]] = []
        for reader, request in list(self._live.items()):
            if not request.changed:
                continue
            request.changed = False
            changed.append((reader, self._llm._output(request)))
            if request.finished:
                del self._live[reader]
        for reader in _hand_over(changed):
            self._leave(reader)


def _hand_over(results: list[tuple[_Reader, Result]]) -> list[_Reader]:
    """Wake each event loop once; the readers whose loop is gone."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[_Reader, Result]]] = {}
    for reader, result in results:
        loops.setdefault(reader.loop, []).append((reader, result))
    gone: list[_Reader] = []
    for loop, own in loops.items():
        try:
            loop.call_soon_threadsafe(_put_all, own)
        except RuntimeError:  # it is closed
            gone += [reader for reader, _ in own]
    return gone


def _put_all(results: list[tuple[_Reader, Result]]) -> None:
    for reader, result in results:
        reader.put(result)
