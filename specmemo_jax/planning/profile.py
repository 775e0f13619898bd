"""Acceptance profiles: how often a target accepts what a drafter proposes, by depth and rank.

Measured once for a drafter and a target on some prompts (`specmemo_jax.measure.acceptance`), kept as JSON,
and asked by the planner for the expected accepted length of trees that were never run. Depth counts levels
below the root, rank the order among siblings, both as in Sequoia (arXiv 2402.12374, section 4) and
Medusa (arXiv 2401.10774, section 2.3.3).
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from specmemo_jax.errors import ConfigError
from specmemo_jax.files.cache_dir import cache_dir
from specmemo_jax.files.json_files import Reader, file_name, write_json

PSEUDO_COUNT = 4.0  # what a prior weighs against counts, in candidates seen: see `AcceptanceProfile.chances`
FORMAT = 1

Chances = tuple[tuple[float, ...], ...]
Counts = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class MatchStrength:
    """Steps in which the drafter knew equally much: ``strength`` is what it tells a ladder.

    For n-grams the number of tokens that matched, 0 where nothing did. A drafter without such a
    signal has one entry, of strength 1. ``seen[depth - 1][rank]``: candidates there whose parent was
    accepted; ``accepted`` of them.
    """

    strength: int
    steps: int
    seen: Counts
    accepted: Counts


@dataclasses.dataclass(frozen=True)
class StrengthTree:
    """What a drafter proposes from a strength on: a tree (``parents[0] = 0``, parents before children),
    verified in a pass of ``width`` nodes.
    """

    least_strength: int
    width: int
    parents: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ExpectedAcceptance:
    """What a step is expected to bring: ``accepted_length`` tokens (bonus token counted), and how often
    its verification is how wide: ``(width, share of steps)``, rising. ``source`` says where from.
    """

    accepted_length: float
    widths: tuple[tuple[int, float], ...]
    source: str

    def widths_of_batch(self, batch: int) -> tuple[tuple[int, float], ...]:
        """The same for ``batch`` independent rows, of which a step takes the widest."""
        below, total, shares = 0.0, 0.0, []
        for width, share in self.widths:
            total += share
            reached = min(total, 1.0) ** batch
            shares.append((width, reached - below))
            below = reached
        return tuple(shares)


@dataclasses.dataclass(frozen=True)
class MeasuredShape:
    """A drafter's shape as it was run, ``depth`` levels below the root; ``ladder`` and ``min_hit_rate`` as
    n-grams have them. ``outcomes`` are ``(width verified, steps, tokens that they brought)``.
    """

    nodes: int
    depth: int
    branches: int
    ladder: tuple[tuple[int, int], ...]
    min_hit_rate: float
    outcomes: tuple[tuple[int, int, int], ...]

    @property
    def steps(self) -> int:
        """Steps that were run."""
        return sum(steps for _, steps, _ in self.outcomes)

    @property
    def expected_acceptance(self) -> ExpectedAcceptance:
        """The measured means."""
        return ExpectedAcceptance(
            accepted_length=sum(tokens for _, _, tokens in self.outcomes) / self.steps,
            widths=tuple((width, steps / self.steps) for width, steps, _ in sorted(self.outcomes)),
            source=f"measured over {self.steps} steps",
        )


@dataclasses.dataclass(frozen=True)
class AcceptanceProfile:
    """What was measured for ``drafter`` and ``model``; ``prompts`` names the file, ``date`` is ISO 8601."""

    drafter: str
    model: str
    dtype: str
    prompts: str
    date: str
    signals: tuple[MatchStrength, ...]
    shapes: tuple[MeasuredShape, ...] = ()

    @property
    def steps(self) -> int:
        """Steps behind `chances`."""
        return sum(signal.steps for signal in self.signals)

    @property
    def filled(self) -> float:
        """How often a step has any candidate."""
        return sum(_at(s.seen, 0, 0) for s in self.signals) / max(self.steps, 1)

    @property
    def source(self) -> str:
        """Where the numbers come from, in one line."""
        return (
            f"{self.drafter} for {self.model} ({self.dtype}) on {self.prompts}, "
            f"{self.steps} steps, {self.date}"
        )

    @cached_property
    def chances(self) -> Chances:
        """``[depth - 1][rank]``: the chance that a candidate there is accepted, given that its parent was.

        The root is always accepted, and its children are counted over all steps, those without such a
        candidate too. Deeper ones are counted over what was seen and smoothed: `PSEUDO_COUNT` candidates
        at the chance of the same rank one level up are added. What was never seen, a depth or a rank, has
        no chance: nothing is promised that was not measured.
        """
        depths = max((len(s.seen) for s in self.signals), default=0)
        ranks = max((len(row) for s in self.signals for row in s.seen), default=0)
        table: list[tuple[float, ...]] = []
        for d in range(depths):
            row = []
            for r in range(ranks):
                seen = sum(_at(s.seen, d, r) for s in self.signals)
                accepted = sum(_at(s.accepted, d, r) for s in self.signals)
                if d == 0 or not seen:
                    row.append(accepted / max(self.steps, 1))
                else:
                    row.append((accepted + PSEUDO_COUNT * table[-1][r]) / (seen + PSEUDO_COUNT))
            table.append(tuple(row))
        return tuple(table)

    def chances_at(self, signal: MatchStrength) -> Chances:
        """`chances` in the steps of one signal, smoothed with `PSEUDO_COUNT` candidates at the chances of
        all; zero everywhere where no step had a candidate.
        """
        if not _at(signal.seen, 0, 0):
            return ()
        table = []
        for d, row in enumerate(self.chances):
            seen = [signal.steps if d == 0 else _at(signal.seen, d, r) for r in range(len(row))]
            accepted = [_at(signal.accepted, d, r) for r in range(len(row))]
            table.append(
                tuple(
                    (a + PSEUDO_COUNT * p) / (s + PSEUDO_COUNT)
                    for a, s, p in zip(accepted, seen, row, strict=True)
                )
            )
        return tuple(table)

    def expected_length(self, parents: Sequence[int], signal: MatchStrength | None = None) -> float:
        """Expected tokens of a step with this tree, bonus token counted: 1 + the sum over nodes of the
        product of chances along the node's path. Siblings rank in their order. ``signal`` restricts it
        to steps of that strength. Raises ConfigError for parents that do not come before their children.
        """
        chances = self.chances if signal is None else self.chances_at(signal)
        return 1.0 + sum(_path_chances(chances, parents))

    def expected_acceptance(self, tree_sizes: Sequence[StrengthTree]) -> ExpectedAcceptance:
        """What a step brings with trees that rise in least strength; one of strength 0 is a fixed tree.
        What a drafter learns of its guesses as a text goes on is not in it.

        Steps weaker than the first rung are plain decoding: width 1, one token.
        """
        length, shares = 0.0, {}
        for signal in self.signals:
            share = signal.steps / max(self.steps, 1)
            fitting = [rung for rung in tree_sizes if rung.least_strength <= signal.strength]
            width = fitting[-1].width if fitting else 1
            length += share * (self.expected_length(fitting[-1].parents, signal) if fitting else 1.0)
            shares[width] = shares.get(width, 0.0) + share
        return ExpectedAcceptance(length, tuple(sorted(shares.items())), f"estimated from {self.source}")

    def measured(
        self,
        nodes: int,
        depth: int,
        branches: int,
        ladder: Sequence[tuple[int, int]] = (),
        min_hit_rate: float = 0.0,
    ) -> MeasuredShape | None:
        """The shape as it was run, where it was."""
        wanted = MeasuredShape(nodes, depth, branches, tuple(ladder), min_hit_rate, ())
        return next((s for s in self.shapes if dataclasses.replace(s, outcomes=()) == wanted), None)

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_json(path, {"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: Path) -> "AcceptanceProfile":
        """Read what `save` wrote. Raises ConfigError naming the file and what is wrong in it."""
        reader = Reader.of_file(
            path, "an acceptance profile (`specmemo calibrate --prompts FILE` writes one)"
        )
        reader.expect("format", FORMAT)
        texts = {name: reader.text(name) for name in ("drafter", "model", "dtype", "prompts", "date")}
        profile = cls(
            **texts,
            signals=tuple(map(_read_signal, reader.items("signals"))),
            shapes=tuple(map(_read_shape, reader.items("shapes"))),
        )
        reader.check(profile.steps > 0, "holds no steps")
        strengths = [signal.strength for signal in profile.signals]
        reader.check(strengths == sorted(set(strengths)), f"signals {strengths} must rise in strength")
        return profile


def user_folder(model: str) -> Path:
    """Where a user's own profiles of a model lie; the zoo's are in ``models/NAME/profiles``."""
    return cache_dir() / "profiles" / file_name(model)


def profile_file(folder: Path, drafter: str) -> Path:
    """The file of a drafter's profile in a folder of profiles."""
    return folder / f"{file_name(drafter)}.json"


