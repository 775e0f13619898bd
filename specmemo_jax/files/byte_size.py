"""Byte sizes as people write them."""

import re

from specmemo_jax.errors import ConfigError

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("kmgt", 1)
    for kind, base in (("b", 1000), ("ib", 1024))
}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def format_bytes(size: int) -> str:
    """Bytes in the unit that suits them: ``12.55 GiB``."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"


def parse_bytes(value: int | str) -> int:
    """``"1.5GiB"``, ``"800 MB"`` or a number of bytes, as bytes. Raises ConfigError unless positive."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = _PATTERN.fullmatch(str(value))
        if match is None or match[2].lower() not in _UNITS:
            raise ConfigError(
                f"memory size {value!r} is not understood; 1073741824, '800MB' or '1.5GiB' would work"
            )
        size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size <= 0:
        raise ConfigError(f"memory size must be positive, found {value!r}")
    return size
