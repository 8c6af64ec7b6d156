"""Steps shared between threads: one thread runs them, the others wait for their own results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, get_ident
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class _Waiter(Generic[T]):
    """A thread that waits for a result, or runs steps until it has one."""

    def __init__(self, collect: Callable[[], T | None]) -> None:
        self._collect = collect
        self.result: T | None = None
        self.error: Exception | None = None
        self.woken = Event()

    @property
    def done(self) -> bool:
        return self.result is not None or self.error is not None

    def look(self) -> None:
        """Take the result if there is one. An error is this waiter's alone."""
        try:
            self.result = self._collect()
        except Exception as error:
            self.error = error


class SharedSteps:
    """Runs one step at a time, for any number of threads.

    The first thread in :meth:`run_until` leads: it runs steps, and takes the results of all threads
    between two of them. When it has its own result, the next thread leads.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step
        self._lock = Lock()  # held during a step
        self._gate = Lock()  # held by a thread that wants _lock for once: the leader lets it pass
        self._owner: int | None = None  # the thread that holds _lock
        self._posted: deque[Callable[[], None]] = deque()  # appending is atomic
        self._mutex = Lock()  # over _waiters and _leader
        self._waiters: list[_Waiter[Any]] = []
        self._leader: _Waiter[Any] | None = None

    def post(self, function: Callable[[], None]) -> None:
        """Run a function between steps: at once if no step runs, else before the next one.

        This never waits, so a finalizer may post at any moment, even in the middle of a step.
        """
        self._posted.append(function)
        self._run_posted_if_free()

    @property
    def has_posted(self) -> bool:
        """True if a posted function has not run yet."""
        return bool(self._posted)

    @property
    def num_waiting(self) -> int:
        """Threads in :meth:`run_until`."""
        with self._mutex:
            return len(self._waiters)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep steps and posted functions away; what was posted before has run.

        Raises:
            RuntimeError: this thread is in a step; it would wait for itself.
        """
        self._refuse_nesting()
        with self._gate, self._held():
            yield

    def step(self) -> None:
        """Run a step, then hand out results. If it raises, all that wait get the exception too."""
        self._refuse_nesting()
        with self._turn():
            self._run_step()

    def hand_out(self) -> None:
        """Give each waiting thread its result if there is one. Call it within :meth:`exclusive`."""
        with self._mutex:
            waiters = list(self._waiters)
        for waiter in waiters:
            waiter.look()
            if waiter.done:
                self._dismiss(waiter)

    def run_until(self, collect: Callable[[], T | None]) -> T:
        """Run steps, or wait while another thread does, until ``collect`` returns a result.

        Args:
            collect: called between steps, in any thread that runs them; None: no result yet. It
                must not wait for this engine.

        Raises:
            Exception: what ``collect`` raised, or a step that was run meanwhile.
            RuntimeError: this thread is in a step.
        """
        self._refuse_nesting()
        waiter = _Waiter(collect)
        try:
            with self._mutex:
                self._waiters.append(waiter)
                leads = self._leader is None
                if leads:
                    self._leader = waiter
            if not leads:
                waiter.woken.wait()
            if not waiter.done:
                with self._turn():
                    self.hand_out()
            while not waiter.done:
                with self._turn():
                    if not waiter.done:
                        self._run_step()
        finally:
            self._leave(waiter)
        if waiter.error is not None:
            raise waiter.error
        return cast(T, waiter.result)

    # ------------------------------------------------------------------------------- inside

    def _refuse_nesting(self) -> None:
        if self._owner == get_ident():
            raise RuntimeError("LLM: a step is running in this thread, and cannot wait for another")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the lock, after a thread that already waits for it."""
        with self._gate:
            pass
        with self._held():
            yield

    @contextmanager
    def _held(self) -> Iterator[None]:
        try:
            with self._lock:
                self._owner = get_ident()
                try:
                    self._run_posted()
                    yield
                finally:
                    self._owner = None
        finally:
            self._run_posted_if_free()

    def _run_posted(self) -> None:
        while self._posted:
            self._posted.popleft()()

    def _run_posted_if_free(self) -> None:
        # who holds the lock looks again after releasing it, so nothing posted is left behind
        while self._posted and self._lock.acquire(blocking=False):
            try:
                self._owner = get_ident()
                self._run_posted()
            finally:
                self._owner = None
                self._lock.release()

    def _run_step(self) -> None:
        try:
            self._step()
        except Exception as error:
            with self._mutex:
                waiters = list(self._waiters)
            for waiter in waiters:
                waiter.error = error
                self._dismiss(waiter)
            raise
        self.hand_out()

    def _dismiss(self, waiter: _Waiter[Any]) -> None:
        with self._mutex:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
        waiter.woken.set()

    def _leave(self, waiter: _Waiter[Any]) -> None:
        """Forget a waiter; if it leads, the next one does."""
        with self._mutex:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            if self._leader is waiter:
                self._leader = self._waiters[0] if self._waiters else None
                if self._leader is not None:
                    self._leader.woken.set()
