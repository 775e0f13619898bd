"""One call at a time: the engine's state is donated from program to program, so calls take turns."""

import os
import threading
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from specmemo_jax.errors import ClosedError, ForkError, RequestError


class Turn:
    """Who may use a model now.

    A call from another thread waits until the one that runs has ended, streams included. In the thread whose
    stream is open a second call would wait for itself, so it is refused. A turn may end in another thread
    than it began in: a stream may be handed over, and the collector closes what was left open.
    """

    def __init__(self) -> None:
        self._lock, self._holder, self._pid = threading.Lock(), 0, os.getpid()
        self._closed = False
        self._calls: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()

    def check(self) -> None:
        """Raises ForkError in a forked child, ClosedError after `close`."""
        if os.getpid() != self._pid:
            raise ForkError(
                "this model was made before the process forked, and its threads stayed with the parent; "
                "a model made in the child, or a child started with multiprocessing's 'spawn', works"
            )
        if self._closed:
            raise ClosedError

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait for a turn, and end it. Raises RequestError where this thread has one that is still open."""
        self.check()
        if self._holder == threading.get_ident():
            raise RequestError("another call is still running; its end, or closing its stream, would work")
        with self._lock:
            self._holder = threading.get_ident()
            try:
                self.check()  # it may have been closed meanwhile
                yield
            finally:
                self._holder = 0

    def known(self, call: Generator[Any, None, None]) -> Generator[Any, None, None]:
        """Remember a generator that will hold a turn, so that `close` can end it."""
        self._calls.add(call)
        return call

    def close(self) -> bool:
        """Let nobody in any more, and end this thread's own stream; another thread's call is waited for.
        Whether it was open until now. Raises RequestError where this thread's own call cannot be ended.
        """
        if self._closed or os.getpid() != self._pid:
            return False
        if self._holder == threading.get_ident():
            for call in list(self._calls):
                with suppress(ValueError):  # one that waits in another thread
                    call.close()
            if self._holder == threading.get_ident():
                raise RequestError("a call is still running; closing the model after its end works")
        with self._lock:
            was_open, self._closed = not self._closed, True
        return was_open
