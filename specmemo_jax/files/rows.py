"""Where answers are written: whole rows, each on disk before the next one starts."""

import fcntl
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from specmemo_jax.errors import SpecMemoError


class OutputError(SpecMemoError, OSError):
    """Answers cannot be written where they were asked to go."""


class Sink:
    """A file, or standard output for ``None`` and ``-``; a context manager.

    The file is opened at once, so that a bad path is refused before any work, and an
    existing one is emptied only by the first row. A row that does not fit on the disk
    is taken back, so that every line stays whole. Pieces of a row that an error or Ctrl-C
    cut short stay, and the line ends after them. ``append``: what an existing file holds stays.
    ``advice``: what works where the disk is full, for the error.
    """

    def __init__(
        self, path: str | None, append: bool = False, advice: str = "free space or another --output works"
    ):
        self.rows = 0
        self.path = None if path in (None, "-") else Path(str(path)).expanduser()
        self.name = "standard output" if self.path is None else str(self.path)
        self._is_new = self.path is not None and not self.path.exists()
        self._advice, self._is_emptied, self._is_in_line = advice, append, False
        self._stream = self._open()

    def _open(self) -> Any:
        if self.path is None:
            return sys.stdout.buffer
        try:
            return open(self.path, "ab", buffering=0)
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}; another --output, or - (standard output), works"
            ) from error

    @property
    def is_terminal(self) -> bool:
        """Whether a person reads the rows as they come."""
        return self.path is None and sys.stdout.isatty()

    def lock(self) -> None:
        """Keep other locking sinks off the file. Raises OutputError where one has it."""
        try:
            fcntl.flock(self._stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"another run is writing {self.name}; its end works") from error

    def write(self, row: str) -> None:
        """Write and flush one row, newline included, whole also when Ctrl-C comes meanwhile.

        Raises OutputError, or BrokenPipeError.
        """
        with _interrupts_wait():
            self.write_part(row)
            self.rows += 1

    def write_part(self, text: str) -> None:
        """Write and flush a piece of a row, which `write` ends. Raises OutputError, or BrokenPipeError."""
        if not text:
            return
        self._is_in_line = not text.endswith("\n")
        try:
            self._write(text.encode("utf-8", "backslashreplace"))  # an id may be a lone surrogate
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.name}: {error.strerror}; {self.rows} answers are there, "
                + self._advice
            ) from error

    def _write(self, data: bytes) -> None:
        if self.path is None:
            self._stream.write(data)
            self._stream.flush()
            return
        descriptor = self._stream.fileno()
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if regular and not self._is_emptied:
            os.ftruncate(descriptor, 0)
            self._is_emptied = True
        start = os.fstat(descriptor).st_size
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except BaseException:
            if regular:
                os.ftruncate(descriptor, start)
            raise

    def __enter__(self) -> "Sink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_in_line and not isinstance(error, OSError):
            self.write_part("\n")
        if self.path is None:
            return
        self._stream.close()
        if self._is_new and not self.rows and self.path.is_file():
            self.path.unlink()


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Put Ctrl-C off until the block is done; a second one ends a write that hangs."""
    came: list[None] = []
    with first_interrupt(lambda: came.append(None)):
        yield
    if came:
        raise KeyboardInterrupt


@contextmanager
def first_interrupt(do: Callable[[], object]) -> Iterator[None]:
    """At the first Ctrl-C ``do`` and go on; a second one interrupts. Only the main thread has them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def handle(signal_number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True
        do()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
