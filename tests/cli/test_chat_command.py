"""``specmemo chat``: turns through a pipe and a terminal, its commands, and Ctrl-C."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from typer.testing import CliRunner

from specmemo_jax.chat.session import ChatSession
from specmemo_jax.cli import chat_repl
from specmemo_jax.cli.chat_input import LineReader
from specmemo_jax.cli.chat_repl import Repl
from specmemo_jax.cli.main import app
from specmemo_jax.errors import RequestError
from specmemo_jax.llm import LLM
from specmemo_jax.serve.params import SamplingParams

FIGURES = re.compile(
    r"\[\d+ tokens( \([^)]*\))?, [\d.]+ tokens/s, [\d.]+ a step; "
    r"context (\d+) of (\d+); memory (\d+) of (\d+) MiB\]"
)


@pytest.fixture(scope="module")
def llm(tiny_model):
    with LLM(str(tiny_model), max_context=250) as made:
        yield made


@pytest.fixture
def say(llm, monkeypatch, capsys):
    """Talk through a pipe; what came out on standard output and standard error."""

    def talk(*lines, session=None, params=None):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        params = params or SamplingParams(temperature=0, max_tokens=6)
        session = session or ChatSession(llm, sampling_params=params)
        Repl(session, params, 2**20).run()
        return capsys.readouterr()

    return talk


def run(*arguments, text=""):
    return CliRunner().invoke(app, ["chat", *map(str, arguments)], input=text)


def test_one_turn_a_line_and_figures_after_each(tiny_model, tmp_path):
    file = tmp_path / "chat.json"
    options = "--model", tiny_model, "--max-context", 250, "--max-tokens", 6
    done = run(*options, "--system", "be", "--memory-budget", "64MiB", text=f"one\ntwo\n/save {file}\n")
    assert done.exit_code == 0, done.stderr
    lines = FIGURES.findall(done.stderr)
    assert [(context, budget) for *_, context, _, budget in lines] == [("250", "64")] * 2
    document = json.loads(file.read_text(encoding="utf-8"))
    answers = [m["content"] for m in document["messages"] if m["role"] == "assistant"]
    assert document["messages"][0] == {"role": "system", "content": "be"}
    assert document["model"] == str(tiny_model)
    assert done.stdout == "".join(answer.strip() + "\n" for answer in answers)

    again = run(*options, "--load", file, text="/stats\n/system\n")
    assert again.exit_code == 0, again.stderr
    assert re.search(r"^turns +2$", again.stdout, re.MULTILINE)
    assert again.stdout.endswith("\nbe\n")
    assert f"[2 turns, {lines[-1][1]} tokens from {file}]" in again.stderr


def test_what_fails_through_a_pipe_ends_it_in_one_line(tiny_model, tmp_path):
    done = run("--model", tiny_model, "--max-context", 60, "--max-tokens", 20, text="x\n" + "y" * 30 + "\n")
    assert done.exit_code == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("specmemo: error: the context of 60 tokens is full")
    assert "--overflow drop-oldest" in error
    arguments = ["--max-context", 80, "--max-tokens", 8, "--overflow", "drop-oldest"]
    done = run("--model", tiny_model, *arguments, text="x\n" + "y" * 30 + "\n")
    assert done.exit_code == 0, done.stderr
    assert "[the context is full: the oldest turn dropped, from 'x' on]" in done.stderr
    for arguments, code, words in (
        (("--load", tmp_path / "none.json"), 1, "cannot read"),
        (("--top-p", 0.5), 2, "--temperature"),
        (("--overflow", "cut"), 2, "drop-oldest"),
        (("--max-tokens", 0), 2, "max-tokens"),
    ):
        done = run("--model", tiny_model, *arguments)
        assert done.exit_code == code
        assert words in " ".join(done.stderr.split())


def test_commands(say, llm, tmp_path):
    session = ChatSession(llm, sampling_params=SamplingParams(temperature=0, max_tokens=6))
    out, err = say("/help", "/plan", "/system", "/stats", session=session)
    assert "/retry" in out
    assert llm.plan.table() in out
    assert "no system prompt" in out
    assert "0, 0 tokens" in out
    out, err = say("one", "two", "/undo", "/retry", "/system be", "three", session=session)
    assert [turn.user for turn in session.turns] == ["one", "three"]
    assert session.system == "be"
    assert "taken back: 'two'; 1 turns left" in err
    assert "always the same" in err
    assert out.splitlines().count(session.turns[0].answer.strip()) >= 2
    say(f"/save {tmp_path / 'a b.json'}", "/clear", session=session)
    assert session.turns == ()
    say('/system ""', f"/load {tmp_path / 'a b.json'}", "/bye", "never", session=session)
    assert [turn.user for turn in session.turns] == ["one", "three"]
    assert session.system == "be"
    for line, words in (
        ("/nonsense", "no command /nonsense"),
        ("/save", "needs the name of a file"),
        ("/undo 2", "takes no argument"),
    ):
        with pytest.raises(RequestError, match=words):
            say(line, session=session)


def test_each_answer_has_the_next_seed(say, llm):
    asked = []

    class Noted(ChatSession):
        def send(self, text, sampling_params=None):
            asked.append(sampling_params)
            return super().send(text, sampling_params)

    params = SamplingParams(temperature=1.0, seed=2**64 - 1, max_tokens=2)
    say("one", "two", session=Noted(llm), params=params)
    assert [each.seed for each in asked] == [2**64 - 1, 0]


def test_lines_that_go_on(monkeypatch):
    def read(text):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        reader = LineReader()
        return list(iter(reader.read, None))

    assert read('"""one\n/two\n\n  three"""\nfour') == [("one\n/two\n\n  three", False), ("four", False)]
    assert read('"""\none\n"""  \n"""two"""\n') == [("one", False), ("two", False)]
    assert read("one\\\ntwo \\\nthree\n") == [("one\ntwo \nthree", False)]
    assert read("one\\") == [("one", False)]
    assert read("/undo \n /undo\n") == [("/undo", True), ("/undo", False)]
    assert read("") == []
    with pytest.raises(RequestError, match="has no end"):
        read('"""one\n')
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    with pytest.raises(RequestError, match="not UTF-8"):
        LineReader().read()
    monkeypatch.setattr("sys.stdin", None)
    assert LineReader().read() is None


