"""Whole numbers that options give as texts, because a word may stand in their place."""

from specmemo_jax.errors import ConfigError


def row_count(option: str, text: str) -> int | None:
    """A number of rows, None for ``auto``."""
    return None if text == "auto" else count(option, text, " or auto")


def count(option: str, text: str, other: str = "") -> int:
    """A whole number from 1 on. Raises ConfigError with what would work."""
    try:
        value = int(text)
    except ValueError:
        raise ConfigError(
            f"{option} {text!r} is not a whole number; one from 1 on{other} would work"
        ) from None
    if value < 1:
        raise ConfigError(f"{option} must be at least 1, found {value}")
    return value
