"""Text to token ids and back, and chats to ids, over a transformers fast tokenizer."""

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specmemo_jax.checkpoints.gguf_header import read_gguf_header
from specmemo_jax.checkpoints.vocabulary import (
    UnsupportedVocabularyError,
    VocabularyRecipe,
    gguf_vocabulary,
    sentencepiece_vocabulary,
)
from specmemo_jax.errors import ConfigError, RequestError
from specmemo_jax.files.json_lines import not_unicode

Message = Mapping[str, Any]


def load_tokenizer(path: str | Path, recipe: str | Path | None = None) -> tuple["Tokenizer | None", str]:
    """The tokenizer of a model folder or ``.gguf`` file, or None and one line saying why there is none.

    ``recipe``: a zoo model's tokenizer_recipe.json, for GGUF files. Raises ConfigError when there is
    a tokenizer but it is damaged.
    """
    path = Path(path)
    try:
        if path.is_dir():
            ggufs = sorted(path.glob("*.gguf"))
            if len(ggufs) == 1 and not any(
                (path / name).exists() for name in ("tokenizer.json", "tokenizer.model")
            ):
                return Tokenizer.from_gguf(ggufs[0], recipe), ""
            return Tokenizer.from_folder(path), ""
        return Tokenizer.from_gguf(path, recipe), ""
    except UnsupportedVocabularyError as error:
        return None, str(error)


