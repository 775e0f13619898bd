"""Hypothesis strategy for token trees, and the plain walk that the engine's must equal."""

import numpy as np
from hypothesis import strategies as st


@st.composite
def trees(draw, max_nodes=9, vocab=5):
    """``(tokens, parents, depths)`` of a tree whose siblings differ, unfilled nodes included."""
    T = draw(st.integers(1, max_nodes))
    parents, depths, tokens = [0], [0], [draw(st.integers(0, vocab - 1))]
    taken: dict[int, set[int]] = {}
    for node in range(1, T):
        parent = draw(st.integers(0, node - 1))
        free = sorted(set(range(vocab)) - taken.get(parent, set()))
        token = draw(st.sampled_from([*free, -1])) if free else -1
        taken.setdefault(parent, set()).add(token)
        parents.append(parent)
        depths.append(depths[parent] + 1)
        tokens.append(token)
    return np.array(tokens), np.array(parents), np.array(depths)


def ancestors_of(parents):
    mask = np.eye(len(parents), dtype=bool)
    for node in range(1, len(parents)):
        mask[node] |= mask[parents[node]]
    return mask


def walk(tokens, parents, choices):
    """Greedy acceptance, one node at a time: the path and what the target says along it."""
    path = [0]
    while True:
        children = [
            j for j in range(1, len(tokens)) if parents[j] == path[-1] and tokens[j] == choices[path[-1]]
        ]
        if not children:
            return path, [int(choices[node]) for node in path]
        path.append(children[0])
