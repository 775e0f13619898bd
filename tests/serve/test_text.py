"""Text as ids come: pieces are whole characters, end before stop strings, and add up to the answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from specmemo_jax.checkpoints.tokenizer import Tokenizer
from specmemo_jax.serve.text import AnswerText
from specmemo_jax.testing import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SIZE = TOKENIZER.vocab_size


def stream(ids, chunks, **options):
    """Feed ``ids`` in chunks: the text object, the ids it took, and the pieces in order."""
    answer, pieces, taken, at = AnswerText(TOKENIZER, **options), [], 0, 0
    for size in chunks:
        part = ids[at : at + size]
        at += size
        taken += answer.feed(part)
        pieces.append(answer.piece())
        if answer.stop_reason is not None:
            break
    answer.finish()
    return answer, taken, [*pieces, answer.piece()]


def chunked(draw, n):
    chunks = []
    while sum(chunks) < n:
        chunks.append(draw(st.integers(1, 5)))
    return chunks


def stable_text(ids):
    """Text of ids whose last character may not be whole."""
    return TOKENIZER.decode(ids).rstrip("\ufffd")


@settings(max_examples=400, deadline=None)
@given(data=st.data(), ids=st.lists(st.integers(0, SIZE - 1), max_size=40))
def test_pieces_add_up(data, ids):
    answer, taken, pieces = stream(ids, chunked(data.draw, len(ids)))
    assert "".join(pieces) == answer.text == TOKENIZER.decode(ids)
    assert taken == len(ids)
    assert all("\ufffd" not in piece or piece in TOKENIZER.decode(ids) for piece in pieces)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), ids=st.lists(st.integers(0, SIZE - 1), min_size=4, max_size=40))
def test_stop_strings_are_found_wherever_they_span(data, ids):
    whole = stable_text(ids)
    spans = st.tuples(st.integers(0, max(len(whole) - 1, 0)), st.integers(1, 6))
    stop = [
        s
        for at, n in data.draw(st.lists(spans, max_size=3))
        if (s := whole[at : at + n]) and "\ufffd" not in s
    ]
    stop += data.draw(st.lists(st.sampled_from(["END", "abab", "never there", "日本", "ingthe"]), max_size=2))
    if not stop:
        return
    min_tokens = data.draw(st.sampled_from([0, 0, 3, 10]))
    answer, taken, pieces = stream(ids, chunked(data.draw, len(ids)), stop=stop, min_tokens=min_tokens)
    # The plain rule: one id more at a time, until a stop string stands in what came after min_tokens.
    start = len(stable_text(ids[:min_tokens]))
    for n in range(min_tokens + 1, len(ids) + 1):
        found = [(at, s) for s in stop if (at := stable_text(ids[:n]).find(s, start)) >= 0]
        if found:
            at, reason = min(found)
            assert (answer.text, answer.stop_reason, taken) == (whole[:at], reason, n)
            break
    else:
        assert answer.stop_reason is None
        assert (answer.text, taken) == (TOKENIZER.decode(ids), len(ids))
    assert "".join(pieces) == answer.text
    assert not any(s in "".join(pieces)[start:] for s in stop)


def test_characters_are_never_split():
    ids = [i for c in "é日本🙂" for i in TOKENIZER.encode(c)]
    assert len(ids) > 8
    _, _, pieces = stream(ids, [1] * len(ids))
    assert [piece for piece in pieces if piece] == ["é", "日", "本", "🙂"]
    answer, _, pieces = stream(ids[:-1], [1] * (len(ids) - 1))
    assert "".join(pieces) == answer.text == "é日本\ufffd"


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens(skip):
    answer, _, _ = stream([*TOKENIZER.encode("ab"), 0], [1, 1, 1], skip_special_tokens=skip)
    assert answer.text == ("ab" if skip else "ab<eos>")


def byte_fallback():
    """As Llama 2's: a piece a word, and a token a byte for the rest."""
    pieces = ["▁the", "▁a", "b", "ing", "é", "日", "▁"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {p: 256 + i for i, p in enumerate(pieces)}
    core = Core(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=core))


BYTES = byte_fallback()
fallback_ids = st.one_of(
    st.integers(256, 262), st.sampled_from([0x0A, 0xF0, 0x9F, 0x99, 0x82, 0xC3, 0xA9, 0x41])
)


@settings(max_examples=400, deadline=None)
@given(ids=st.lists(fallback_ids, max_size=30))
def test_bytes_that_make_no_character_lose_nothing_else(ids):
    answer = AnswerText(BYTES)
    pieces = []
    for token in ids:
        answer.feed([token])
        pieces.append(answer.piece())
    answer.finish()
    assert "".join([*pieces, answer.piece()]) == answer.text
    assert [c for c in answer.text if c in "theaingb日"] == [
        c for c in BYTES.decode(ids) if c in "theaingb日"
    ]


@given(st.text(alphabet="thea bing日é🙂\n", max_size=20))
def test_fallback_text_comes_back_whole(text):
    ids = [id for c in text for id in BYTES.fast.backend_tokenizer.encode(c, add_special_tokens=False).ids]
    answer = AnswerText(BYTES)
    answer.feed(ids)
    answer.finish()
    assert answer.text == BYTES.decode(ids)
