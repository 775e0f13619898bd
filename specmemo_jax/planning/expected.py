"""What a drafter is expected to bring, from a measured acceptance profile."""

import dataclasses

import numpy as np

from specmemo_jax.draft import Drafter, NgramDrafter
from specmemo_jax.draft.beam import BeamDrafter
from specmemo_jax.draft.static_tree import best_tree
from specmemo_jax.planning.profile import AcceptanceProfile, ExpectedAcceptance, StrengthTree


def expected_acceptance(profile: AcceptanceProfile, drafter: Drafter) -> ExpectedAcceptance:
    """What a step of ``drafter`` is expected to bring: measured where its very shape was, else estimated.

    An n-gram tree between two that were measured lies between them. The estimate of other n-gram shapes is
    by matched tokens, as if all branches were found. That of another drafter is the best tree of as many
    nodes, levels and branches, since it picks its nodes by confidence.
    """
    nodes, depth, branches, ladder, min_hit_rate = shape_key(drafter)
    if not isinstance(drafter, NgramDrafter):
        measured = profile.measured(nodes, depth, branches)
        estimate = [StrengthTree(0, nodes, best_tree(profile.chances, nodes, depth, branches))]
    else:
        usual = NgramDrafter(nodes, drafter.branches, ladder=ladder, min_hit_rate=min_hit_rate) == drafter
        measured = profile.measured(nodes, depth, branches, ladder, min_hit_rate) if usual else None
        if usual and measured is None and not ladder:
            between = _between(profile, nodes, drafter.branches)
            if between is not None:
                return between
        tree_sizes = ladder or ((nodes, 0),)
        estimate = [StrengthTree(least, width, _ngram_tree(drafter, width)) for width, least in tree_sizes]
    if measured is None:
        return profile.expected_acceptance(estimate)
    found = measured.expected_acceptance
    return dataclasses.replace(found, source=f"{found.source}: {profile.source}")


def _between(profile: AcceptanceProfile, nodes: int, branches: int) -> ExpectedAcceptance | None:
    """A fixed n-gram tree from the measured ones of as many branches, by its number of nodes."""
    fixed = [s for s in profile.shapes if not s.ladder and s.branches == min(branches, s.nodes - 1)]
    if not fixed or not fixed[0].nodes <= nodes:
        return None
    sizes, lengths = zip(
        *sorted((s.nodes, s.expected_acceptance.accepted_length) for s in fixed), strict=True
    )
    length = float(np.interp(nodes, sizes, lengths))
    return ExpectedAcceptance(length, ((nodes, 1.0),), f"between measured trees: {profile.source}")


def _ngram_tree(drafter: NgramDrafter, nodes: int) -> tuple[int, ...]:
    """Parents of the nodes that are worth most by the drafter's decays, all branches found."""
    every = [
        (-(drafter.branch_decay**branch) * drafter.decay**level, branch, level)
        for branch in range(min(drafter.branches, drafter.num_nodes - 1))
        for level in range(drafter.max_depth)
    ]
    parents, last = [0], {}
    for _, branch, _ in sorted(every)[: nodes - 1]:
        parents.append(last.get(branch, 0))
        last[branch] = len(parents) - 1
    return tuple(parents)


def shape_key(drafter: Drafter) -> tuple[int, int, int, tuple[tuple[int, int], ...], float]:
    """What `MeasuredShape` knows a drafter's shape by: nodes, levels, branches, ladder and least chance."""
    nodes, depth = drafter.num_nodes, drafter.max_depth
    if isinstance(drafter, NgramDrafter):
        return nodes, depth, min(drafter.branches, nodes - 1), drafter.ladder, drafter.min_hit_rate
    if isinstance(drafter, BeamDrafter):
        return nodes, depth, drafter.shape.branches, (), 0.0
    return nodes, depth, 1 if drafter.is_chain else nodes - 1, (), 0.0
