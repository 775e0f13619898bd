"""A chooser that says what it is told to."""

from collections.abc import Iterable

from specmemo_jax.engine.adaptive import TreeChooser


class ScriptedChooser(TreeChooser):
    """Names ``trees`` in turn, ``most`` steps of each at most; remembers what it was asked and told."""

    def __init__(self, trees: Iterable[int], most: int = 2):
        self.trees, self.most = iter(trees), most
        self.waiting: list[int] = []
        self.told: list[tuple[int, int]] = []

    def choose(self, steps: int, waiting: int = 0) -> tuple[int, int]:
        self.waiting.append(waiting)
        return next(self.trees), min(steps, self.most)

    def ahead(self, steps: int) -> tuple[int, ...]:
        return (1,)

    def record(self, nodes: int, steps: int, seconds: float, tokens: float) -> None:
        self.told.append((nodes, steps))
