"""From what a user names to a model whose weights can be read, with its tokenizer."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from specmemo_jax.checkpoints import GenerationDefaults, generation_defaults, open_checkpoint, resolve
from specmemo_jax.checkpoints.tokenizer import Tokenizer, load_tokenizer
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model whose weights can be read: ``tensors()`` streams the canonical ones.

    ``texts`` gives the tokenizer; or None where there is none, and why.
    """

    name: str
    config: LlamaConfig
    tensors: Callable[[], Iterable[tuple[str, Any]]]
    generation_defaults: GenerationDefaults
    texts: Callable[[], tuple[Tokenizer | None, str]]

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None where there is none; waits until it is built."""
        return self.texts()[0]

    @property
    def no_tokenizer(self) -> str:
        """Why there is none."""
        return self.texts()[1]


def open_model(model: str | Path | LlamaConfig, params: Mapping[str, Any] | None = None) -> OpenModel:
    """A zoo name, folder, file or hub id, or a config with its ``params``. Raises as `LLM` does.

    The tokenizer is built on a thread, beside whatever the caller does before it asks for it.
    """
    if isinstance(model, LlamaConfig):
        if params is None:
            raise ConfigError("LLM(config) needs params: a mapping of canonical tensor names to arrays")
        reason = "weights given as arrays come without a tokenizer"
        defaults = GenerationDefaults(model.eos_token_ids)
        return OpenModel("params", model, params.items, defaults, lambda: (None, reason))
    if params is not None:
        raise ConfigError("params go with a LlamaConfig; a name or path brings its own weights")
    found = resolve(model)
    checkpoint = open_checkpoint(found.path)
    builder = ThreadPoolExecutor(1, "tokenizer")
    texts = builder.submit(load_tokenizer, found.path, found.tokenizer_recipe).result
    builder.shutdown(wait=False)
    defaults = generation_defaults(found.settings_folder, checkpoint.config)
    return OpenModel(found.name, checkpoint.config, checkpoint.tensors, defaults, texts)
