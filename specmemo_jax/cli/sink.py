"""Where answers are written: whole rows, each on disk before the next one starts."""

import os
import stat
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from specmemo_jax.errors import SpecMemoError


class OutputError(SpecMemoError, OSError):
    """Answers cannot be written where they were asked to go."""


class Sink:
    """A file, or standard output for ``None`` and ``-``; a context manager.

    The file is opened at once, so that a bad path is refused before any work, and an
    existing one is emptied only by the first row. A row that does not fit on the disk
    is taken back, so that every line stays whole.
    """

    def __init__(self, path: str | None):
        self.rows = 0
        self.path = None if path in (None, "-") else Path(str(path)).expanduser()
        self.name = "standard output" if self.path is None else str(self.path)
        self._is_new = self.path is not None and not self.path.exists()
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

    def write(self, row: str) -> None:
        """Write and flush one row, newline included. Raises OutputError, or BrokenPipeError."""
        try:
            self._write(row.encode("utf-8"))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.name}: {error.strerror}; {self.rows} answers are there, "
                "free space or another --output works"
            ) from error
        self.rows += 1

    def _write(self, data: bytes) -> None:
        if self.path is None:
            self._stream.write(data)
            self._stream.flush()
            return
        descriptor = self._stream.fileno()
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if regular and self.rows == 0:
            os.ftruncate(descriptor, 0)
        start = os.fstat(descriptor).st_size
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except OSError:
            if regular:
                os.ftruncate(descriptor, start)
            raise

    def __enter__(self) -> "Sink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path is None:
            return
        self._stream.close()
        if self._is_new and not self.rows and self.path.is_file():
            self.path.unlink()
