"""Drafters, one file each, behind one protocol."""

from specmemo_jax.draft.ngram import NgramDrafter
from specmemo_jax.draft.protocol import Drafter
from specmemo_jax.errors import ConfigError

__all__ = ["Drafter", "NgramDrafter", "make_drafter"]


def make_drafter(
    drafter: Drafter | str | None, tree_nodes: int | None = None, *, cheap_nodes: bool = True
) -> Drafter | None:
    """A drafter from its name; objects pass through, None (also ``"none"``) is plain decoding.

    ``tree_nodes`` is T for the built-in drafters; left open it is 8, or 4 where verifying a
    node more is not almost free (``cheap_nodes`` False: float32 on CPU, where compute and not
    memory bounds the products; docs/performance-log.md). Raises ConfigError for an unknown name.
    """
    if drafter is None or drafter == "none":
        return None
    if not isinstance(drafter, str):
        if tree_nodes is not None and tree_nodes != drafter.num_nodes:
            raise ConfigError(
                f"tree_nodes={tree_nodes}, but the given drafter proposes {drafter.num_nodes} nodes"
            )
        return drafter
    if drafter not in ("auto", "ngram"):
        raise ConfigError(f"drafter {drafter!r} is not known; 'auto', 'ngram' and 'none' are")
    if tree_nodes is None:
        tree_nodes = 8 if cheap_nodes else 4
    return NgramDrafter(num_nodes=tree_nodes)
