import os
from pathlib import Path

import pytest

from specmemo_jax.cli.sink import OutputError, Sink


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
