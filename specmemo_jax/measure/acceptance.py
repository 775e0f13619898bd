"""Measuring acceptance profiles: what a drafter proposed at every step of answers, against what came.

Greedy answers do not depend on the drafter, so an n-gram drafter, which knows nothing but the text, is
replayed over answers that are known already: every position is asked, and any shape's steps are walked on
the host. Other drafters run in the engine, whose recording step hands out the trees.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specmemo_jax.decode.emitted import drain
from specmemo_jax.draft import LADDERS, Drafter, NgramDrafter, make_drafter
from specmemo_jax.draft.ngram import updated_rate
from specmemo_jax.draft.tree import NO_TOKEN, Tree
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.request import Request
from specmemo_jax.engine.runner import grown
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama import kv
from specmemo_jax.planning.expected import shape_key
from specmemo_jax.planning.profile import (
    AcceptanceProfile,
    MatchStrength,
    MeasuredShape,
)

DEPTHS = 16  # levels below the root that chances are counted for
NODES = 64  # of the largest trees replayed
ROWS = 32  # positions a replay asks at once


@dataclasses.dataclass(frozen=True)
class Answer:
    """A prompt's ids and the target's greedy ids after it."""

    prompt: tuple[int, ...]
    new: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """All of them."""
        return self.prompt + self.new


@dataclasses.dataclass(frozen=True)
class Proposal:
    """One row's tree at the host, and ``truth``: the tokens that followed its root, as far as known."""

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    truth: Sequence[int]

    @classmethod
    def of(cls, nodes: Sequence[np.ndarray], row: int, truth: Sequence[int]) -> "Proposal":
        """Row ``row`` of a tree's arrays as `_at_host` gives them."""
        tokens, parents, depths = (array[row] for array in nodes)
        return cls(tokens, parents, depths, truth)

    def first(self, nodes: int) -> "Proposal":
        """Its first nodes only."""
        return Proposal(self.tokens[:nodes], self.parents[:nodes], self.depths[:nodes], self.truth)

    @property
    def filled(self) -> int:
        """Nodes, root included."""
        return 1 + int(np.max(np.where(self.tokens != NO_TOKEN, np.arange(len(self.tokens)), 0)))

    def accepted(self) -> list[tuple[int, int, bool]]:
        """``(depth, rank, accepted)`` of each candidate below an accepted node whose truth is known."""
        on_path, children, found = {0}, Counter(), []
        for node in range(1, len(self.tokens)):
            parent, depth = int(self.parents[node]), int(self.depths[node])
            if self.tokens[node] == NO_TOKEN or parent not in on_path:
                continue
            rank = children[parent]
            children[parent] += 1
            if depth <= len(self.truth):
                right = int(self.tokens[node]) == self.truth[depth - 1]
                found.append((depth, rank, right))
                if right:
                    on_path.add(node)
        return found

    @property
    def accepted_length(self) -> int:
        """Tokens the step emits, bonus token counted; at most what is known."""
        deepest = max((depth for depth, _, right in self.accepted() if right), default=0)
        return min(deepest + 1, len(self.truth))


class _Tally:
    """Counts of one signal, growing."""

    def __init__(self) -> None:
        self.steps, self.seen, self.accepted = 0, Counter(), Counter()

    def add(self, proposal: Proposal) -> None:
        self.steps += 1
        for depth, rank, right in proposal.accepted():
            if depth <= DEPTHS:
                self.seen[depth, rank] += 1
                self.accepted[depth, rank] += right

    def signal(self, strength: int) -> MatchStrength:
        depths = max((d for d, _ in self.seen), default=0)
        ranks = 1 + max((r for _, r in self.seen), default=-1)

        def table(counts: Counter) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(counts[d, r] for r in range(ranks)) for d in range(1, depths + 1))

        return MatchStrength(strength, self.steps, table(self.seen), table(self.accepted))


# ---------------------------------------------------------------- n-grams, by replay


