import json
import re
import signal

import pytest
from typer.testing import CliRunner

from specmemo_jax.cli.main import app
from specmemo_jax.cli.streaming import _stripped
from specmemo_jax.files.rows import Sink


def run(model, *arguments):
    command = ["generate", "--model", str(model), "--max-context", "256", "--no-adaptive"]
    command += map(str, arguments)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def blocks(text: str) -> list[str]:
    """Answers with heading and figures, without the speed."""
    return sorted(re.sub(r"[\d.]+ tokens/s", "", text).split("--- "))


@pytest.fixture
def parts(monkeypatch) -> list[str]:
    """Everything that is written, piece by piece."""
    written, write = [], Sink.write_part

    def noted(self, text):
        written.append(text)
        write(self, text)

    monkeypatch.setattr(Sink, "write_part", noted)
    return written


def test_white_space_around_the_whole_text_is_left_out():
    shown = []
    write = _stripped(shown.append)
    for piece in ["", " \n", "\n one", " ", "\n", "two \n", "", " "]:
        write(piece)
    assert shown == ["one", " \ntwo"]


@pytest.mark.parametrize("sampling", [(), ("--temperature", 1, "--seed", 3)])
def test_streamed_turns_and_stop_strings_read_as_unstreamed(tiny_model, tmp_path, parts, sampling):
    file = tmp_path / "q.jsonl"
    lines = [
        {"question_id": 81, "turns": ["one two one two", "more"]},
        {"prompt": "abc", "params": {"stop": ["e"], "min_tokens": 3}},
        {"prompt": [5, 6, 5, 6, 5]},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ("-p", file, "-n", 24, "--format", "text", *sampling)
    streamed = run(tiny_model, *arguments, "--stream")
    assert len(parts) > 4 * 2  # a heading and figures are not all
    assert blocks(streamed) == blocks(run(tiny_model, *arguments))
    assert re.findall("--- (.*)", streamed) == ["81, turn 1", "81, turn 2", "2", "3"]


def test_a_terminal_is_streamed_to_one_prompt_at_a_time(tiny_model, tmp_path, monkeypatch, parts):
    monkeypatch.setattr(Sink, "is_terminal", property(lambda self: self.path is None))
    arguments = (tiny_model, "hello", "-n", 12, "--ignore-eos")
    streamed = run(*arguments)
    assert "tokens/s" in parts.pop()
    assert parts
    for options in (["--no-stream"], ["--max-batch", 2]):
        parts.clear()
        assert blocks(run(*arguments, *options)) == blocks(streamed)
        assert len(parts) == 1
    assert json.loads(run(*arguments, "--format", "jsonl"))["id"] == 1
    assert run(*arguments, "--output", tmp_path / "out") == ""
    assert json.loads((tmp_path / "out").read_text())["id"] == 1


def test_what_was_said_before_ctrl_c_stays(tiny_model, monkeypatch):
    write, said = Sink.write_part, []

    def interrupted(self, text):
        write(self, text)
        said.append(text)
        if text.strip():
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Sink, "write_part", interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command = ["generate", "--model", str(tiny_model), "--max-context", "256", "hello", "--ignore-eos"]
        result = CliRunner().invoke(app, [*command, "-n", "12", "--stream"])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert result.exit_code == 130
    assert "".join(said) == result.stdout
    assert len(result.stdout) > 1
    assert result.stdout.endswith("\n")
    assert "tokens/s" not in result.stdout
    assert result.stderr == "specmemo: interrupted\n"
