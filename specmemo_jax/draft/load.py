"""A draft model or a draft head by name, checked against the target it is for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from specmemo_jax.checkpoints.open import OpenModel, open_model
from specmemo_jax.devices.table import Device
from specmemo_jax.draft import default_shape
from specmemo_jax.draft.beam import TreeShape
from specmemo_jax.draft.draft_model import DraftModel
from specmemo_jax.draft.eagle import EagleDrafter
from specmemo_jax.draft.head_files import names_head, open_head
from specmemo_jax.draft.heads import pack_head
from specmemo_jax.draft.medusa import MedusaDrafter
from specmemo_jax.errors import ConfigError, ModelNotFoundError
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.packing import Target, pack


def open_draft_model(
    model: str | Path | LlamaConfig,
    target: OpenModel,
    shape: TreeShape,
    dtype: jnp.dtype,
    platform: str,
    device: Device | None = None,
    params: Mapping[str, Any] | None = None,
) -> DraftModel:
    """A draft model for ``target`` on ``platform``; its weights are read when the engine asks for them.

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
        platform=platform,
    )


def open_head_drafter(
    model: str | Path, target: LlamaConfig, shape: TreeShape, dtype: jnp.dtype, platform: str
) -> EagleDrafter | MedusaDrafter:
    """A trained head for ``target`` on ``platform``; its weights are read when the engine asks for them.

    Raises ConfigError and WeightsError for a head of another target, or a broken one.
    """
    head, name_of_dtype = open_head(model, target), jnp.dtype(dtype).name

    def load(target: Target) -> tuple[jax.Array, ...]:
        return pack_head(head.config, head.tensors(), target)

    name = f"{head.config.kind} {head.name}"
    if head.config.kind == "medusa":
        return MedusaDrafter(head.config, load, shape.num_nodes, name_of_dtype, name, platform)
    return EagleDrafter(head.config, load, shape, name_of_dtype, name, platform=platform)


def open_drafter(
    model: str | Path,
    target: OpenModel,
    tree_nodes: int | None,
    dtype: jnp.dtype,
    platform: str,
    device: Device | None = None,
    head_tree: TreeShape | None = None,
) -> DraftModel | EagleDrafter | MedusaDrafter:
    """What a name that is no drafter's of itself (`is_model_name`) stands for: a trained head, fetched where
    only the hub has it, or a draft model. ``head_tree``: a head's where ``tree_nodes`` is left open.
    """
    shape = default_shape(tree_nodes, platform)
    if not names_head(model, download=True):
        return open_draft_model(model, target, shape, dtype, platform, device)
    if head_tree is not None and tree_nodes is None:
        shape = head_tree
    return open_head_drafter(model, target.config, shape, dtype, platform)


def _check_vocabulary(draft: OpenModel, target: OpenModel) -> None:
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
