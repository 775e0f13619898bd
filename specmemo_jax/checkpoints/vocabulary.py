"""Tokenizers from the vocabularies that GGUF metadata and SentencePiece models hold.

Both become one JSON document in the spelling of the tokenizers library's tokenizer.json.
"""

import dataclasses
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specmemo_jax.errors import ConfigError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS_FIRST = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
}
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": _LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False},
        {**_BYTE_LEVEL, "use_regex": False},
    ],
}
# By the names that GGUF's tokenizer.ggml.pre uses.
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": _DIGITS_FIRST,
    "starcoder": _DIGITS_FIRST,
    "refact": _DIGITS_FIRST,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}


class UnsupportedVocabularyError(ConfigError):
    """No tokenizer can be built faithfully from what is there; token ids still work."""


@dataclasses.dataclass(frozen=True)
class VocabularyRecipe:
    """Everything a tokenizer needs: the document, and the names of its marked tokens."""

    document: Mapping[str, Any]
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    chat_template: str | None = None


def gguf_vocabulary(
    metadata: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> VocabularyRecipe:
    """Build from GGUF metadata; ``overrides`` replaces top-level parts of the document (a zoo recipe).

    Raises UnsupportedVocabularyError, naming the model or pre-tokenizer, where a faithful tokenizer
    is not known; ConfigError where the metadata contradicts itself.
    """

    def key(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    kind, tokens = key("model"), key("tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        found = "no tokenizer" if kind is None else f"tokenizer model {kind!r}"
        raise UnsupportedVocabularyError(
            f"the GGUF has {found}; 'gpt2' (BPE) or 'llama' (SentencePiece) would work"
        )
    types = key("token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens) or not all(isinstance(token, str) for token in tokens):
        raise ConfigError(
            f"tokenizer.ggml has {len(tokens)} tokens and {len(types)} token types; equal counts would work"
        )
    marked = {name: _token(tokens, key(f"{name}_token_id")) for name in ("bos", "eos", "unknown")}
    if kind == "gpt2":
        pre = key("pre", "not named")
        overridden = overrides is not None and "pre_tokenizer" in overrides
        if pre not in _PRE_TOKENIZERS and not overridden:
            raise UnsupportedVocabularyError(
                f"the GGUF's pre-tokenizer is {pre!r}; {', '.join(sorted(_PRE_TOKENIZERS))} would work"
            )
        llama3 = _PRE_TOKENIZERS.get(pre) is _LLAMA3
        document = _byte_level(
            tokens, types, key("merges") or [], _PRE_TOKENIZERS.get(pre), ignore_merges=llama3
        )
        adds_bos = llama3
    else:
        if key("remove_extra_whitespaces") or key("precompiled_charsmap"):
            raise UnsupportedVocabularyError(
                "the GGUF's SentencePiece model rewrites text, which is not supported here"
            )
        scores = key("scores")
        if not isinstance(scores, list) or len(scores) != len(tokens):
            raise ConfigError("tokenizer.ggml.scores must hold one number a token")
        document = _sentencepiece(tokens, types, scores, prefix_space=bool(key("add_space_prefix", True)))
        adds_bos = True
    bos = marked["bos"] if key("add_bos_token", adds_bos) else None
    eos = marked["eos"] if key("add_eos_token", False) else None
    document["post_processor"] = _wrap(tokens, bos, eos)
    document.update(overrides or {})
    template = metadata.get("tokenizer.chat_template")
    return VocabularyRecipe(document, marked["bos"], marked["eos"], marked["unknown"], template)


def sentencepiece_vocabulary(path: Path) -> VocabularyRecipe:
    """Build from a SentencePiece BPE ``tokenizer.model`` as Llama 1 and 2 ship it (bos added).

    Raises UnsupportedVocabularyError for another kind of model, ConfigError for a damaged file.
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for field, value in _protobuf(path.read_bytes()):
            if field == 1:
                piece = dict(_protobuf(value))
                score = piece.get(2, b"\0\0\0\0")
                pieces.append(
                    (piece[1].decode("utf-8"), struct.unpack("<f", score)[0], piece.get(3, _NORMAL))
                )
            elif field == 2:
                trainer = dict(_protobuf(value))
            elif field == 3:
                normalizer = dict(_protobuf(value))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise ConfigError(
            f"{path} is not a SentencePiece model ({error}); an intact copy would work"
        ) from error
    if not pieces:
        raise ConfigError(f"{path} is not a SentencePiece model (no pieces); an intact copy would work")
    if trainer.get(3, 1) != 2:
        raise UnsupportedVocabularyError(f"{path} is not a BPE model; a tokenizer.json beside it would work")
    if normalizer.get(2) or normalizer.get(4, 1):  # precompiled charsmap, remove_extra_whitespaces
        raise UnsupportedVocabularyError(
            f"{path} rewrites text before splitting; a tokenizer.json would work"
        )
    tokens, scores, types = map(list, zip(*pieces, strict=True))
    document = _sentencepiece(tokens, types, scores, prefix_space=bool(normalizer.get(3, 1)))
    marked = {name: name if name in tokens else None for name in ("<s>", "</s>", "<unk>")}
    document["post_processor"] = _wrap(tokens, marked["<s>"], None)
    return VocabularyRecipe(document, marked["<s>"], marked["</s>"], marked["<unk>"])


def _byte_level(
    tokens: Sequence[str],
    types: Sequence[int],
    merges: Sequence[str],
    pre_tokenizer: Mapping[str, Any] | None,
    *,
    ignore_merges: bool,
) -> dict[str, Any]:
    # Byte-level tokens hold no space, so the one space of a merge divides its halves.
    model = {
        "type": "BPE",
        "ignore_merges": ignore_merges,
        "merges": [merge.split(" ", 1) for merge in merges],
    }
    return _document(tokens, types, model, pre_tokenizer=pre_tokenizer, decoder=_BYTE_LEVEL)


def _sentencepiece(
    tokens: list[str], types: Sequence[int], scores: Sequence[float], *, prefix_space: bool
) -> dict[str, Any]:
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    has_bytes = _BYTE in types
    model = {
        "type": "BPE",
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": has_bytes,
        "merges": _merges_by_score(tokens, types, scores),
    }
    to_marks: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    from_marks: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    from_marks += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix_space:
        to_marks.insert(0, {"type": "Prepend", "prepend": "▁"})
        from_marks.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _document(
        tokens,
        types,
        model,
        normalizer={"type": "Sequence", "normalizers": to_marks},
        decoder={"type": "Sequence", "decoders": from_marks},
    )


def _merges_by_score(
    tokens: list[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose joined piece scores best; as ranked merges, that is
    every way to split a piece into two pieces, best piece first."""
    ids = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _NORMAL}
    ranked = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[i], i, left, right))
    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(ranked)]


