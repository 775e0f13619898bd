import os
import signal
from pathlib import Path

import pytest

from specmemo_jax.files.rows import OutputError, Sink


def test_rows_are_on_disk_at_once_and_replace_an_older_file(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("older\n" * 10)
    with Sink(str(path)) as sink:
        assert path.read_text().startswith("older")
        sink.write("ä\n")
        assert path.read_text(encoding="utf-8") == "ä\n"
        sink.write("b\n")
    assert path.read_text(encoding="utf-8") == "ä\nb\n"


def test_a_new_file_without_rows_is_not_left_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), Sink(str(tmp_path / "out.jsonl")):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_a_bad_path_is_refused_at_once(tmp_path):
    with pytest.raises(OutputError, match="No such file or directory"):
        Sink(str(tmp_path / "no" / "out.jsonl"))
    with pytest.raises(OutputError, match="Is a directory"):
        Sink(str(tmp_path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device_is_named():
    message = "cannot write to /dev/full: No space left on device; 0 answers"
    with Sink("/dev/full") as sink, pytest.raises(OutputError, match=message):
        sink.write("a\n")


def test_parts_are_on_disk_at_once_and_no_rows(tmp_path):
    path = tmp_path / "out.txt"
    with Sink(str(path)) as sink:
        sink.write_part("a pie")
        assert path.read_text() == "a pie"
        sink.write_part("ce")
        assert sink.rows == 0
        sink.write("\n")
        assert sink.rows == 1
    assert path.read_text() == "a piece\n"


def test_ctrl_c_waits_for_the_row(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    real, signals = os.write, [signal.SIGINT]

    def interrupted(descriptor, data):
        while signals:
            signal.raise_signal(signals.pop())
        return real(descriptor, data[:3])

    monkeypatch.setattr("os.write", interrupted)
    with Sink(str(path)) as sink:
        with pytest.raises(KeyboardInterrupt):
            sink.write("whole\n")
        sink.write("again\n")
        signals += [signal.SIGINT] * 2
        with pytest.raises(KeyboardInterrupt):  # twice: somebody means it
            sink.write("never\n")
    assert path.read_text() == "whole\nagain\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_row_that_does_not_fit_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    with Sink(str(path)) as sink:
        sink.write("whole\n")
        real, calls = os.write, []

        def fills_up(descriptor, data):
            calls.append(data)
            if len(calls) > 1:
                raise OSError(28, "No space left on device")
            return real(descriptor, data[:3])

        monkeypatch.setattr("os.write", fills_up)
        with pytest.raises(OutputError, match="1 answers are there"):
            sink.write("a longer row\n")
    assert path.read_text() == "whole\n"
