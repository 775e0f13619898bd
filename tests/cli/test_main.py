import os
import subprocess
import sys

from typer.testing import CliRunner

from specmemo_jax import __version__
from specmemo_jax.cli.main import app


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), prog_name="specmemo")


def test_version():
    assert run("--version").stdout == f"specmemo {__version__}\n"


def test_the_module_answers_help_without_importing_jax():
    code = "import sys; sys.argv = ['specmemo', '--help']\nimport runpy, atexit\n"
    code += "atexit.register(lambda: print('jax' in sys.modules))\n"
    code += "runpy.run_module('specmemo_jax', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "generate" in done.stdout
    assert done.stdout.endswith("False\n")


def test_list_names_the_zoo():
    result = run("list")
    assert result.exit_code == 0
    first, second, *rest = result.stdout.splitlines()
    assert first.split()[0] == "name"
    assert second.startswith("smollm2-135m-instruct")
    assert "not pulled" in second
    assert any(line.startswith("llama-2-70b-chat") and "config only" in line for line in rest)


def test_pull_of_an_unknown_name():
    result = run("pull", "smollm")
    assert result.exit_code == 1
    assert result.stderr.startswith("specmemo: error: no model 'smollm'")
    assert result.stderr.count("\n") == 1


def test_pull_of_a_config_only_model():
    result = run("pull", "llama-2-7b-chat")
    assert result.exit_code == 1
    assert "by its config only" in result.stderr


def test_a_reader_that_goes_away():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "specmemo_jax", "list"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode not in (0, 120)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
