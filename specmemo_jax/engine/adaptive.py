"""Which tree to verify next, from what the last ones cost and gave: never slower than plain decoding.

Sequoia (arXiv 2402.12374, section 4.2) chooses a tree for a device ahead of time; here the choice
moves while text is generated, because what a drafter is worth depends on the text.
"""

import dataclasses
import statistics
from collections import deque
from collections.abc import Sequence

FIRST_STEPS = 16  # of the largest tree before others are tried, where one row decodes
WINDOW = 256  # steps of a tree that its figures are taken over: texts that repeat come by chance
SHORT_WINDOW, COLLAPSE = 32, 0.8  # steps at less of plain decoding's speed, by which alone a tree is judged
PROBE = 4  # steps a tree is tried for; of several rows each counts, so that fewer will do
FIRST_PATIENCE, LAST_PATIENCE = 32, 1024  # steps until a losing tree is tried again
MOST_HALVINGS = 3  # of how often it is tried
PROBE_SHARE = 0.01  # of the time, the most that trying one losing tree may cost
# A tree's over plain decoding, a row and at most: the slowest row gains least by trees, and ends last.
ROW_MARGIN, MOST_MARGIN = 0.1, 0.3
MOST_TURNS = 8  # requests that wait for each place: the more, the less the last rows' end weighs


@dataclasses.dataclass
class _Figures:
    """Bursts of one tree: (steps, seconds a step, tokens a row in all)."""

    bursts: deque[tuple[int, float, float]] = dataclasses.field(default_factory=deque)
    idle: int = 0
    losses: int = 0  # times in a row that it was tried and lost
    patience: int = FIRST_PATIENCE

    @property
    def seconds(self) -> float:
        """A step's, the median of the bursts."""
        return statistics.median(burst[1] for burst in self.bursts)

    @property
    def tokens(self) -> float:
        """A row's, a step's."""
        return sum(burst[2] for burst in self.bursts) / sum(burst[0] for burst in self.bursts)

    @property
    def rate(self) -> float:
        """Tokens a row a second."""
        return self.tokens / self.seconds

    def add(self, steps: int, seconds: float, tokens: float) -> None:
        self.bursts.append((steps, seconds / steps, tokens))
        self.bursts = self.last(WINDOW).bursts

    def last(self, steps: int) -> "_Figures":
        """The last bursts that hold so many steps, or all."""
        last, held = deque(), 0
        for burst in reversed(self.bursts):
            if held >= steps:
                break
            last.appendleft(burst)
            held += burst[0]
        return _Figures(last)


class TreeChooser:
    """Moves between ``tree_sizes``, sizes of tree that rise from 1 (plain decoding).

    `choose` names the next burst's tree and how many steps it may run; `record` takes in what came
    of it. The largest tree runs first, then each other is tried; from there on the one of most tokens
    a second runs, and each other is tried again for a few steps at a time, so seldom that trying costs
    `PROBE_SHARE` of the time, and half as often each time that it has lost again, `MOST_HALVINGS` times.
    Where ``rows`` share a step, a tree that is faster than plain decoding by less than a margin does not
    count as faster: rows gain unequally by it, end apart, and leave places empty when no more requests wait.
    The more do, the smaller it is. A tree that has become much slower than plain decoding is judged by its
    last steps alone.
    ``probe``: steps that a tree is tried for, where `PROBE` among the rows is not meant.
    """

    def __init__(self, tree_sizes: Sequence[int], rows: int = 1, probe: int | None = None):
        self.tree_sizes = tuple(tree_sizes)
        self.rows = rows
        self.margin = self._margin(waiting=0)
        self.probe = max(1, PROBE // rows) if probe is None else probe
        self.first_steps = max(1, FIRST_STEPS // rows)
        self._figures = {rung: _Figures() for rung in self.tree_sizes}
        self._steps = 0

    def _margin(self, waiting: int) -> float:
        turns = min(max(1, waiting / self.rows), MOST_TURNS)
        return min(MOST_MARGIN, ROW_MARGIN * (self.rows - 1)) / turns

    def choose(self, steps: int, waiting: int = 0) -> tuple[int, int]:
        """The tree's nodes, and at most ``steps`` steps for it; ``waiting`` requests wait for a place."""
        self.margin = self._margin(waiting)
        if self._steps < self.first_steps:
            return self.tree_sizes[-1], min(steps, self.first_steps)
        for rung in self.tree_sizes:
            if not self._figures[rung].bursts:
                return rung, min(steps, self.probe)
        best = self.best
        for rung, figures in self._figures.items():
            if rung != best and figures.idle >= figures.patience:
                return rung, min(steps, self.probe)
        return best, steps

    def ahead(self, steps: int) -> tuple[int, ...]:
        """The trees that the next ``steps`` steps may ask for."""
        return self.tree_sizes if self._steps + steps > self.first_steps else self.tree_sizes[-1:]

    @property
    def best(self) -> int:
        """The tree of most tokens a second so far, the margin counted."""
        tried = [rung for rung in self.tree_sizes if self._figures[rung].bursts]
        return max(tried, key=lambda r: self._figures[r].rate * (1 + self.margin if r == 1 else 1))

    def record(self, nodes: int, steps: int, seconds: float, tokens: float) -> None:
        """``steps`` steps of a tree took ``seconds`` and gave a row ``tokens`` in all, on average."""
        self._steps += steps
        used = self._figures[nodes]
        used.add(steps, seconds, tokens)
        recent, plain = used.last(SHORT_WINDOW), self._figures[1]
        if nodes > 1 and plain.bursts and recent.rate < COLLAPSE * plain.rate:
            used.bursts = recent.bursts
        used.idle = 0
        for rung, figures in self._figures.items():
            figures.idle += 0 if rung == nodes else steps
        best = self._figures[self.best]
        lost = max(0.0, used.seconds - used.tokens / best.rate)  # a step's, against the best tree
        wait = max(FIRST_PATIENCE, self.probe * lost / (PROBE_SHARE * best.seconds))
        used.losses = 0 if used is best else used.losses + 1
        halvings = min(max(0, used.losses - 1), MOST_HALVINGS)
        used.patience = int(min(wait * 2**halvings, LAST_PATIENCE))
