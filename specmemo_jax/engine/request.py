"""One request on its way: what was asked, and every id and step since."""

import dataclasses
import math
from collections.abc import Sequence
from itertools import islice

import numpy as np

from specmemo_jax.decode.sampling import OUTPUT, Sampling

PACE_STEPS = 16  # by which a request's end is foretold


@dataclasses.dataclass(eq=False)
class Request:
    """A request, and what the host knows of its answer: enough to rebuild its cache at any time.

    Asked for: ``prompt`` (token ids), at most ``max_tokens`` new ones, the ``stop_ids`` that end it, and its
    ``sampling``: host scalars and arrays, None for plain greedy decoding. ``reuse``: the longest beginning
    of the prompt that its row's cache still holds is not read again.

    Since then: ``ids``, those of prompt and answer; the last of an answer is *pending*, emitted and not yet
    in the cache. ``num_prefilled``: positions that were read when it was admitted last, those that its row
    still held left out. ``num_observed``: positions that the drafter has observed. ``paused``: it has
    outgrown its group, and no wider row is free. ``accepted_lengths`` and ``tree_nodes``: tokens emitted and
    nodes verified, a step each. ``admitted_at`` and ``answered_at``: when its prompt began to be read, and
    when its first token was there, in seconds of `time.perf_counter`.
    """

    prompt: Sequence[int]
    max_tokens: int
    stop_ids: Sequence[int] = ()
    sampling: Sampling | None = None
    reuse: bool = False
    ids: list[int] = dataclasses.field(default_factory=list)
    num_prefilled: int = 0
    num_observed: int = 0
    paused: bool = False
    accepted_lengths: list[int] = dataclasses.field(default_factory=list)
    tree_nodes: list[int] = dataclasses.field(default_factory=list)
    admitted_at: float = 0.0
    answered_at: float = 0.0

    def __post_init__(self) -> None:
        self.ids = self.ids or list(map(int, self.prompt))

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)

    @property
    def begun(self) -> bool:
        """Its answer has a token at least."""
        return len(self.ids) > self.num_prompt

    @property
    def sampled(self) -> bool:
        """Its tokens are not plainly the likeliest."""
        return self.sampling is not None

    @property
    def num_cached(self) -> int:
        """Positions in the cache once it has begun: all but the pending token's."""
        return len(self.ids) - 1

    @property
    def new_ids(self) -> list[int]:
        """What was generated so far."""
        return self.ids[self.num_prompt :]

    @property
    def left(self) -> int:
        """Tokens that it may still emit."""
        return self.max_tokens - (len(self.ids) - self.num_prompt)

    @property
    def stopped(self) -> bool:
        """The last token is one of its stop ids."""
        return self.begun and self.ids[-1] in self.stop_ids

    @property
    def finished(self) -> bool:
        """A stop id ended it, or its budget is spent."""
        return self.stopped or self.left <= 0

    @property
    def live(self) -> bool:
        """It takes part in the next step."""
        return not (self.finished or self.paused)

    def append(self, tokens: Sequence[int], nodes: int) -> None:
        """Take in what a step with a tree of ``nodes`` emitted; a drafter that drafted has observed it."""
        self.ids.extend(tokens)
        self.accepted_lengths.append(len(tokens))
        self.tree_nodes.append(nodes)
        if nodes > 1:
            self.num_observed = self.num_cached

    def steps_to_end(self, nodes: int) -> int:
        """Steps of a tree until its budget is spent, at the pace of its last steps of that tree."""
        paired = zip(reversed(self.accepted_lengths), reversed(self.tree_nodes), strict=True)
        last = list(islice((tokens for tokens, tree in paired if tree == nodes), PACE_STEPS))
        return math.ceil(self.left * len(last) / sum(last)) if last else self.left


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
