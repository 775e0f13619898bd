"""Drafters, one file each, behind one protocol."""

import re
from pathlib import Path
from typing import TypeGuard

from specmemo_jax.draft.beam import TreeShape
from specmemo_jax.draft.draft_model import DraftModel
from specmemo_jax.draft.ngram import NgramDrafter
from specmemo_jax.draft.protocol import Drafter, View
from specmemo_jax.draft.self_draft import SelfDrafter
from specmemo_jax.errors import ConfigError

__all__ = ["DraftModel", "Drafter", "NgramDrafter", "SelfDrafter", "TreeShape", "View", "make_drafter"]

# (nodes, least matched tokens): what a match is worth where nodes are not free to verify, and how often its
# guesses must have come true to be worth 4 nodes. Measured in docs/performance-log.md.
LADDERS = {"float32": (((4, 2), (16, 4)), 0.35), "bfloat16": (((4, 1), (16, 4)), 0.1)}
FREE_NODES = 16  # on a GPU a step of so many nodes costs about what one node does


def make_drafter(
    drafter: Drafter | str | None,
    tree_nodes: int | None = None,
    *,
    platform: str = "cpu",
    dtype: str = "float32",
) -> Drafter | None:
    """A drafter without weights from its name: ``"auto"``, ``"ngram"``, ``"self:K"``, ``"none"`` or None.

    Objects pass through. ``tree_nodes`` is T, chosen for ``platform`` and ``dtype`` where it is left
    open. Raises ConfigError for an unknown name (`is_model_name` tells what else may name a model).
    """
    if drafter is None or drafter == "none":
        return None
    if not isinstance(drafter, str):
        if tree_nodes is not None and tree_nodes != drafter.num_nodes:
            raise ConfigError(
                f"tree_nodes={tree_nodes}, but the given drafter proposes {drafter.num_nodes} nodes"
            )
        return drafter
    if drafter in ("auto", "ngram"):
        return _ngram(tree_nodes, platform, dtype)
    if match := re.fullmatch(r"self:(\d+)", drafter):
        return SelfDrafter(int(match[1]), default_shape(tree_nodes, platform))
    raise ConfigError(f"drafter {drafter!r} is not known; auto, ngram, self:K, none or a model would work")


def is_model_name(drafter: object) -> TypeGuard[str | Path]:
    """Whether a drafter is named that `make_drafter` does not know: a draft model's name, folder or file."""
    if isinstance(drafter, Path):
        return True
    return isinstance(drafter, str) and drafter not in ("auto", "ngram", "none") and drafter[:5] != "self:"


def default_shape(tree_nodes: int | None, platform: str) -> TreeShape:
    """The tree of a draft that costs passes: a short chain on CPU, where nodes cost, else wider."""
    if platform == "cpu":
        return TreeShape.of(4 if tree_nodes is None else tree_nodes)
    nodes = FREE_NODES if tree_nodes is None else tree_nodes
    branches = max(1, min(4, nodes - 1))
    depth = max(min(5, nodes - 1), 1 + -(-(nodes - 1 - branches) // branches**2))
    return TreeShape.of(nodes, branches, depth)


def _ngram(tree_nodes: int | None, platform: str, dtype: str) -> NgramDrafter:
    if platform != "cpu":
        return NgramDrafter(FREE_NODES if tree_nodes is None else tree_nodes)
    ladder, min_hit_rate = LADDERS.get(dtype, LADDERS["bfloat16"])
    nodes = ladder[-1][0] if tree_nodes is None else tree_nodes
    tree_sizes = [rung for rung in ladder[:-1] if rung[0] < nodes]
    ladder = (*tree_sizes, (nodes, ladder[len(tree_sizes)][1]))
    return NgramDrafter(nodes, branches=1, ladder=ladder, min_hit_rate=min_hit_rate)
