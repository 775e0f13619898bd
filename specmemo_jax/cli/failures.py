"""Every failure as one line, and libraries kept quiet."""

import _thread
import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from typer.core import TyperGroup

from specmemo_jax.errors import SpecMemoError, SpecMemoWarning

INTERRUPTED = 130  # 128 + SIGINT, and below 128 + SIGPIPE, as a shell reports them
BROKEN_PIPE = 141


class OneLineErrors(TyperGroup):
    """A command group whose commands fail with one line on stderr and an exit code.

    1: an error; 130: interrupted; 141: the reader of standard output went away. Usage
    errors stay typer's (2). With ``--debug`` a traceback comes before the line.
    """

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        """Read the group's own options; --install-completion acts here."""
        with _one_line("--debug" in args):
            return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; see the class."""
        with _one_line(ctx.params.get("debug", False)), _interrupts_come_back():
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where a reader that went away or a full disk is an error like others
            return result


@contextmanager
def _one_line(debug: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _report("specmemo: interrupted", debug)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        drop_standard_output()
        raise typer.Exit(BROKEN_PIPE) from None
    except Exception as error:
        if isinstance(error, typer.Abort) or hasattr(error, "exit_code"):  # typer's own
            raise
        _report(f"specmemo: error: {describe(error)}", debug)
        drop_standard_output_if_broken()
        raise typer.Exit(1) from None


@contextmanager
def _interrupts_come_back() -> Iterator[None]:
    """Send a Ctrl-C again that Python dropped: it does so in a callback of its collector, and JAX has one."""
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        later = threading.Timer(0.05, _interrupt_main_thread)  # when the callback is over
        later.daemon = True
        later.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _interrupt_main_thread() -> None:
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, signal.SIGINT)  # wakes it where it waits, too
    else:
        _thread.interrupt_main()


def describe(error: BaseException) -> str:
    """What went wrong and what would work, in one line."""
    if isinstance(error, SpecMemoError):
        text = str(error) or type(error).__name__
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text = where + (error.strerror or str(error) or type(error).__name__)
        if error.errno == errno.ENOSPC:
            text += "; freeing space there, or (for models) SPECMEMO_CACHE on another disk, works"
    elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        text = f"out of memory ({str(error) or 'host'}); a smaller --max-context or --max-batch works"
    else:
        text = f"internal: {type(error).__name__}: {error} (specmemo --debug ... shows where)"
    return " ".join(text.split())


def quiet_libraries() -> None:
    """Keep other libraries' advice off stderr; what the user set in the environment wins."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for name in ("jax", "transformers", "huggingface_hub", "httpx", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", SpecMemoWarning)
    warnings.showwarning = _show_note


def _show_note(message: Warning | str, *place: Any) -> None:
    """A note of ours as one line; who raised it is nothing to a user of the command line."""
    print(f"specmemo: note: {' '.join(str(message).split())}", file=sys.stderr)


def drop_standard_output() -> None:
    """Let Python's own flush at exit find an open stream where the reader or the disk is gone."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def drop_standard_output_if_broken() -> None:
    """As `drop_standard_output`, when what is buffered cannot be written."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        drop_standard_output()


def _report(line: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(line, file=sys.stderr)
