"""Log probabilities of tokens that are given, over the last row's cache."""

from collections.abc import Sequence

import jax
import numpy as np

from specmemo_jax.engine.reading import chunks_within
from specmemo_jax.engine.request import common_prefix
from specmemo_jax.engine.runner import Runner


class Scorer:
    """Scores texts one after the other; what two of them begin alike with is read once."""

    def __init__(self, runner: Runner):
        self._runner = runner
        self._read: list[int] = []  # what the row's cache holds of the last text

    def forget(self) -> None:
        """The row's cache holds something else."""
        self._read = []

    def score(self, ids: Sequence[int], begin: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each token from position ``begin`` on, its natural log probability after those before it, and
        whether it is the likeliest there.
        """
        runner, row, last = self._runner, self._runner.shapes.batch - 1, len(ids) - 1
        kept = min(common_prefix(self._read, ids), begin - 1)
        self._read = []
        found, likeliest = np.zeros(len(ids)), np.zeros(len(ids), bool)
        for start, width in chunks_within(runner, row, kept, last):  # the last id is predicted, and not read
            end = min(start + width, last)
            read, following = np.zeros((2, 1, width), np.int32)
            read[0, : end - start], following[0, : end - start] = ids[start:end], ids[start + 1 : end + 1]
            program = runner.program("score", width)
            scores = jax.device_get(runner.run(program, read, following, np.int32(start), np.int32(row)))
            for whole, part in zip((found, likeliest), scores, strict=True):
                whole[start + 1 : end + 1] = part[: end - start]
        self._read = list(ids[:last])
        return found[begin:], likeliest[begin:]
