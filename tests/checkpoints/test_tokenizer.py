import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from specmemo_jax.checkpoints import resolve
from specmemo_jax.checkpoints.tokenizer import Tokenizer, load_tokenizer
from specmemo_jax.checkpoints.vocabulary import (
    UnsupportedVocabularyError,
    gguf_vocabulary,
    sentencepiece_vocabulary,
)
from specmemo_jax.errors import ConfigError, RequestError

DATA = Path(__file__).parent.parent / "data"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
TURNS = [
    {"role": "user", "content": "be a"},
    {"role": "assistant", "content": "bea"},
    {"role": "user", "content": "ab"},
]


def bpe_metadata(pre: Any = "smollm", **changes) -> dict:
    """A byte-level vocabulary: the 256 bytes, a few merges, two marks."""
    letters = [chr(c) if 33 <= c < 127 or 161 <= c < 173 or 174 <= c < 256 else None for c in range(256)]
    spare = iter(range(256, 400))
    alphabet = [letter or chr(next(spare)) for letter in letters]
    merges = ["a b", "Ġ b", "Ġb e", "1 2"]
    tokens = ["<|im_start|>", "<|im_end|>", *alphabet, *(merge.replace(" ", "") for merge in merges)]
    meta = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3, 3] + [1] * (len(tokens) - 2),
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    named = {f"tokenizer.ggml.{key}": value for key, value in (meta | changes).items()}
    return named | {"tokenizer.chat_template": CHATML}


def build(metadata, overrides=None) -> Tokenizer:
    return Tokenizer._build(gguf_vocabulary(metadata, overrides), "test", None)


def test_byte_level_round_trip_and_marks():
    tokenizer = build(bpe_metadata())
    text = "ab be ünï 1212 <|im_end|>"
    ids = tokenizer.encode(text)
    assert ids[-1] == 1
    assert ids.count(1) == 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == text.removesuffix("<|im_end|>")
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (262, 0, (1,))


def test_smollm_splits_digits_and_gpt2_does_not():
    digits = build(bpe_metadata()).encode("12")
    assert len(digits) == 2
    assert len(build(bpe_metadata(pre="gpt-2")).encode("12")) == 1
    recipe = json.loads((resolve_recipe()).read_text())
    assert (
        build(bpe_metadata(pre="unheard-of"), {"pre_tokenizer": recipe["pre_tokenizer"]}).encode("12")
        == digits
    )


def resolve_recipe() -> Path:
    from specmemo_jax.checkpoints import zoo_entry

    entry = zoo_entry("smollm2-135m-instruct")
    assert entry is not None
    assert entry.tokenizer_recipe is not None
    return entry.tokenizer_recipe


def test_llama3_adds_bos_and_keeps_three_digits_together():
    tokenizer = build(bpe_metadata(pre="llama-bpe"))
    assert tokenizer.encode("a")[0] == 0
    assert tokenizer.encode("a") == [0, *tokenizer._plain_ids("a")]
    assert tokenizer.chat_ids([{"role": "user", "content": "a"}])[:2] != [0, 0]
    assert len(tokenizer._plain_ids("1212")) == 3  # 121 | 2: "12", "1", "2"
    assert build(bpe_metadata(pre="llama-bpe", add_bos_token=False)).encode("a") == tokenizer._plain_ids("a")


def test_unknown_vocabularies_are_named():
    with pytest.raises(UnsupportedVocabularyError, match="pre-tokenizer is 'qwen2'"):
        build(bpe_metadata(pre="qwen2"))
    with pytest.raises(UnsupportedVocabularyError, match="tokenizer model 'bert'"):
        build(bpe_metadata(model="bert"))
    with pytest.raises(UnsupportedVocabularyError, match="no tokenizer"):
        build({})
    for changes in (
        {"eos_token_id": 999},
        {"token_type": [1]},
        {"merges": ["xx yy"]},
        {"tokens": ["a"] * 262},
    ):
        with pytest.raises(ConfigError):
            build(bpe_metadata(**changes))


def sentencepiece_cases():
    return json.loads((DATA / "tiny_sentencepiece.json").read_text(encoding="utf-8"))


