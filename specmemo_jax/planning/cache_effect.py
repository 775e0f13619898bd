"""What an int8 cache changes, as it was measured: how many of the target's tokens stay the same."""

import dataclasses
from pathlib import Path

from specmemo_jax.files.json_files import Reader, write_json

FORMAT = 1
KV_DTYPE = "int8"
NAME = "kv-int8"  # of the file, beside a model's acceptance profiles


@dataclasses.dataclass(frozen=True)
class CacheEffect:
    """The int8 cache against the cache in ``dtype``, greedy.

    ``same`` of ``tokens`` next tokens are equal where both read the same text before them, and
    ``same_answers`` of ``answers`` where each goes on from its own tokens. ``prompts`` names the file,
    ``date`` is ISO 8601.
    """

    model: str
    dtype: str
    prompts: str
    date: str
    tokens: int
    same: int
    answers: int
    same_answers: int

    @property
    def source(self) -> str:
        """What was measured, in one line."""
        return (
            f"{self.same / self.tokens:.1%} of {self.tokens} next tokens and {self.same_answers} of "
            f"{self.answers} answers as with a cache in {self.dtype}: {self.model} on {self.prompts}, "
            f"{self.date}"
        )

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_json(path, {"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: Path) -> "CacheEffect":
        """Read what `save` wrote. Raises ConfigError naming the file and what is wrong in it."""
        reader = Reader.of_file(
            path, "a cache's effect (`specmemo calibrate --kv-cache-dtype int8` writes one)"
        )
        reader.expect("format", FORMAT)
        texts = {name: reader.text(name) for name in ("model", "dtype", "prompts", "date")}
        found = cls(
            **texts,
            tokens=reader.count("tokens"),
            same=reader.whole("same"),
            answers=reader.count("answers"),
            same_answers=reader.whole("same_answers"),
        )
        reader.check(found.same <= found.tokens, "more tokens are the same than there are")
        reader.check(found.same_answers <= found.answers, "more answers are the same than there are")
        return found
