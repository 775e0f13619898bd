"""Measurements as JSON files: written whole, read with every field checked."""

import dataclasses
import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from specmemo_jax.errors import ConfigError


def file_name(name: str) -> str:
    """A model's or drafter's name as one safe file name, odd characters as ``-``."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "unnamed"


def write_json(path: Path, content: Any) -> None:
    """Write JSON to ``path`` in one move, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(_compact(content) + "\n")
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _compact(content: Any, indent: str = "") -> str:
    """Indented JSON: an object a line in lists, numbers side by side."""
    inner = indent + "  "
    if isinstance(content, dict) and content:
        body = (f"{inner}{json.dumps(key)}: {_compact(value, inner)}" for key, value in content.items())
        return "{\n" + ",\n".join(body) + f"\n{indent}}}"
    if isinstance(content, list | tuple) and any(isinstance(item, dict) for item in content):
        lines = (inner + json.dumps(item, ensure_ascii=False, allow_nan=False) for item in content)
        return "[\n" + ",\n".join(lines) + f"\n{indent}]"
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


@dataclasses.dataclass(frozen=True)
class Reader:
    """An object of a JSON file; ``place`` says which, for the ConfigErrors its methods raise."""

    fields: dict[str, Any]
    place: str

    @classmethod
    def of_file(cls, path: Path, wanted: str) -> "Reader":
        """The file's one object; ``wanted`` says what file would work."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"cannot read {path}: {error}; {wanted} would work") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path} holds no JSON object; {wanted} would work")
        return cls(content, str(path))

    def check(self, holds: bool, problem: str) -> None:
        """Refuse the file unless ``holds``."""
        if not holds:
            raise ConfigError(f"{self.place}: {problem}")

    def get(self, name: str) -> Any:
        """A field that must be there."""
        self.check(name in self.fields, f"field {name!r} is missing")
        return self.fields[name]

    def expect(self, name: str, value: Any) -> None:
        """A field that must be ``value``."""
        found = self.get(name)
        self.check(
            found == value, f"{name} is {found!r}, this version reads {value!r}; measuring anew would work"
        )

    def text(self, name: str) -> str:
        """A string."""
        value = self.get(name)
        self.check(isinstance(value, str), f"{name} must be a text, found {value!r}")
        return value

    def whole(self, name: str) -> int:
        """An integer of at least 0."""
        value = self.get(name)
        self.check(_is_whole(value), f"{name} must be an integer of at least 0, found {value!r}")
        return value

    def count(self, name: str) -> int:
        """An integer of at least 1."""
        value = self.whole(name)
        self.check(value > 0, f"{name} must be at least 1, found {value}")
        return value

    def amount(self, name: str) -> float:
        """A finite number of at least 0."""
        value = self.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        good = number and math.isfinite(value) and value >= 0
        self.check(good, f"{name} must be a number of at least 0, found {value!r}")
        return float(value)

    def positive(self, name: str) -> float:
        """A finite number above 0."""
        value = self.amount(name)
        self.check(value > 0, f"{name} must be positive, found {value!r}")
        return value

    def items(self, name: str) -> list["Reader"]:
        """A list of objects."""
        value = self.get(name)
        good = isinstance(value, list) and all(isinstance(item, dict) for item in value)
        self.check(good, f"{name} must be a list of objects")
        return [Reader(item, f"{self.place}, {name}[{i}]") for i, item in enumerate(value)]

    def part(self, name: str) -> "Reader":
        """An object."""
        value = self.get(name)
        self.check(isinstance(value, dict), f"{name} must be an object, found {value!r:.40}")
        return Reader(value, f"{self.place}, {name}")

    def table(self, name: str, width: int | None = None) -> tuple[tuple[int, ...], ...]:
        """A list of lists of integers of at least 0, each ``width`` long where that is given."""
        value = self.get(name)
        good = isinstance(value, list) and all(
            isinstance(row, list) and all(map(_is_whole, row)) and width in (None, len(row)) for row in value
        )
        each = "lists" if width is None else f"lists of {width}"
        self.check(good, f"{name} must be a list of {each} integers of at least 0")
        return tuple(tuple(row) for row in value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
