"""What a chat holds and has cost."""

import dataclasses

import jax

from specmemo_jax.engine.engine import Engine
from specmemo_jax.memory.plan import MemoryPlan


@dataclasses.dataclass(frozen=True)
class ChatStats:
    """Where a chat stands, and what it has cost since the session began.

    ``context_used`` of ``context`` tokens are the chat's own. ``prompt_tokens``: all that its answers were
    given to read; ``prefilled_tokens``: what of it was read anew, ``last_prefilled`` for the last answer.
    ``full_renders``: questions whose chat the template did not let go on from (it rewrites what was said),
    so that it was rendered and read whole. ``memory_bytes``: see `memory_used`; ``planned_bytes``: the plan's
    peak.
    """

    turns: int
    dropped_turns: int
    context_used: int
    context: int
    answers: int
    answer_tokens: int
    steps: int
    decode_s: float
    stepped_tokens: int
    prompt_tokens: int
    prefilled_tokens: int
    last_prefilled: int
    full_renders: int
    memory_bytes: int
    planned_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed over all answers; 0.0 when there were none."""
        return self.stepped_tokens / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens a target pass over all answers; 1.0 without any pass."""
        return self.stepped_tokens / self.steps if self.steps else 1.0


def memory_used(engine: Engine, plan: MemoryPlan) -> int:
    """Bytes on the device at the moment: the target's weights, the drafter's own, and the engine's state
    (cache, rows, drafter's state) at its present capacity. Temporaries of running programs are not in it.
    """
    shared = {id(leaf) for leaf in engine.target.leaves}
    own = [leaf for leaf in jax.tree.leaves(engine.draft_weights) if id(leaf) not in shared]
    state = jax.tree.leaves(engine.programs.abstract_state(engine.capacity)) if engine.capacity else []
    return plan.weights_bytes + sum(leaf.size * leaf.dtype.itemsize for leaf in (*own, *state))