def replay(drafter: NgramDrafter, answers: Sequence[Answer]) -> list[list[Proposal]]:
    """What ``drafter`` proposes at every position of every answer, its first token pending first.

    One program of `ROWS` rows that observe the text before the position and propose.
    """
    capacity = -(-max(len(answer.ids) for answer in answers) // 128) * 128

    @jax.jit
    def ask(tokens: jax.Array, counts: jax.Array, pending: jax.Array) -> Any:
        state = drafter.init(kv.Groups.of(ROWS, capacity))
        every = jnp.arange(ROWS)
        state = drafter.record(state, every, tokens, jnp.zeros_like(counts), counts)
        return drafter.look_up(state, pending, counts)[0]

    found = []
    for answer in answers:
        ids = np.asarray(answer.ids, np.int32)
        tokens = np.zeros((ROWS, capacity), np.int32)
        tokens[:, : len(ids)] = ids
        positions = np.arange(len(answer.prompt), len(ids) - 1)
        proposals = []
        for start in range(0, len(positions), ROWS):
            here = positions[start : start + ROWS]
            counts = np.zeros((ROWS,), np.int32)
            counts[: len(here)] = here
            tree = _at_host(ask(tokens, counts, ids[counts]))
            proposals += [Proposal.of(tree, row, answer.ids[at + 1 :]) for row, at in enumerate(here)]
        found.append(proposals)
    return found


def measure_ngram(
    drafter: NgramDrafter, answers: Sequence[Answer], labels: Mapping[str, str]
) -> AcceptanceProfile:
    """A profile by replay: chances by matched tokens at the steps of ``drafter``, and `measured_shapes`,
    each walked from step to step as the engine would.

    Only where steps begin is counted: inside a stretch that is accepted whole every position has a long
    match, and counting those too would promise twice what steps bring. A smaller tree, or a ladder's rung,
    is the beginning of a larger one's nodes, so three replays serve all shapes. Raises ConfigError where
    no answer has two tokens.
    """
    # A ladder of one node a matched token tells the match by the nodes it fills.
    every = tuple((matched + 1, matched) for matched in range(1, drafter.max_ngram + 1))
    probe = dataclasses.replace(
        drafter, num_nodes=drafter.max_ngram + 1, branches=1, ladder=every, min_hit_rate=0.0
    )
    matched = [[proposal.filled - 1 for proposal in row] for row in replay(probe, answers)]
    if not any(matched):
        raise ConfigError("no step to replay: answers of at least 2 tokens would work")
    whole = dataclasses.replace(drafter, num_nodes=NODES, ladder=(), min_hit_rate=0.0)
    trees = {
        branches: replay(dataclasses.replace(whole, branches=branches), answers)
        for branches in {1, drafter.branches}
    }
    tallies = {strength: _Tally() for strength in range(drafter.max_ngram + 1)}
    for row, at, _ in _walk(drafter, trees[drafter.branches], matched):
        tallies[matched[row][at]].add(trees[drafter.branches][row][at])
    shapes = []
    for shape in measured_shapes(drafter):
        steps = [
            (width, trees[shape.branches][row][at].first(width).accepted_length)
            for row, at, width in _walk(shape, trees[shape.branches], matched)
        ]
        shapes.append(_shape(shape, steps))
    signals = tuple(tally.signal(strength) for strength, tally in tallies.items() if tally.steps)
    return AcceptanceProfile(**labels, signals=signals, shapes=tuple(shapes))


def _walk(
    shape: NgramDrafter, trees: Sequence[Sequence[Proposal]], matched: Sequence[Sequence[int]]
) -> Iterator[tuple[int, int, int]]:
    """Where the steps of ``shape`` begin, and the nodes that they verify: ``(answer, position, width)``."""
    for row, proposals in enumerate(trees):
        at, chances = 0, np.asarray((0, *shape.initial_hit_rates), np.float32)
        while at < len(proposals):
            match, proposal = matched[row][at], proposals[at]
            width = _width_of_match(shape, match, float(chances[match]))
            yield row, at, width
            if match:
                chances[match] = updated_rate(
                    chances[match], np.float32(proposal.tokens[1] == proposal.truth[0])
                )
            at += proposal.first(width).accepted_length


def _width_of_match(shape: NgramDrafter, matched: int, chance: float) -> int:
    """Nodes that are verified where so many tokens match, of which ``chance`` is what was learned."""
    if not shape.ladder:
        return shape.num_nodes
    if shape.min_hit_rate and matched:
        matched = max(matched, shape.ladder[0][1]) if chance >= np.float32(shape.min_hit_rate) else 0
    return max((nodes for nodes, least in shape.ladder if matched >= least), default=1)


def measured_shapes(drafter: NgramDrafter) -> tuple[NgramDrafter, ...]:
    """The shapes that a planner may choose from: trees and chains of 2 to `NODES` nodes, and the chains of
    `LADDERS`, whole and cut to as many nodes.
    """
    sizes = (*range(2, 17), *range(20, 33, 4), *range(40, NODES + 1, 8))
    trees = [
        dataclasses.replace(drafter, num_nodes=nodes, branches=branches, ladder=(), min_hit_rate=0.0)
        for branches in sorted({1, drafter.branches})
        for nodes in sizes
    ]
    usual = [make_drafter("ngram", nodes, dtype=dtype) for dtype in LADDERS for nodes in sizes]
    chains = [
        dataclasses.replace(chain, max_ngram=drafter.max_ngram)
        for chain in usual
        if isinstance(chain, NgramDrafter) and chain.ladder[-1][1] <= drafter.max_ngram
    ]
    return tuple(dict.fromkeys((*trees, *chains)))


# ---------------------------------------------------------------- any drafter, in the engine


def recorded(engine: Engine, request: Request) -> tuple[list[int], list[Proposal]]:
    """Run one greedy request through the recording step: its new ids, and what was proposed at each step.

    ``engine`` has a drafter and no live row; its device state is begun anew.
    """
    engine.admit(0, request)
    ids, end, trees = request.ids, request.num_prompt + request.max_tokens, []
    now, state, shapes = engine.capacity, engine.take_state(), engine.shapes
    capacity = max(now, shapes.capacity_for(min(end, shapes.context) + shapes.slack))
    if capacity > now:
        state = grown(state, shapes, capacity)
    step = engine.step_program(capacity, record=True)
    while len(ids) < end and ids[-1] not in request.stop_ids:
        state, tree = step(engine.target.leaves, engine.draft_weights, state)
        trees.append((_at_host(tree), len(ids)))
        count, *tokens = drain(state.emitted, 1)[0, 0].tolist()
        ids.extend(tokens[:count])
    return request.new_ids, [Proposal.of(tree, 0, ids[at:]) for tree, at in trees]


def profile_of_steps(
    drafter: Drafter, proposals: Sequence[Proposal], labels: Mapping[str, str]
) -> AcceptanceProfile:
    """The profile of steps that were run. Raises ConfigError where there are none."""
    if not proposals:
        raise ConfigError("no step was run: every answer ended at once; other prompts would work")
    tally = _Tally()
    for proposal in proposals:
        tally.add(proposal)
    shape = _shape(drafter, [(_width(drafter, p), p.accepted_length) for p in proposals])
    return AcceptanceProfile(**labels, signals=(tally.signal(1),), shapes=(shape,))


def _at_host(tree: Tree) -> tuple[np.ndarray, ...]:
    """A tree's tokens, parents and depths."""
    return tuple(map(np.asarray, (tree.tokens, tree.parents, tree.depths)))


def _width(drafter: Drafter, proposal: Proposal) -> int:
    """Nodes that the engine verifies."""
    return next(width for width in drafter.verify_buckets if width >= proposal.filled)


def _shape(drafter: Drafter, steps: Sequence[tuple[int, int]]) -> MeasuredShape:
    """Of each step's width and accepted length."""
    verify_buckets = sorted({width for width, _ in steps})
    lengths = [[length for at, length in steps if at == width] for width in verify_buckets]
    outcomes = tuple((w, len(each), sum(each)) for w, each in zip(verify_buckets, lengths, strict=True))
    return MeasuredShape(*shape_key(drafter), outcomes)
