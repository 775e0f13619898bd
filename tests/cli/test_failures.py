import errno

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


@pytest.mark.parametrize("error", [typer.Exit(7), typer.BadParameter("no"), typer.Abort()])
def test_typer_keeps_its_own(error):
    result = run(error)
    assert "specmemo: error" not in result.stderr
    assert result.exit_code == {typer.Exit: 7, typer.BadParameter: 2, typer.Abort: 1}[type(error)]


def test_a_full_disk_says_what_works():
    assert "SPECMEMO_CACHE" in describe(OSError(errno.ENOSPC, "No space left on device", "/cache/x"))
