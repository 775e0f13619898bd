"""What a checkpoint says of how to generate: end tokens and sampling defaults."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.config import LlamaConfig, token_ids


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """End tokens and the sampling settings that the model's authors chose (``temperature`` 0: greedy);
    None where they chose none.
    """

    eos_token_ids: tuple[int, ...]
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def generation_defaults(folder: Path | None, config: LlamaConfig) -> GenerationDefaults:
    """From ``folder/generation_config.json`` where there is one; what it leaves out comes from ``config``
    (config.json, or the GGUF's metadata).

    Raises ConfigError naming the file and the field when it is malformed.
    """
    file = folder / "generation_config.json" if folder is not None else None
    if file is None or not file.exists():
        return GenerationDefaults(config.eos_token_ids)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    try:
        return _from_dict(raw, config)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _from_dict(raw: Any, config: LlamaConfig) -> GenerationDefaults:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"expected a JSON object, found {type(raw).__name__}")
    eos = token_ids(raw.get("eos_token_id"), "eos_token_id") or config.eos_token_ids
    if raw.get("do_sample") is False:
        return GenerationDefaults(eos, temperature=0.0)  # by its authors' word, whatever else stands there
    temperature, top_p = _positive(raw, "temperature"), _positive(raw, "top_p")
    if top_p is not None and top_p > 1:
        raise ConfigError(f"top_p must lie in (0, 1], found {top_p}")
    top_k = raw.get("top_k")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0):
        raise ConfigError(f"top_k must be a non-negative integer, found {top_k!r}")
    min_p = _positive(raw, "min_p") if raw.get("min_p") else None
    return GenerationDefaults(eos, temperature, top_p, top_k, min_p, _positive(raw, "repetition_penalty"))


def _positive(raw: Mapping[str, Any], key: str) -> float | None:
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ConfigError(f"{key} must be a positive number, found {value!r}")
    return float(value)
