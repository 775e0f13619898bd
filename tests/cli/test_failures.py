import errno
import signal
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

from specmemo_jax.cli.failures import OneLineErrors, describe
from specmemo_jax.errors import DownloadError, RequestError


def run(error: BaseException, *arguments: str):
    app = typer.Typer(cls=OneLineErrors)

    @app.callback()
    def options(debug: bool = False) -> None:
        pass

    @app.command()
    def fail() -> None:
        raise error

    return CliRunner().invoke(app, [*arguments, "fail"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RequestError("two\nlines"), "two lines"),
        (DownloadError("no network"), "no network"),
        (OSError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied"),
        (MemoryError(), "out of memory (host)"),
        (RuntimeError("RESOURCE_EXHAUSTED: 5 GiB"), "out of memory (RESOURCE_EXHAUSTED: 5 GiB)"),
        (ZeroDivisionError("oops"), "internal: ZeroDivisionError: oops"),
    ],
)
def test_one_line_and_exit_1(error, line):
    result = run(error)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"specmemo: error: {line}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_debug_shows_the_traceback_first():
    result = run(RequestError("bad"), "--debug")
    assert result.exit_code == 1
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("specmemo: error: bad\n")


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141)])
def test_signals_have_their_exit_codes(error, code):
    result = run(error)
    assert result.exit_code == code
    assert "Traceback" not in result.stderr


def test_ctrl_c_is_not_lost_in_a_callback():
    class InCallback:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    app = typer.Typer(cls=OneLineErrors)

    @app.callback()
    def options() -> None:
        pass

    @app.command()
    def work() -> None:
        InCallback()
        time.sleep(20)

    before = sys.unraisablehook
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = CliRunner().invoke(app, ["work"])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert result.exit_code == 130
    assert result.stderr == "specmemo: interrupted\n"
    assert sys.unraisablehook is before


@pytest.mark.parametrize("error", [typer.Exit(7), typer.BadParameter("no"), typer.Abort()])
def test_typer_keeps_its_own(error):
    result = run(error)
    assert "specmemo: error" not in result.stderr
    assert result.exit_code == {typer.Exit: 7, typer.BadParameter: 2, typer.Abort: 1}[type(error)]


def test_the_groups_own_options_fail_in_one_line_too():
    app = typer.Typer(cls=OneLineErrors)

    @app.callback()
    def options(
        broken: bool = typer.Option(False, callback=lambda value: 1 / 0 if value else value),
    ) -> None:
        pass

    @app.command()
    def work() -> None:
        pass

    result = CliRunner().invoke(app, ["--broken", "work"])
    assert result.exit_code == 1
    assert result.stderr.startswith("specmemo: error: internal: ZeroDivisionError")
    assert result.stderr.count("\n") == 1


def test_a_full_disk_says_what_works():
    assert "SPECMEMO_CACHE" in describe(OSError(errno.ENOSPC, "No space left on device", "/cache/x"))