def test_ctrl_c_stops_an_answer_and_keeps_the_cache(say, llm, monkeypatch):
    session = ChatSession(llm, sampling_params=SamplingParams(temperature=0, max_tokens=60))
    burst, calls = llm.engine.burst, []

    def interrupting(steps, waiting):
        burst(steps, waiting)
        calls.append(steps)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(llm.engine, "burst", interrupting)
    _, err = say("one", "two", session=session, params=SamplingParams(temperature=0, max_tokens=60))
    assert [turn.finish_reason for turn in session.turns] == ["abort", "length"]
    assert "(stopped)" in err
    assert session.stats.last_prefilled <= len(session.turns[1].prompt_ids) + 1


def test_a_second_ctrl_c_interrupts(say, llm, monkeypatch):
    session = ChatSession(llm)

    def hanging(steps, waiting):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(llm.engine, "burst", hanging)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        say("one", session=session, params=SamplingParams(temperature=0, max_tokens=60))
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_at_the_prompt_ends_at_the_second(say, llm, monkeypatch, capsys):
    lines = ["one", KeyboardInterrupt, "two", KeyboardInterrupt, KeyboardInterrupt, "never"]

    def read(prompt=""):
        line = lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    session = ChatSession(llm)
    with pytest.raises(KeyboardInterrupt):
        say(session=session)
    assert [turn.user for turn in session.turns] == ["one", "two"]
    assert capsys.readouterr().err.count("Ctrl-C again ends") == 2
    assert lines == ["never"]


def test_figures_are_dim_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for kind, environment, dim in (
        (Terminal, {}, True),
        (Terminal, {"NO_COLOR": ""}, False),
        (io.StringIO, {}, False),
    ):
        stream = kind()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stderr", stream)
            patch.delenv("NO_COLOR", raising=False)
            patch.setenv("TERM", "xterm")
            for name, value in environment.items():
                patch.setenv(name, value)
            chat_repl.notice("figures")
        assert ("\x1b[2m" in stream.getvalue()) == dim


def test_in_a_terminal(tiny_model, tmp_path):
    """A whole talk: errors do not end it, Ctrl-C stops an answer, Ctrl-D ends it."""
    shell, terminal = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "specmemo_jax",
        "chat",
        "--model",
        str(tiny_model),
        "--max-context",
        "250",
    ]
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "SPECMEMO_CACHE": str(tmp_path)}
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True
    )
    os.close(terminal)
    seen = bytearray()

    def read():
        while True:
            try:
                data = os.read(shell, 4096)
            except OSError:
                return
            if not data:
                return
            seen.extend(data)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def until(words, count=1):
        for _ in range(1200):
            if seen.count(words) >= count:
                return
            time.sleep(0.05)
        raise AssertionError(f"no {words!r} in {bytes(seen)!r}")

    try:
        until(b">>> ")
        os.write(shell, b"/nonsense\n")
        until(b"no command /nonsense")
        until(b">>> ", 2)
        os.write(shell, b"hello\n")
        until(b"MiB]")
        until(b">>> ", 3)
        os.kill(process.pid, signal.SIGINT)
        until(b"Ctrl-C again ends")
        os.write(shell, b"/stats\n")
        until(b"plan's peak")
        until(b">>> ", 5)  # one after Ctrl-C, one after the figures: a Ctrl-D before its prompt is lost
        os.write(shell, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(shell)