def _document(
    tokens: Sequence[str],
    types: Sequence[int],
    model: Mapping[str, Any],
    *,
    pre_tokenizer: Mapping[str, Any] | None = None,
    normalizer: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any],
) -> dict[str, Any]:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ConfigError(f"the vocabulary names {len(tokens) - len(vocab)} tokens twice")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = {_UNKNOWN: True, _CONTROL: True, _USER_DEFINED: False}
    added = [
        {"id": i, "content": token, **flags, "special": special[kind]}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in special and token
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {**model, "vocab": vocab},
    }


def _wrap(tokens: Sequence[str], bos: str | None, eos: str | None) -> dict[str, Any] | None:
    if bos is None and eos is None:
        return None
    marks = [mark for mark in (bos, eos) if mark is not None]

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        before = [{"SpecialToken": {"id": bos, "type_id": type_id}}] if bos is not None else []
        after = [{"SpecialToken": {"id": eos, "type_id": type_id}}] if eos is not None else []
        return [*before, {"Sequence": {"id": sequence, "type_id": type_id}}, *after]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            mark: {"id": mark, "ids": [tokens.index(mark)], "tokens": [mark]} for mark in marks
        },
    }


def _token(tokens: Sequence[str], index: Any) -> str | None:
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise ConfigError(f"a special token has id {index!r}, the vocabulary ends at {len(tokens) - 1}")
    return tokens[index]


def _protobuf(data: bytes) -> list[tuple[int, Any]]:
    """The fields of one protobuf message: integers, and bytes for everything else. Raises ValueError."""
    fields: list[tuple[int, Any]] = []
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 2, 5):
            size, at = (8, at) if wire == 1 else (4, at) if wire == 5 else _varint(data, at)
            if size > len(data) - at:
                raise ValueError("truncated")
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"wire type {wire}")
        fields.append((tag >> 3, value))
    return fields


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("truncated")
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number is too long")
