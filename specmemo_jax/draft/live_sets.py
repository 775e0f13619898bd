"""What drafting keeps alive while a program runs, for the memory model (docs/memory-model.md)."""

import dataclasses

from specmemo_jax.draft.beam import TreeShape
from specmemo_jax.llama.live_sets import FULL, ForwardShape, LiveSet, array, attention, head, projections


def beam_live_sets(draft: ForwardShape, unread: int, shape: TreeShape) -> tuple[LiveSet, ...]:
    """Live sets of `beam_draft` by a draft whose passes are like ``draft``, after ``unread`` U tokens a row.

    The first pass reads U + 1 nodes a row; each further one ``branches`` nodes that see all before them,
    whose keys and values are then held twice, as they were and with the level's appended.
    """
    k, B = shape.branches, draft.rows
    first = dataclasses.replace(draft, nodes=unread + 1, seen=unread + 1)
    live = [*attention(first), *projections(first), *_choice(first, B, k)]
    if shape.depth > 1:
        seen = unread + 1 + (shape.depth - 1) * k
        last = dataclasses.replace(draft, nodes=k, seen=seen)
        K, D, layers = last.heads[1], draft.config.head_dim, last.depth
        nodes = array("keys and values of earlier levels", (2, layers, 2, B, K, seen, D), draft.itemsize)
        level = array("keys and values of one layer's levels", (2, B, K, seen, D), FULL)
        live += [
            (*phase, nodes, level)
            for phase in (*attention(last), *projections(last), *_choice(last, B * k, k))
        ]
    return tuple(live)


def _choice(p: ForwardShape, rows: int, branches: int) -> tuple[LiveSet, ...]:
    """The logits of ``rows`` nodes, and what picking the likeliest takes: a copy without nan on CPU, where
    cuBLAS made them or where there is one row, nothing more under Triton. XLA's CPU backend gathers a split
    vocabulary for it.
    """
    copies, columns = 1, -(-p.config.vocab_size // p.shards)
    if p.on_cpu and branches > 1 and p.shards > 1:
        copies, columns = 2, p.config.vocab_size
    elif p.backend == "triton" and (rows > 1 or branches == 1):
        copies = 0
    scores = array("logits to choose from", (copies, rows, columns), FULL)
    return tuple((*live, scores) for live in head(p, rows, False, rows))
