import os
import re
import subprocess
import sys

from typer.testing import CliRunner

from specmemo_jax import __version__
from specmemo_jax.cli.completion import complete_drafter, complete_model, complete_pull
from specmemo_jax.cli.main import app


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), prog_name="specmemo")


def test_version():
    assert run("--version").stdout == f"specmemo {__version__}\n"
    command = [sys.executable, "-m", "specmemo_jax", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == (
        f"specmemo {__version__}\n"
    )


def test_the_module_answers_help_without_importing_jax():
    code = "import sys; sys.argv = ['specmemo', '--help']\nimport runpy, atexit\n"
    code += "atexit.register(lambda: print('jax' in sys.modules))\n"
    code += "runpy.run_module('specmemo_jax', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "generate" in done.stdout
    assert done.stdout.endswith("False\n")


def complete(shell_line: str) -> list[str]:
    environment = {
        **os.environ,
        "_SPECMEMO_COMPLETE": "complete_bash",
        "COMP_WORDS": shell_line,
        "COMP_CWORD": str(shell_line.count(" ")),
    }
    command = [sys.executable, "-m", "specmemo_jax"]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_the_shell_completes_models_and_drafters():
    assert complete("specmemo generate --model s") == ["smollm2-135m-instruct"]
    assert complete("specmemo generate --drafter ")[:3] == ["auto", "ngram", "none"]
    assert complete("specmemo generate --top") == ["--top-p", "--top-k"]


def test_completion_of_the_hubs_models(hub_cache):
    hub_cache("org/tiny")
    assert [name for name, _ in complete_model("org")] == ["org/tiny"]
    assert [name for name, _ in complete_drafter("org")] == ["org/tiny"]
    assert complete_pull("org") == []
    assert complete_model("llama") == []  # config only: nothing to run


def test_completion_is_installed_for_the_shell(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "specmemo_jax"]
    shown, installed = (
        subprocess.run(
            [*command, option, "bash"], env=environment, capture_output=True, text=True, check=True
        )
        for option in ("--show-completion", "--install-completion")
    )
    assert "complete -o default -F _specmemo_completion specmemo" in shown.stdout
    assert "bash completion installed" in installed.stdout
    assert (tmp_path / ".bash_completions" / "specmemo.sh").exists()


def test_generates_options_stand_in_panels_with_examples():
    text = run("generate", "--help").stdout
    panels = re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE)
    assert panels == ["Arguments", "Prompts", "Sampling", "Ending", "Model and memory", "Output", "Options"]
    assert "cat question.txt | specmemo generate" in text
    assert "greedy" in text
    assert "self:K" in text


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
