import json

import numpy as np
import pytest

from specmemo_jax.checkpoints.tokenizer import Tokenizer
from specmemo_jax.errors import RequestError
from specmemo_jax.train import data, start
from specmemo_jax.train.data import Conversation

END = 2  # <|im_end|> of tests/conftest.py's tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return Tokenizer.from_folder(tiny_model)


def chat(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_answers_are_the_targets_own_tokens_and_the_end_of_their_turn(tokenizer):
    c = data.from_messages(chat("hi", "yo", "and", "no"), tokenizer, END)
    shown = tokenizer.decode(c.ids, skip_special_tokens=False)
    wanted = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    assert shown == wanted + "<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"
    answers = [tokenizer.decode(c.ids[begin:end], skip_special_tokens=False) for begin, end in c.answers]
    assert answers == ["yo<|im_end|>", "no<|im_end|>"]


def test_an_answer_that_was_cut_short_has_no_end(tokenizer):
    c = data.from_messages(chat("hi", "yo"), tokenizer, END, complete=False)
    assert c.ids[-1] != END


def test_end_of_turn_is_what_the_template_closes_with(tokenizer):
    assert data.end_of_turn(tokenizer, (0, END)) == END


def test_a_file_of_chats_names_the_line_that_is_none(tokenizer, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": chat("a", "b")}) + "\n\n" + '{"messages": 3}\n')
    with pytest.raises(RequestError, match="line 3"):
        data.read_jsonl(file, tokenizer, (END,))


def test_tokens_are_kept_and_read_back(tmp_path):
    found = [Conversation([1, 2, 3], [(1, 2)], 2**64 - 1), Conversation([4, 5, 6, 7], [(1, 2), (3, 4)], 5)]
    data.save_tokens(tmp_path / "some.npz", found)
    again = data.load_tokens(tmp_path / "some.npz")
    assert [Conversation(list(c.ids), c.answers, c.question) for c in again] == found
    (tmp_path / "other.npz").write_bytes(b"x")
    with pytest.raises(RequestError, match=r"other\.npz"):
        data.load_tokens(tmp_path / "other.npz")


def test_packing_keeps_conversations_whole_and_counts_what_is_cut():
    sizes = [5, 3, 9, 2, 12]
    many = [Conversation(list(range(10, 10 + n)), [(n - 1, n)], i) for i, n in enumerate(sizes)]
    rows, cut = data.pack_rows(many, 10)
    assert (cut.truncated, cut.tokens, cut.dropped) == (0, 0, 1)  # the last one's answer lies beyond
    assert rows.num_tokens == 5 + 3 + 9 + 2
    for row in range(len(rows.tokens)):
        for segment in range(1, rows.segments[row].max() + 1):
            held = rows.tokens[row][rows.segments[row] == segment]
            assert held.tolist() == list(range(10, 10 + len(held)))
            assert np.flatnonzero(rows.answers[row][rows.segments[row] == segment]) == len(held) - 1
    assert not rows.answers[rows.segments == 0].any()
    _, cut = data.pack_rows([Conversation(list(range(12)), [(2, 12)], 0)], 10)
    assert (cut.truncated, cut.tokens, cut.dropped) == (1, 2, 0)


def test_what_is_held_out_depends_on_the_question_alone(tokenizer):
    def of(question, answer):
        return data.is_held_out(data.from_messages(chat(question, answer), tokenizer, END))

    questions = [f"question {i}" for i in range(400)]
    held = [question for question in questions if of(question, "a")]
    assert 5 <= len(held) <= 40
    assert held == [question for question in questions if of(f" {question} ", "other")]


def test_the_draft_vocabulary_holds_the_frequent_tokens_and_the_end():
    ids = start.draft_ids(np.array([5, 5, 9, 9, 9, 3]), 3, 12, (11,))
    assert ids.tolist() == [5, 9, 11]
    assert start.draft_ids(np.array([5]), None, 4, (1,)).tolist() == [0, 1, 2, 3]
