"""Token ids to text as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from specmemo_jax.checkpoints.tokenizer import Tokenizer


class AnswerText:
    """The text of one growing answer.

    `feed` takes ids and stops at the one whose text completes a stop string; ``text`` is then
    cut before the string. Text that may yet become a stop string, or a character whose bytes are
    not all there, is held back from `piece` until it is known.

    Args:
        tokenizer: the model's.
        stop: strings that end the answer; the earliest in the text wins.
        min_tokens: stop strings are looked for only in the text of tokens after these.
        skip_special_tokens: leave special tokens out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ):
        self.text = ""
        self.stop_reason: str | None = None
        self._tokenizer, self._stop, self._min_tokens = tokenizer, tuple(stop), min_tokens
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._open: list[int] = []  # the last ids, whose text is not known yet
        self._shown = self._held = self._search_from = 0

    def feed(self, ids: Sequence[int]) -> int:
        """Take ids in; how many belong to the answer: all, or up to the one that completes a stop string."""
        for taken, token in enumerate(ids, 1):
            self._ids.append(token)
            self._append(self._step(token))
            if self.stop_reason is not None:
                return taken
        return len(ids)

    def finish(self) -> None:
        """No more ids come: what was held back is text now, half a character too (as U+FFFD)."""
        if self.stop_reason is None:
            whole = self._tokenizer.decode(self._ids, self._skip_special_tokens)
            if whole.startswith(self.text):
                self._append(whole[len(self.text) :])
            else:  # bytes that make no character were read on their own
                self._append(self._tokenizer.decode(self._open, self._skip_special_tokens))
        self._held = 0

    def piece(self) -> str:
        """What can be shown and was not yet."""
        start, self._shown = self._shown, len(self.text) - self._held
        return self.text[start : self._shown]

    def _step(self, token: int) -> str:
        """The text that ``token`` makes known, nothing while a character is not whole."""
        backend, lost = self._tokenizer.fast.backend_tokenizer, ""
        try:
            piece = self._stream.step(backend, token)
        except Exception:  # noqa: BLE001  # the library's own, bare: bytes that no token can make a character
            lost = self._tokenizer.decode(self._open, self._skip_special_tokens)
            self._open.clear()
            self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            piece = self._stream.step(backend, token)
        self._open.append(token)
        if piece:
            self._open.clear()
        return lost + (piece or "")

    def _append(self, piece: str) -> None:
        if not self._stop or not piece:
            self.text += piece
            return
        if len(self._ids) <= self._min_tokens:
            self.text += piece
            self._search_from = len(self.text)
            return
        start = max(self._search_from, len(self.text) - max(map(len, self._stop)) + 1)
        self.text += piece
        found = [(at, stop) for stop in self._stop if (at := self.text.find(stop, start)) >= 0]
        if found:
            at, self.stop_reason = min(found)
            self.text = self.text[:at]
        tail = self.text[self._search_from :]
        self._held = 0 if found else max(_overlap(tail, stop) for stop in self._stop)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
