"""From what a user names to what the engine takes: targets with their tokenizers, and draft models."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from specmemo_jax.draft import DraftModel, Shape
from specmemo_jax.errors import ConfigError, ModelNotFoundError
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.packing import pack
from specmemo_jax.memory.devices import Device
from specmemo_jax.tokenizer import Tokenizer, load_tokenizer
from specmemo_jax.weights import GenerationDefaults, generation_defaults, open_checkpoint, resolve


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model whose weights can be read: ``tensors()`` streams the canonical ones.

    ``tokenizer`` is None where there is none, and ``no_tokenizer`` says why.
    """

    name: str
    config: LlamaConfig
    tensors: Callable[[], Iterable[tuple[str, Any]]]
    generation_defaults: GenerationDefaults
    tokenizer: Tokenizer | None
    no_tokenizer: str = ""


def open_model(model: str | Path | LlamaConfig, params: Mapping[str, Any] | None = None) -> Opened:
    """A zoo name, folder, file or hub id, or a config with its ``params``. Raises as `LLM` does."""
    if isinstance(model, LlamaConfig):
        if params is None:
            raise ConfigError("LLM(config) needs params: a mapping of canonical tensor names to arrays")
        reason = "weights given as arrays come without a tokenizer"
        defaults = GenerationDefaults(model.eos_token_ids)
        return Opened("params", model, params.items, defaults, None, reason)
    if params is not None:
        raise ConfigError("params go with a LlamaConfig; a name or path brings its own weights")
    found = resolve(model)
    checkpoint = open_checkpoint(found.path)
    tokenizer, reason = load_tokenizer(found.path, found.tokenizer_recipe)
    defaults = generation_defaults(found.settings_folder, checkpoint.config)
    return Opened(found.name, checkpoint.config, checkpoint.tensors, defaults, tokenizer, reason)


def open_draft_model(
    model: str | Path | LlamaConfig,
    target: Opened,
    shape: Shape,
    dtype: jnp.dtype,
    device: Device | None = None,
    params: Mapping[str, Any] | None = None,
) -> DraftModel:
    """A draft model for ``target``; its weights are read when the engine asks for them.

    Raises ConfigError for another vocabulary, with the first difference.
    """
    try:
        draft = open_model(model, params)
    except ModelNotFoundError as error:
        raise ConfigError(
            f"drafter {str(model)!r} is not auto, ngram, self:K or none, and {error}"
        ) from error
    _check_vocabulary(draft, target)
    return DraftModel(
        config=draft.config,
        load=lambda: pack(draft.config, draft.tensors(), dtype, device),
        shape=shape,
        dtype=jnp.dtype(dtype).name,
        vocab_size=target.config.vocab_size,
        name=f"draft model {draft.name}",
    )


def _check_vocabulary(draft: Opened, target: Opened) -> None:
    wanted = "a draft with the target's own vocabulary, ngram or self:K would work"
    if draft.tokenizer is not None and target.tokenizer is not None:
        difference = target.tokenizer.first_difference(draft.tokenizer)
        if difference is not None:
            raise ConfigError(f"{draft.name} cannot draft for {target.name}: {difference}; {wanted}")
    elif draft.config.vocab_size != target.config.vocab_size:
        raise ConfigError(
            f"{draft.name} cannot draft for {target.name}: its vocabulary has {draft.config.vocab_size} ids, "
            f"the target's {target.config.vocab_size}; {wanted}"
        )
