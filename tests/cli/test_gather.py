import io

import pytest
import typer

from specmemo_jax.cli.generate import gather


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stdin(monkeypatch):
    def install(data: bytes, kind: type[io.TextIOWrapper] = io.TextIOWrapper) -> None:
        monkeypatch.setattr("sys.stdin", kind(io.BytesIO(data)))

    return install


def test_a_pipe_is_one_text_prompt(stdin):
    stdin(b"Why?\nBecause?\n")
    (record,) = gather(None, None, None, None)
    assert (record.text, record.place) == ("Why?\nBecause?", "standard input")


def test_a_pipe_beside_other_sources_is_left_alone(stdin, tmp_path):
    stdin(b"not read")
    assert [record.text for record in gather(["a"], None, None, None)] == ["a"]
    file = tmp_path / "a.txt"
    file.write_text("from a file")
    assert [record.text for record in gather(None, [str(file)], None, None)] == ["from a file"]


def test_files_keep_their_order_and_names(tmp_path):
    files = [tmp_path / "b.txt", tmp_path / "a.txt"]
    for file in files:
        file.write_text(f"in {file.name}")
    records = gather(None, list(map(str, files)), None, None)
    assert [(record.id, record.text) for record in records] == [(str(f), f"in {f.name}") for f in files]


def test_nothing_on_a_terminal_shows_an_example(stdin, monkeypatch):
    stdin(b"", Terminal)
    with pytest.raises(typer.BadParameter, match="for example: specmemo generate"):
        gather(None, None, None, None)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(typer.BadParameter, match="no prompt"):
        gather(None, None, None, None)


@pytest.mark.parametrize(
    ("texts", "files", "jsonl", "message"),
    [
        (["a"], ["b"], None, "found arguments and --file"),
        (["a"], None, "b", "found arguments and --prompts"),
        (None, ["a"], "b", "found --file and --prompts"),
        (["-", "-"], None, None, "only once"),
        (None, ["-", "-"], None, "only once"),
    ],
)
def test_sources_that_contradict_each_other(texts, files, jsonl, message):
    with pytest.raises(typer.BadParameter, match=message):
        gather(texts, files, jsonl, None)


def test_the_prompts_are_not_overwritten(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("a")
    for files, jsonl in (([str(file)], None), (None, str(file))):
        with pytest.raises(typer.BadParameter, match="is the prompts file"):
            gather(None, files, jsonl, str(file))
