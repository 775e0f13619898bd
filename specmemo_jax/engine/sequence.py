"""What the host knows of a row: the request it was admitted with, and every id since."""

import dataclasses
import math
from collections.abc import Sequence
from itertools import islice

import numpy as np

from specmemo_jax.decode.sampling import OUTPUT, Sampling

PACE_STEPS = 16


@dataclasses.dataclass(frozen=True)
class Request:
    """What a row is admitted with; `specmemo_jax.serve.serve` makes it of a prompt and SamplingParams.

    ``sampling``: the row's `Sampling` of host scalars and arrays, None for plain greedy decoding.
    ``reuse``: the longest beginning of the prompt that the row's cache still holds is not read again.
    """

    prompt: Sequence[int]
    max_tokens: int
    stop_ids: Sequence[int] = ()
    sampling: Sampling | None = None
    reuse: bool = False


@dataclasses.dataclass
class RowLog:
    """Every id of a row (so that the cache can be rebuilt), and its steps.

    ``told``: positions that the drafter has observed. ``waiting``: it has outgrown its group, and no wider
    row is free. ``accepted_lengths`` and ``tree_nodes``: tokens
    emitted and nodes verified, a step each.
    """

    request: Request
    ids: list[int]
    told: int = 0
    waiting: bool = False
    accepted_lengths: list[int] = dataclasses.field(default_factory=list)
    tree_nodes: list[int] = dataclasses.field(default_factory=list)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def sampled(self) -> bool:
        """Its tokens are not plainly the likeliest."""
        return self.request.sampling is not None

    @property
    def cached(self) -> int:
        """Positions in the cache: all but the last token's, which is pending."""
        return len(self.ids) - 1

    @property
    def new_ids(self) -> list[int]:
        """What was generated so far."""
        return self.ids[self.num_prompt :]

    @property
    def left(self) -> int:
        """Tokens that it may still emit."""
        return self.request.max_tokens - len(self.new_ids)

    def steps_to_end(self, nodes: int) -> int:
        """Steps of a tree until its budget is spent, at the pace of its last steps of that tree."""
        paired = zip(reversed(self.accepted_lengths), reversed(self.tree_nodes), strict=True)
        last = list(islice((tokens for tokens, tree in paired if tree == nodes), PACE_STEPS))
        return math.ceil(self.left * len(last) / sum(last)) if last else self.left

    @property
    def stopped(self) -> bool:
        """The last token is one of the row's stop ids."""
        return len(self.ids) > self.num_prompt and self.ids[-1] in self.request.stop_ids

    @property
    def finished(self) -> bool:
        """A stop id ended it, or its budget is spent."""
        return self.stopped or self.left <= 0

    @property
    def going(self) -> bool:
        """It takes part in the next step."""
        return not (self.finished or self.waiting)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first ids are alike."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def history_of(
    prompt: Sequence[int], answer: Sequence[int], vocab_size: int, recent: int
) -> tuple[np.ndarray, np.ndarray]:
    """One row of `History`, ``seen`` ``[V]`` and ``recent`` ``[L - 1]``, as the device would have it."""
    seen = np.zeros((vocab_size,), np.int32)
    seen[np.asarray(prompt, np.int64)] = 1
    np.add.at(seen, np.asarray(answer, np.int64), OUTPUT)
    last = np.full((recent,), -1, np.int32)
    if tail := list(answer[-recent:]) if recent else []:
        last[-len(tail) :] = tail
    return seen, last


def chunk_starts(length: int, chunks: Sequence[int]) -> list[tuple[int, int]]:
    """``(start, width)`` of the chunks that cover a prompt: large ones first, the rest in small ones.

    Three or more small chunks are worth one large one.
    """
    large, small = chunks[0], chunks[-1]
    plan, start = [], 0
    while start < length:
        rest = length - start
        width = large if rest > 3 * small or large == small else small
        plan.append((start, width))
        start += width
    return plan
