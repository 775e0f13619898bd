"""A run's state on disk: written whole by Orbax beside the training, the last two kept."""

from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

Tree = TypeVar("Tree")


class Checkpoints:
    """Those of one run, in ``folder``. A save that was killed leaves the one before it."""

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: Any, seconds: float) -> None:
        """Begin to write the arrays of ``state``, which has ``step`` steps and ``seconds`` behind it."""
        if step in self._manager.all_steps():
            return
        # A copy on the host: the next step donates the state's buffers.
        tree = {"state": jax.tree.map(np.array, _plain(state)), "seconds": np.float64(seconds)}
        self._manager.save(step, args=self._ocp.args.StandardSave(tree))

    def restore(self, state: Tree) -> tuple[Tree, float]:
        """The last one as a tree like ``state``, and the seconds behind it; ``state`` where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return state, 0.0
        like = {"state": jax.tree.map(np.asarray, _plain(state)), "seconds": np.float64(0)}
        found: Any = self._manager.restore(step, args=self._ocp.args.StandardRestore(like))
        leaves = [jax.numpy.asarray(leaf) for leaf in jax.tree.leaves(found["state"])]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), float(found["seconds"])

    def close(self) -> None:
        """Wait until all is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _plain(state: Any) -> dict[str, Any]:
    """The leaves by number, whatever the optimizer's own classes are."""
    return {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}
