import io
import json

import pytest

from specmemo_jax.errors import RequestError
from specmemo_jax.prompts import prompts_from_texts, read_prompts


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
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "a"}')))
    (record,) = read_prompts("-")
    assert record.place == "standard input, line 1"


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


def test_texts_are_numbered():
    assert [(r.id, r.text, r.line) for r in prompts_from_texts(["a", "b"])] == [
        (1, "a", None),
        (2, "b", None),
    ]


@pytest.mark.parametrize("text", ["", "  ", "\udcff"])
def test_bad_texts_are_refused(text):
    with pytest.raises(RequestError, match="prompt 2: "):
        prompts_from_texts(["a", text])
