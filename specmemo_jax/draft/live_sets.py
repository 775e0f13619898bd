"""What drafting keeps alive while a program runs, for the memory model (docs/memory-model.md)."""

import dataclasses

from specmemo_jax.draft.beam import TreeShape
from specmemo_jax.llama.live_sets import (
    CUBLAS_WORKSPACE,
    FULL,
    ForwardShape,
    LiveSet,
    array,
    attention,
    bookkeeping,
    fragmentation,
    head,
    projections,
    until_commit,
    workspace,
)


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


def head_live_sets(
    draft: ForwardShape, inputs: int, shape: TreeShape, most_read: int, window: int, chunk: int | None
) -> tuple[LiveSet, ...]:
    """Live sets of an EAGLE head, whose layer's passes are like ``draft``: of a step after ``most_read``
    positions a row at most; or of one pass over a prompt's ``chunk`` behind a ``window`` of what waited,
    where no chunk (0) is the windows of all rows. ``inputs``: the width of what its first product reads.
    """
    if chunk is None:
        live = beam_live_sets(draft, most_read - 1, shape)
        nodes = draft.rows * max(most_read, shape.branches)
    else:
        read = dataclasses.replace(draft, nodes=window + chunk - 1)
        if chunk:
            read = dataclasses.replace(read, rows=1, gathered=draft.rows > 1)
        live, nodes = (*attention(read), *projections(read), until_commit(read)), read.all_nodes
    width = inputs + 3 * draft.config.hidden_size  # beside them the embedding, the residual, and both normed
    beside: LiveSet = (array("inputs of the head", (nodes, width), FULL),)
    if draft.backend == "triton":  # a head's products can be too narrow for it, and cuBLAS takes those
        beside += (array("workspace", (CUBLAS_WORKSPACE,), 1, "int8"),)
    return tuple((*of, *beside) for of in live)


def medusa_live_sets(
    p: ForwardShape, heads: int, apart: bool, branches: int, chunk: int | None
) -> tuple[LiveSet, ...]:
    """Live sets of Medusa's ``heads``, of which ``p``'s nodes are asked: of a step, or of keeping a row of a
    prompt's ``chunk``. ``apart``: each head has rows of its own, and so a product; all their logits may live
    at once, and on CPU no more than two of their copies without nan. For the likeliest token alone cuBLAS'
    are copied only, under Triton those of one row; a split vocabulary is gathered on CPU.
    """
    H, V = p.config.hidden_size, p.config.vocab_size
    if chunk is not None:
        return ((array("feature told and kept", (2, H), FULL),),)
    rows, products = (p.rows, p.nodes) if apart else (p.all_nodes, 1)
    padded = max(2, rows) if p.on_cpu and p.itemsize < FULL else p.product_rows(rows)
    copies = products
    if p.on_cpu and p.shards > 1:
        copies = 2
    elif p.backend != "cublas" and (branches == 1 or (rows > 1 and not p.on_cpu)):
        copies = 0
    elif p.on_cpu:
        copies = min(products, 2)
    return (
        (
            array("blocks of the heads", (p.product_rows(p.rows), heads, H), FULL),
            array("states of the heads", (2, p.all_nodes, H), FULL),
            array("logits of the heads", (products, padded, -(-V // p.shards)), FULL),
            array("logits to choose from", (copies, rows, V), FULL),
            *(() if p.on_cpu else (workspace(p),)),
            fragmentation(p),
            bookkeeping(p),
        ),
    )


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
