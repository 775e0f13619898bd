"""Drafted trees against a plain search that runs the model over every path from scratch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmemo_jax.draft import DraftModel, SelfDrafter, TreeShape, View
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama import kv
from specmemo_jax.llama.model import forward
from specmemo_jax.llama.packing import pack
from specmemo_jax.testing import TINY, tiny_llama, whole_logits

CONFIG = dataclasses.replace(TINY, vocab_size=19, max_context=128)
TARGET = pack(CONFIG, iter(tiny_llama(CONFIG, seed=7).items()), jnp.dtype("float32"))
S = 96


@functools.cache
def every_position(layers):
    """Log probabilities after each of S tokens, without a cache."""
    logits = functools.partial(whole_logits, TARGET, num_layers=layers)
    return jax.jit(lambda leaves, ids: jax.nn.log_softmax(logits(leaves, ids))[0])


@functools.cache
def log_p(ids, layers=2):
    tokens = np.zeros((1, S), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(every_position(layers)(TARGET.leaves, tokens))[len(ids) - 1]


def search(ids, shape, layers=2):
    """Paths of the T - 1 best candidates, by expanding the best ``branches`` a level."""
    beam, met = [((), 0.0)], []
    for _ in range(shape.depth):
        children = []
        for path, joint in beam:
            row = log_p((*ids, *path), layers)
            best = np.argsort(-row)[: shape.branches]
            children += [((*path, int(token)), joint + float(row[token])) for token in best]
        met += children
        beam = sorted(children, key=lambda child: -child[1])[: shape.branches]
    return {path for path, _ in sorted(met, key=lambda child: -child[1])[: shape.num_nodes - 1]}


def paths(tree, b):
    tokens, parents, depths = (np.asarray(x)[b].tolist() for x in (tree.tokens, tree.parents, tree.depths))
    found: list[tuple[int, ...]] = [()]
    for token, parent, depth in zip(tokens[1:], parents[1:], depths[1:], strict=True):
        assert parent < len(found)
        found.append((*found[parent], token))
        assert len(found[-1]) == depth
    return set(found[1:])


def view(drafter, group=None):
    return View(drafter.weights(TARGET), TARGET.merge(TARGET.leaves), (), group)


@pytest.mark.parametrize(
    "shape", [TreeShape.of(5), TreeShape(7, 3, 2), TreeShape(12, 4, 3), TreeShape(4, 1, 3), TreeShape.of(18)]
)
def test_trees_are_the_search_s_at_every_stage_of_a_row(shape):
    """Prompts in chunks, then steps that commit one token, some, or all that a path can hold (which may be
    more than a chunk).
    """
    drafter = DraftModel.of(TARGET, shape)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 19, n).tolist() for n in (21, 33)]
    state = drafter.init(kv.Groups.of(2, S))
    read = jax.jit(functools.partial(drafter.observe, view(drafter, group=0)))
    observe, propose = (
        jax.jit(functools.partial(f, view(drafter))) for f in (drafter.observe, drafter.propose)
    )
    for b, prompt in enumerate(prompts):
        for start in (0, 16, 32):
            chunk = prompt[start : start + 16]
            if chunk:
                tokens = jnp.array([chunk + [0] * (16 - len(chunk))])
                at = (jnp.array([b]), tokens, jnp.array([start]), jnp.array([len(chunk)]))
                state = read(state, *at)
    rows = jnp.arange(2)
    for commit in ((1, 1), (shape.depth + 1, 2), (0, 1), (2, shape.depth + 1), (1, 1)):
        pending = [int(rng.integers(19)) for _ in prompts]
        lengths = jnp.array([len(prompt) for prompt in prompts])
        tree, state = propose(state, jnp.array(pending), lengths)
        for b, prompt in enumerate(prompts):
            assert paths(tree, b) == search((*prompt, pending[b]), shape)
        said = rng.integers(0, 19, (2, shape.depth + 1))
        said[:, 0] = pending
        state = observe(state, rows, jnp.asarray(said, jnp.int32), lengths, jnp.array(commit))
        for b, n in enumerate(commit):
            prompts[b] = [*prompts[b], *said[b, :n].tolist()]
    kept = drafter.truncate(state, jnp.array([20, 20]))
    tree, _ = propose(kept, jnp.array([prompt[20] for prompt in prompts]), jnp.array([20, 20]))
    for b, prompt in enumerate(prompts):
        assert paths(tree, b) == search(tuple(prompt[:21]), shape)


def test_a_self_draft_reads_the_target_s_cache():
    shape = TreeShape(6, 3, 2)
    drafter = SelfDrafter(1, shape)
    ids = np.random.default_rng(1).integers(0, 19, 13).tolist()
    T = len(ids) - 1
    empty = kv.init_cache(2, (1, 2, S, 8), TARGET.dtype)

    @jax.jit
    def run(leaves):
        model = TARGET.merge(leaves)
        zero, causal = jnp.zeros((1,), jnp.int32), jnp.tril(jnp.ones((1, T, T), bool))
        _, new = forward(model, (empty,), jnp.array([ids[:T]]), jnp.arange(T)[None], causal, zero)
        sight = View((), model, (kv.write(empty, new, zero, zero, "cpu"),))
        return drafter.propose(sight, (), jnp.array(ids[T:]), jnp.array([T]))[0]

    tree = run(TARGET.leaves)
    assert paths(tree, 0) == search(tuple(ids), shape, layers=1)


def test_ids_outside_the_target_s_vocabulary_are_not_proposed():
    drafter = DraftModel.of(TARGET, TreeShape(8, 2, 4), vocab_size=6)
    state = drafter.init(kv.Groups.of(1, S))
    propose = jax.jit(functools.partial(drafter.propose, view(drafter)))
    tree, _ = propose(state, jnp.array([3]), jnp.array([0]))
    assert set(np.asarray(tree.tokens)[0].tolist()) <= set(range(6))


def test_a_draft_that_is_no_number_still_gives_a_tree():
    broken = tuple(jnp.full_like(leaf, jnp.nan) for leaf in TARGET.leaves)
    drafter = DraftModel.of(dataclasses.replace(TARGET, leaves=broken), TreeShape(8, 3, 3))
    propose = jax.jit(functools.partial(drafter.propose, view(drafter)))
    tree, _ = propose(drafter.init(kv.Groups.of(1, S)), jnp.array([3]), jnp.array([0]))
    tokens, parents, depths = (np.asarray(x)[0] for x in (tree.tokens, tree.parents, tree.depths))
    assert (depths[1:] == depths[parents[1:]] + 1).all()
    assert ((tokens >= 0) & (tokens < 19)).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 1), (9, 2, 2), (3, 0, 1)])
def test_shapes_that_cannot_be(shape):
    with pytest.raises(ConfigError, match="nodes"):
        TreeShape(*shape)
