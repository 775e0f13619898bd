import io
import json

import pytest

from specmemo_jax.errors import RequestError
from specmemo_jax.files.prompts import prompts_from_files, prompts_from_texts, read_prompts


def write(tmp_path, *lines: str | bytes):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


def test_reads_mt_bench_as_it_is(tmp_path):
    path = write(tmp_path, '{"question_id": 81, "category": "writing", "turns": ["First?", "Second?"]}', "")
    (record,) = read_prompts(path)
    assert record.id == 81
    assert record.line == 1
    assert record.messages == ({"role": "user", "content": "First?"},)
    assert record.later_turns == ("Second?",)
    assert record.num_turns == 2
    assert record.labels == {"question_id": 81, "category": "writing"}


def test_reads_texts_ids_and_messages(tmp_path):
    path = write(
        tmp_path,
        "\ufeff" + '{"prompt": "héllo"}',
        "   ",
        '{"prompt": [1, 0, 5], "id": "x"}\r',
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "n"}]}',
    )
    text, ids, chat = read_prompts(path)
    assert (text.id, text.line, text.text) == (1, 1, "héllo")
    assert (ids.id, ids.line, ids.token_ids) == ("x", 3, (1, 0, 5))
    assert chat.messages == ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    assert chat.num_turns == 1


def test_reads_standard_input(monkeypatch):
    stdin(monkeypatch, b'{"prompt": "a"}')
    (record,) = read_prompts("-")
    assert record.place == "standard input, line 1"


def stdin(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_line_has_sampling_parameters_of_its_own(tmp_path):
    path = write(
        tmp_path,
        '{"prompt": "a", "params": {"temperature": 0.7, "seed": 3}}',
        '{"prompt": "a", "params": null}',
    )
    assert [record.params for record in read_prompts(path)] == [{"temperature": 0.7, "seed": 3}, {}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "not JSON"),
        ('["a"]', "a JSON object is expected, found a list"),
        ("{}", "found no key"),
        ('{"text": "a"}', "found 'text'"),
        ('{"prompt": "a", "turns": ["a"]}', "found turns and prompt"),
        ('{"prompt": ""}', "the prompt is empty"),
        ('{"prompt": " \\n"}', "the prompt is empty"),
        ('{"prompt": []}', "the prompt is empty"),
        ('{"prompt": null}', "a text is expected, found null"),
        ('{"prompt": [1, -2]}', "holds -2"),
        ('{"prompt": [1, true]}', "holds True"),
        ('{"prompt": [1.0]}', "holds 1.0"),
        ('{"prompt": "\\ud800"}', "not valid Unicode at character 0"),
        ('{"turns": []}', "found an empty list"),
        ('{"turns": "a"}', "found a text"),
        ('{"turns": ["a", ""]}', "turn 2: the prompt is empty"),
        ('{"messages": []}', "found an empty list"),
        ('{"messages": ["a"]}', "message 1: "),
        ('{"messages": [{"role": "user"}]}', "message 1: a text is expected, found null"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "an assistant's",
        ),
        ('{"question_id": [1], "prompt": "a"}', "question_id must be a string or an integer"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "a", "params": [0.7]}', '"params" must be an object'),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path, json.dumps({"prompt": "fine"}), line)
    with pytest.raises(RequestError) as caught:
        read_prompts(path)
    assert f"{path}, line 2" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(RequestError, match="holds no prompts"):
        read_prompts(write(tmp_path, "", " "))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"none\.jsonl: No such file or directory"):
        read_prompts(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"one\n\ntwo\n", "one\n\ntwo"),
        (b"\xef\xbb\xbfh\xc3\xa9llo\r\n", "héllo"),
        (b"two breaks\n\n", "two breaks\n"),
        (b'{"prompt": "not read as JSON"}', '{"prompt": "not read as JSON"}'),
    ],
)
def test_a_text_file_is_one_prompt(tmp_path, monkeypatch, content, text):
    path = tmp_path / "question.txt"
    path.write_bytes(content)
    (record,) = prompts_from_files([str(path)])
    assert (record.text, record.id, record.place, record.line) == (text, str(path), str(path), None)
    stdin(monkeypatch, content)
    (piped,) = prompts_from_files(["-"])
    assert (piped.text, piped.place) == (text, "standard input")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the prompt is empty"),
        (b"\xef\xbb\xbf \n", "the prompt is empty"),
        (b"\x89PNG\r\n", "not UTF-8 text .* at byte 0"),
        (b"ab\0c", "not text .* at character 2"),
        ("two".encode("utf-16"), "not UTF-8 text"),
    ],
)
def test_files_that_are_no_text_are_refused(tmp_path, content, message):
    path = tmp_path / "question.txt"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message) as caught:
        prompts_from_files([path])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    with pytest.raises(RequestError, match=r"none\.txt: No such file or directory; a text file"):
        prompts_from_files([tmp_path / "none.txt"])
    with pytest.raises(RequestError, match="Is a directory"):
        prompts_from_files([tmp_path])
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(RequestError, match="standard input: it is closed"):
        prompts_from_files(["-"])


def test_a_dash_among_texts_is_standard_input(monkeypatch):
    stdin(monkeypatch, b"piped\n")
    assert [(r.id, r.text, r.place) for r in prompts_from_texts(["a", "-"])] == [
        (1, "a", "prompt 1"),
        (2, "piped", "standard input"),
    ]


def test_texts_are_numbered():
    assert [(r.id, r.text, r.line) for r in prompts_from_texts(["a", "b"])] == [
        (1, "a", None),
        (2, "b", None),
    ]


@pytest.mark.parametrize("text", ["", "  ", "\udcff"])
def test_bad_texts_are_refused(text):
    with pytest.raises(RequestError, match="prompt 2: "):
        prompts_from_texts(["a", text])
