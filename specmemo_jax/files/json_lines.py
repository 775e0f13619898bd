"""Lines of JSON as strangers write them, and rows that anyone can read back."""

import json
from typing import Any

MOST_NESTED = 100  # levels: far below where Python's own recursion ends, wherever it is walked


class NotAnObjectError(ValueError):
    """Why a line is no JSON object that can be used, in words."""


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object of one line. Raises NotAnObjectError for anything else, whatever it holds.

    Texts may hold lone surrogates (``"\\ud83d"``), which JSON allows: `not_unicode` tells.
    """
    try:
        found = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise NotAnObjectError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise NotAnObjectError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise NotAnObjectError(f"nested too deeply; {MOST_NESTED} levels work") from error
    except ValueError as error:  # a number of thousands of digits, or none
        raise NotAnObjectError(f"not JSON that can be read ({error})") from error
    if not isinstance(found, dict):
        raise NotAnObjectError(f"a JSON object is expected, found {kind_of(found)}")
    if _is_deep(found):
        raise NotAnObjectError(f"nested too deeply; {MOST_NESTED} levels work")
    return found


def row_of(record: Any) -> str:
    """A record as one line of JSON in UTF-8; in ASCII where it holds what UTF-8 cannot say."""
    row = json.dumps(record, ensure_ascii=False, allow_nan=False)
    if not_unicode(row) is not None:
        row = json.dumps(record, allow_nan=False)
    return row + "\n"


def not_unicode(text: str) -> int | None:
    """Where a text has a lone surrogate, which is no character; None where it has none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return names.get(type(value), "a number")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number in JSON")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_NESTED):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True
