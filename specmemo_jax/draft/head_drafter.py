"""What drafters with a trained head have in common: its weights, and what it reads of the target."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from specmemo_jax.draft.head_config import HeadConfig
from specmemo_jax.draft.heads import AbstractHead, abstract_head
from specmemo_jax.draft.protocol import Drafter, View
from specmemo_jax.llama.buffers import Buffer
from specmemo_jax.llama.packing import Target


class HeadDrafter(Drafter):
    """A drafter with a head of ``config``, whose packed weights ``load`` gives for a target, in ``dtype`` and
    for ``platform``.
    """

    config: HeadConfig
    load: Callable[[Target], Any]
    dtype: str
    platform: str

    @property
    def taps(self) -> tuple[int, ...]:
        """The head's."""
        return self.config.taps

    def weights(self, target: Target) -> Any:
        """The packed weights, loaded now."""
        return self.load(target)

    def weight_shapes(self, target: Target) -> Any:
        """Of the packed weights."""
        shapes = self._abstract(target.platform).shapes
        return tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in shapes.values())

    def weights_buffer(self) -> Buffer:
        """Their row in the memory model."""
        leaves = self._abstract(self.platform).shapes.values()
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        return Buffer("draft weights", (sum(leaf.size for leaf in leaves),), self.dtype, size, "weights")

    def merge(self, view: View) -> Any:
        """The head's module over ``view.weights``."""
        return self._abstract(view.model.platform).merge(view.weights)

    def _abstract(self, platform: str) -> AbstractHead:
        return abstract_head(self.config, jnp.dtype(self.dtype), platform)
