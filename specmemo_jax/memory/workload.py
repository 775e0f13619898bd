"""What a plan is made for."""

import dataclasses
import math
from collections.abc import Sequence

from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.kv import SLOTS

NARROWEST = 256  # slots of a group's row at least, so that prompts are read in large chunks
STEP_ROOM = 16  # slots of a group that are left for a step's tree
MOST_GROUPS = 3
WORTH = 0.05  # of all slots, the least that a further group must save


@dataclasses.dataclass(frozen=True)
class Workload:
    """``batch`` rows decoded together, each of ``prompt_tokens`` read and ``new_tokens`` written.

    ``batch`` None takes as many as pay under the budget. ``context``: most tokens a row may ever hold,
    prompt and answer; None takes the largest that fits, at least both together. ``lengths``: tokens of
    some of the requests to come, prompt and answer, for which rows are laid out in groups.
    """

    batch: int | None = 1
    prompt_tokens: int = 512
    new_tokens: int = 128
    context: int | None = None
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_tokens", "new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}")
        if self.context is not None and self.context < 1:
            raise ConfigError(f"context must be at least 1, found {self.context}")
        if self.context is not None and self.context < self.tokens:
            raise ConfigError(
                f"context {self.context} holds less than {self.prompt_tokens} prompt tokens and "
                f"{self.new_tokens} new ones ({self.tokens}); a larger context or fewer tokens would work"
            )

    @property
    def tokens(self) -> int:
        """Tokens of one row at its end, the longest that is known of."""
        return max(self.prompt_tokens + self.new_tokens, *self.lengths, 0)

    @property
    def rows(self) -> int:
        """The batch, once it is known."""
        assert self.batch is not None
        return self.batch


def groups_for(lengths: Sequence[int], batch: int, context: int) -> tuple[tuple[int, int], ...]:
    """``(rows, context)`` of at most `MOST_GROUPS` groups of ``batch`` rows for requests of such ``lengths``.

    Of B rows the k-th is for the k-th B-quantile of the lengths, the last for ``context``; neighbours share
    a group where that costs the fewest slots. Empty where one group is as good.
    """
    if batch < 2 or not lengths:
        return ()
    ranked = sorted(lengths)
    own = [ranked[-(-len(ranked) * k // batch) - 1] for k in range(1, batch)]
    rows = [min(context, max(NARROWEST, _whole(length + STEP_ROOM)) - STEP_ROOM) for length in own]
    rows.append(context)
    cost, cuts = _partition(rows, 1)
    for groups in range(2, min(MOST_GROUPS, batch) + 1):
        less, found = _partition(rows, groups)
        if less > cost - WORTH * batch * context:
            break
        cost, cuts = less, found
    if len(cuts) == 1:
        return ()
    starts = (0, *cuts[:-1])
    return tuple((end - start, rows[end - 1]) for start, end in zip(starts, cuts, strict=True))


def _whole(length: int) -> int:
    return math.ceil(length / SLOTS) * SLOTS


def _partition(rows: Sequence[int], groups: int) -> tuple[int, tuple[int, ...]]:
    """The least sum over ``groups`` runs of rising ``rows``, each as wide as its last; and the runs' ends."""
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for _ in range(groups):
        best = {
            end: min(
                (cost + (end - start) * rows[end - 1], (*ends, end))
                for start, (cost, ends) in best.items()
                if start < end
            )
            for end in range(1, len(rows) + 1)
            if any(start < end for start in best)
        }
    return best[len(rows)]
