"""The target's own first layers as its drafter."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from specmemo_jax.draft.beam import BeamDrafter, TreeShape, beam_cost, beam_draft
from specmemo_jax.draft.live_sets import beam_live_sets
from specmemo_jax.draft.protocol import State, View
from specmemo_jax.draft.tree import Tree
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.buffers import Cost
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.kv import Groups
from specmemo_jax.llama.live_sets import ForwardShape, LiveSet
from specmemo_jax.llama.packing import Target


@dataclasses.dataclass(frozen=True)
class SelfDrafter(BeamDrafter):
    """The target's own first ``layers`` as the draft (early exit, arXiv 2404.16710), through its own
    last norm and head.

    It costs no weights and no cache: the first layers' committed keys and values are the target's.
    """

    layers: int
    shape: TreeShape

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError(f"self:{self.layers}: at least one of the target's layers is needed")

    @property
    def name(self) -> str:
        """``self:k``."""
        return f"self:{self.layers}"

    def init(self, groups: Groups) -> State:
        """Nothing."""
        return ()

    def limited(self, num_nodes: int) -> "SelfDrafter":
        """The same layers, a smaller tree."""
        return dataclasses.replace(self, shape=self.shape.limited(num_nodes))

    def work(self, config: LlamaConfig, itemsize: int, batch: int, length: int) -> Cost:
        """Its passes over the target's first layers and head."""
        return beam_cost(config, self.layers, itemsize, self.shape, batch, length)

    def live_sets(self, target: ForwardShape, chunk: int | None) -> tuple[LiveSet, ...]:
        """Its passes over the target's first layers; reading a chunk takes nothing."""
        if chunk is not None:
            return ()
        draft = dataclasses.replace(target, layers=self.layers, seen=None, score_nodes=None)
        return beam_live_sets(draft, 0, self.shape)

    def observe(
        self,
        view: View,
        state: State,
        rows: Int[Array, " R"],
        tokens: Int[Array, "R C"],
        starts: Int[Array, " R"],
        counts: Int[Array, " R"],
    ) -> State:
        """Nothing: the target has read them."""
        return state

    def weights(self, target: Target) -> Any:
        """None of its own. Raises ConfigError where the target has fewer layers."""
        if self.layers >= target.config.num_layers:
            raise ConfigError(
                f"{self.name}: the target has {target.config.num_layers} layers; "
                f"fewer than that would work as its draft"
            )
        return ()

    def propose(
        self, view: View, state: State, pending: Int[Array, " B"], lengths: Int[Array, " B"]
    ) -> tuple[Tree, State]:
        """Look ahead over the target's cache."""
        nothing = jnp.zeros((pending.shape[0], 0), jnp.int32)
        tree, _ = beam_draft(
            view.model,
            tuple(cache[: self.layers] for cache in view.caches),
            lengths,
            nothing,
            jnp.zeros_like(lengths),
            pending,
            self.shape,
            view.model.config.vocab_size,
        )
        return tree, state