def test_sentencepiece_model_as_sentencepiece_does(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((DATA / "tiny_sentencepiece.model").read_bytes())
    tokenizer, reason = load_tokenizer(tmp_path)
    assert tokenizer is not None, reason
    for case in sentencepiece_cases():
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["text"]
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.chat_ids(TURNS[:1])


def test_sentencepiece_out_of_a_gguf(tmp_path):
    tokens, scores, types = sentencepiece_lists()
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer, reason = load_tokenizer(tmp_path / "m.gguf")
    assert tokenizer is not None, reason
    for case in sentencepiece_cases():
        assert tokenizer.encode(case["text"]) == case["ids"]


def sentencepiece_lists():
    from specmemo_jax.checkpoints.vocabulary import _protobuf

    fields = _protobuf((DATA / "tiny_sentencepiece.model").read_bytes())
    pieces = [dict(_protobuf(value)) for field, value in fields if field == 1]
    scores = [float(np.frombuffer(piece.get(2, bytes(4)), "<f4")[0]) for piece in pieces]
    return [piece[1].decode() for piece in pieces], scores, [piece.get(3, 1) for piece in pieces]


@pytest.mark.parametrize("keep", [0, 1, 17, 5000])
def test_damaged_sentencepiece_models(tmp_path, keep):
    path = tmp_path / "tokenizer.model"
    path.write_bytes((DATA / "tiny_sentencepiece.model").read_bytes()[:keep])
    with pytest.raises(ConfigError):
        sentencepiece_vocabulary(path)


def test_next_turn_continues_the_chat_exactly():
    tokenizer = build(bpe_metadata())
    first = tokenizer.chat_ids(TURNS[:1])
    answer = tokenizer._plain_ids("bea")
    assert first + answer + tokenizer.next_turn_ids(TURNS) == tokenizer.chat_ids(TURNS)


def test_next_turn_where_the_suffix_starts_with_a_space(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((DATA / "tiny_sentencepiece.model").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(INST)
    tokenizer = Tokenizer.from_folder(tmp_path)
    whole = tokenizer.chat_ids(TURNS)
    suffix = tokenizer.next_turn_ids(TURNS)
    space = sentencepiece_lists()[0].index("▁")
    assert whole[-len(suffix) :] == suffix
    assert suffix[:3] == [space, 2, 1]  # one "▁", not the two of a text that starts with a space


def test_answers_that_look_like_the_placeholder_do_not_confuse_it():
    tokenizer = build(bpe_metadata())
    turns = [*TURNS[:2], {"role": "user", "content": "answer0placeholder answer1placeholder"}]
    assert tokenizer.decode(tokenizer.next_turn_ids(turns)).count("answer0placeholder") == 1


@pytest.mark.parametrize("messages", [[], TURNS[:1], TURNS[:2]])
def test_next_turn_needs_an_answer_and_a_question(messages):
    with pytest.raises(RequestError, match="assistant message and a user message"):
        build(bpe_metadata()).next_turn_ids(messages)


def test_template_errors_are_one_line():
    template = "{{ raise_exception('roles must\nalternate') }}"
    tokenizer = build(bpe_metadata() | {"tokenizer.chat_template": template})
    with pytest.raises(RequestError, match=r"refuses these messages \(roles must\)") as caught:
        tokenizer.chat_ids(TURNS)
    assert "\n" not in str(caught.value)
    hostile = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RequestError, match="refuses"):
        build(bpe_metadata() | {"tokenizer.chat_template": hostile}).chat_ids(TURNS)


def test_folder_with_tokenizer_json(tmp_path):
    built = build(bpe_metadata())
    built.fast.save_pretrained(tmp_path)
    tokenizer, reason = load_tokenizer(tmp_path)
    assert tokenizer is not None, reason
    assert tokenizer.encode("ab be 12") == built.encode("ab be 12")
    assert tokenizer.chat_ids(TURNS) == built.chat_ids(TURNS)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)


def test_folder_without_tokenizer(tmp_path):
    tokenizer, reason = load_tokenizer(tmp_path)
    assert tokenizer is None
    assert "no tokenizer.json or tokenizer.model" in reason


@pytest.mark.weights
def test_default_model_tokenises_mt_bench_as_its_reference():
    found = resolve("smollm2-135m-instruct")
    tokenizer, reason = load_tokenizer(found.path, found.tokenizer_recipe)
    assert tokenizer is not None, reason
    for case in json.loads((DATA / "mt_bench_prompt_ids.json").read_text(encoding="utf-8")):
        first = [{"role": "user", "content": case["turns"][0]}]
        assert tokenizer.chat_ids(first) == case["prompt_ids"]
        answer = case["new_ids"]
        answer = answer[:-1] if answer[-1] in tokenizer.eos_token_ids else answer
        turns = [
            *first,
            {"role": "assistant", "content": tokenizer.decode(answer)},
            {"role": "user", "content": case["turns"][1]},
        ]
        assert case["prompt_ids"] + answer + tokenizer.next_turn_ids(turns) == case["next_prompt_ids"]
