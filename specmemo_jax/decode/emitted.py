"""What steps said, kept on the device until the engine reads it: one transfer for all steps of a burst.

A GPU replays a step's kernels as one recorded graph for as long as its buffers stay where they were. So
what a step says is written into a buffer of the state, and not into new ones.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from specmemo_jax.llama.kv import Leaf

BURST = 8  # steps whose results wait on the device to be read


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Emitted:
    """The last `BURST` steps, each in the ``slot`` after the one before.

    ``log`` ``[BURST, B, 1 + P]``: how many tokens a row emitted (-1 where it took no part), and the tokens.
    """

    log: Leaf
    slot: Leaf


def init_emitted(batch: int, depth: int) -> Emitted:
    """Nothing yet; ``depth`` is the deepest tree's."""
    return Emitted(jnp.zeros((BURST, batch, depth + 2), jnp.int32), jnp.zeros((), jnp.int32))


def append(
    emitted: Emitted, tokens: Int[Array, "B P"], counts: Int[Array, " B"], live: Bool[Array, " B"]
) -> Emitted:
    """With one step more; a smaller tree's path may be narrower than the log."""
    missing = emitted.log.shape[2] - 1 - tokens.shape[1]
    tokens = jnp.pad(tokens, ((0, 0), (0, missing)))
    said = jnp.concatenate([jnp.where(live, counts, -1)[:, None], tokens], axis=1)
    return Emitted(emitted.log.at[emitted.slot].set(said), (emitted.slot + 1) % BURST)


def drain(emitted: Emitted, steps: int) -> np.ndarray:
    """``[steps, B, 1 + P]`` of the last ``steps`` (`BURST` at most), in their order; waits for them."""
    log, slot = jax.device_get((emitted.log, emitted.slot))
    return log[(int(slot) - steps + np.arange(steps)) % BURST]