class Tokenizer:
    """A thin wrapper: what the engine asks of a tokenizer and nothing more.

    ``fast`` is the transformers tokenizer underneath, for whoever needs the rest.
    """

    def __init__(self, fast: Any):
        self.fast = fast
        self._lock = threading.Lock()  # the library's encoder and decoder refuse a second thread

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """From ``tokenizer.json``, or a SentencePiece ``tokenizer.model``, and what lies beside it
        (tokenizer_config.json, chat_template.jinja). Runs no code of the folder's.

        Raises UnsupportedVocabularyError when neither is there, ConfigError when it is damaged.
        """
        from transformers import PreTrainedTokenizerFast

        folder = Path(folder)
        if (folder / "tokenizer.json").exists():
            try:
                return cls(PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True))
            except Exception as error:  # the tokenizers library raises bare Exception
                raise ConfigError(
                    f"cannot read the tokenizer in {folder} ({_first_line(error)}); an intact copy would work"
                ) from error
        if not (folder / "tokenizer.model").exists():
            raise UnsupportedVocabularyError(f"{folder} has no tokenizer.json or tokenizer.model")
        recipe = sentencepiece_vocabulary(folder / "tokenizer.model")
        return cls._build(recipe, str(folder), _chat_template(folder))

    @classmethod
    def from_gguf(cls, path: str | Path, recipe: str | Path | None = None) -> "Tokenizer":
        """From a GGUF file's metadata, with the parts of ``recipe`` (JSON, spelled as in tokenizer.json)
        laid over it.

        Raises UnsupportedVocabularyError, naming the pre-tokenizer or model, where no faithful tokenizer
        is known; ConfigError or WeightsError when the file is damaged.
        """
        overrides = None
        if recipe is not None:
            try:
                overrides = json.loads(Path(recipe).read_text(encoding="utf-8"))
                overrides.pop("comment", None)
            except (OSError, ValueError, AttributeError) as error:
                raise ConfigError(f"cannot read {recipe}: {error}") from error
        return cls._build(gguf_vocabulary(read_gguf_header(path).metadata, overrides), str(path), None)

    @classmethod
    def _build(cls, recipe: VocabularyRecipe, where: str, chat_template: str | None) -> "Tokenizer":
        import tokenizers
        from transformers import PreTrainedTokenizerFast

        try:
            backend = tokenizers.Tokenizer.from_str(json.dumps(recipe.document))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ConfigError(f"{where}: the tokenizer is damaged ({_first_line(error)})") from error
        fast = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=recipe.bos_token,
            eos_token=recipe.eos_token,
            unk_token=recipe.unk_token,
            chat_template=chat_template or recipe.chat_template,
            clean_up_tokenization_spaces=False,
            local_files_only=True,  # or transformers asks the hub about large vocabularies
        )
        return cls(fast)

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows, added tokens included (the model's table may be larger)."""
        return len(self.fast)

    @property
    def bos_token_id(self) -> int | None:
        """The id that opens a sequence, or None."""
        return self.fast.bos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's own end token; the model's full list is in its generation defaults."""
        return () if self.fast.eos_token_id is None else (self.fast.eos_token_id,)

    @property
    def has_chat_template(self) -> bool:
        """Whether chats can be turned into ids."""
        return self.fast.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, with the special tokens that the tokenizer adds (bos, for most Llamas)."""
        _checked(text)
        with self._lock:
            return list(self.fast.encode(text))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``."""
        with self._lock:
            return self.fast.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )

    def first_difference(self, other: "Tokenizer") -> str | None:
        """The first id that means another token in ``other``, in words; None if all ids mean the same."""
        mine, theirs = ({i: t for t, i in x.fast.get_vocab().items()} for x in (self, other))
        for i in sorted(mine.keys() | theirs.keys()):
            if mine.get(i) != theirs.get(i):
                here, there = (repr(table[i]) if i in table else "nothing" for table in (mine, theirs))
                return f"id {i} is {here} in the one and {there} in the other"
        return None

    def bad_word_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Token sequences that spell ``words``: each at the start of a text and after a space."""
        sequences: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word.lstrip(" "), " " + word.lstrip(" ")):
                if ids := self._plain_ids(text):
                    sequences[tuple(ids)] = None
        return [list(ids) for ids in sequences]

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat, up to the opening of the assistant's next answer. Raises RequestError."""
        return self._plain_ids(self._render(messages))

    def next_turn_ids(self, messages: Sequence[Message]) -> list[int]:
        """What follows the last assistant answer's own text: its closing, the turns after it, and the
        opening of the next answer.

        ``messages`` ends ``..., assistant, user``. The answer's ids are the caller's already, so the chat
        is rendered with a placeholder in its place and never tokenised again. Raises RequestError.
        """
        last = max(
            (i for i, message in enumerate(messages) if message.get("role") == "assistant"), default=None
        )
        if last is None or last == len(messages) - 1:
            raise RequestError("a next turn needs an assistant message and a user message after it")
        mark = self._unused_word(messages)
        rendered = self._render(
            [*messages[:last], {**messages[last], "content": mark}, *messages[last + 1 :]]
        )
        before, found, after = rendered.rpartition(mark)
        if not found or mark in before:
            raise RequestError(
                "the chat template does not show each assistant message once; token ids would work"
            )
        # With the mark before it, the suffix is split as inside a text: no leading space of its own.
        alone, together = self._plain_ids(mark), self._plain_ids(mark + after)
        return together[len(alone) :] if together[: len(alone)] == alone else self._plain_ids(after)

    def _render(self, messages: Sequence[Message]) -> str:
        if not self.has_chat_template:
            raise RequestError("this model has no chat template; a plain prompt or token ids would work")
        try:
            return self.fast.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            raise RequestError(
                f"the chat template refuses these messages ({_first_line(error)}); "
                "messages with a role and a content string, user and assistant in turn, would work"
            ) from error

    def _plain_ids(self, text: str) -> list[int]:
        """Ids of text that already holds its special tokens."""
        _checked(text)
        with self._lock:
            return list(self.fast.encode(text, add_special_tokens=False))

    @staticmethod
    def _unused_word(messages: Sequence[Message]) -> str:
        text = repr(messages)
        return next(word for n in range(len(text) + 1) if (word := f"answer{n}placeholder") not in text)


def _chat_template(folder: Path) -> str | None:
    """The template beside a SentencePiece model: chat_template.jinja, else in tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    config = folder / "tokenizer_config.json"
    try:
        if file.exists():
            return file.read_text(encoding="utf-8")
        template = (
            json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.exists() else None
        )
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"cannot read the chat template in {folder}: {error}") from error
    return template if isinstance(template, str) else None


def _checked(text: str) -> None:
    """Raises RequestError where a text has a lone surrogate, which the tokenizers library dies of."""
    if (at := not_unicode(text)) is not None:
        raise RequestError(
            f"a text is not valid Unicode at character {at}; one without lone surrogates works"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