def find_profile(drafter: str, *folders: Path) -> AcceptanceProfile | None:
    """The profile of a drafter by its name in the first folder that has one. Raises ConfigError for a
    file that is broken.
    """
    files = [profile_file(folder, drafter) for folder in folders]
    return next((AcceptanceProfile.load(file) for file in files if file.is_file()), None)


def _at(counts: Counts, depth: int, rank: int) -> int:
    return counts[depth][rank] if depth < len(counts) and rank < len(counts[depth]) else 0


def _path_chances(chances: Chances, parents: Sequence[int]) -> list[float]:
    reached, depths, children = [1.0], [0], [0] * len(parents)
    for node, parent in enumerate(parents):
        if not (0 <= parent < node or node == parent == 0):
            raise ConfigError(f"tree: node {node} has parent {parent}; a node before it would work")
        if node:
            depth, rank = depths[parent], children[parent]
            row = chances[depth] if depth < len(chances) else ()
            reached.append(reached[parent] * (row[rank] if rank < len(row) else 0.0))
            depths.append(depth + 1)
            children[parent] += 1
    return reached[1:]


def _read_signal(reader: Reader) -> MatchStrength:
    seen, accepted = reader.table("seen"), reader.table("accepted")
    signal = MatchStrength(reader.whole("strength"), reader.whole("steps"), seen, accepted)
    reader.check([*map(len, seen)] == [*map(len, accepted)], "seen and accepted differ in shape")
    pairs = [pair for rows in zip(seen, accepted, strict=True) for pair in zip(*rows, strict=True)]
    reader.check(all(a <= s for s, a in pairs), "more was accepted than seen")
    reader.check(all(s <= signal.steps for s in (seen[0] if seen else ())), "more seen than steps")
    return signal


def _read_shape(reader: Reader) -> MeasuredShape:
    ladder: Any = reader.table("ladder", 2)
    outcomes: Any = reader.table("outcomes", 3)
    # Older files have the rate by another name, or not at all.
    names = (name for name in ("min_hit_rate", "least_chance") if name in reader.fields)
    shape = MeasuredShape(
        reader.count("nodes"),
        reader.count("depth"),
        reader.count("branches"),
        ladder,
        next(map(reader.amount, names), 0.0),
        outcomes,
    )
    reader.check(shape.steps > 0, "holds no steps")
    good = all(steps <= tokens <= steps * (shape.depth + 1) for _, steps, tokens in shape.outcomes)
    reader.check(good, f"outcomes must bring 1 to {shape.depth + 1} tokens a step")
    return shape
