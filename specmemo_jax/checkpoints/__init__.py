"""Weights: where they come from, and reading them tensor by tensor."""

from specmemo_jax.checkpoints.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from specmemo_jax.checkpoints.generation import GenerationDefaults, generation_defaults
from specmemo_jax.checkpoints.zoo import (
    ResolvedModel,
    ZooEntry,
    pull,
    resolve,
    zoo_config,
    zoo_entry,
    zoo_names,
)

__all__ = [
    "Checkpoint",
    "GenerationDefaults",
    "ResolvedModel",
    "TensorEntry",
    "ZooEntry",
    "generation_defaults",
    "open_checkpoint",
    "pull",
    "resolve",
    "zoo_config",
    "zoo_entry",
    "zoo_names",
]
