"""EAGLE's trees against NumPy's at every step that an engine takes, and its output against plain decoding's.

Where the reference's own choice is closer than `CLOSE`, float32 may choose otherwise: such a tree may differ,
and there may be few. Elsewhere trees are the same, path by path.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eagle_reference import Reference, Text, paths_of, random_tensors, true_features
from scripted_chooser import ScriptedChooser

from specmemo_jax.devices.compiled import compiled_memory
from specmemo_jax.draft import TreeShape, View, eagle
from specmemo_jax.draft.eagle import EagleDrafter
from specmemo_jax.draft.head_config import HeadConfig, default_taps, head_layer
from specmemo_jax.draft.heads import pack_head
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.programs import Programs
from specmemo_jax.engine.request import Request
from specmemo_jax.llama import kv
from specmemo_jax.llama.packing import abstract_target, pack
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.planning.prove import lowerings
from specmemo_jax.serve.params import SamplingParams
from specmemo_jax.serve.requests import device_sampling, pad_bad_words
from specmemo_jax.testing import TINY, tiny_llama

CONFIG = dataclasses.replace(TINY, max_context=1024)
TENSORS = tiny_llama(CONFIG)
TARGET = pack(CONFIG, iter(TENSORS.items()), jnp.dtype("float32"))
CLOSE = 2e-4  # of joint log probabilities
CONTEXT = 600  # the cache grows through 256, 512 and 640 slots
PROMPTS = [np.random.default_rng(i).integers(0, 97, n).tolist() for i, n in enumerate((1, 17, 40, 300, 33))]
TOKENS = (50, 40, 90, 60, 12)
# A layer that is like the target's in nothing but H and V.
LAYER = dataclasses.replace(
    head_layer(CONFIG),
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    ffn_size=40,
    rms_norm_eps=1e-2,
    rope_theta=500.0,
)


@functools.cache
def engine_for(drafter, batch=1, groups=()):
    """One engine for all tests that ask for the same: a closed one keeps its compiled programs."""
    context = groups[-1][1] if groups else CONTEXT
    shapes = Shapes(CONFIG, "float32", "cpu", context, batch, drafter, chunks=(128, 32), groups=groups)
    return Engine(TARGET, lay_out(shapes))


def drive(engine, requests):
    """All requests through an engine, rows moved and refilled as they can be."""
    waiting = list(requests)
    while waiting or any(engine.rows):
        for _ in engine.migrate_rows():
            pass
        for request in list(waiting):
            row = engine.placement.row_for(len(request.ids))
            if row is not None:
                engine.admit(row, request)
                waiting.remove(request)
        engine.burst()
        for row, request in enumerate(engine.rows):
            if request is not None and request.finished:
                engine.release(row)


@functools.cache
def plain(prompt, tokens):
    engine = engine_for(None)
    request = Request(prompt, tokens)
    try:
        drive(engine, [request])
    finally:
        engine.close()
    return request.new_ids


# ---------------------------------------------------------------- heads


@functools.cache
def head(kind, draft_vocab_size=None, own=False, bias=True, seed=0):
    """A random head, fitted to what the target says so that its trees are accepted at every depth: where it
    brings rows of its own, those; else, for EAGLE-1, what it makes of embedding and features.
    """
    config = HeadConfig(kind, LAYER, default_taps(kind, CONFIG), draft_vocab_size, own, fc_bias=bias)
    tensors = random_tensors(config, seed)
    lm_head = TENSORS["embed_tokens.weight" if CONFIG.tied_embeddings else "lm_head.weight"]
    reference = Reference(config, tensors, TENSORS["embed_tokens.weight"], lm_head)
    texts = [[*prompt, *plain(tuple(prompt), 90)] for prompt in PROMPTS]
    features = [true_features(TARGET, config.taps, ids) for ids in texts]
    if kind == "eagle" and bias:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"layers.0.{name}.weight"] *= np.float32(0.1)
        embedded = [TENSORS["embed_tokens.weight"][ids[1:-1]] for ids in texts]
        read = np.concatenate(
            [
                np.concatenate([e, f[:-2], np.ones((len(e), 1))], 1)
                for e, f in zip(embedded, features, strict=True)
            ]
        )
        wanted = np.concatenate([f[1:-1] for f in features])
        fitted = np.linalg.lstsq(read, wanted, rcond=None)[0].T.astype(np.float32)
        tensors["fc.weight"], tensors["fc.bias"] = fitted[:, :-1], fitted[:, -1]
    if own:
        outs, said = [], []
        for ids, of in zip(texts, features, strict=True):
            outs += [reference.scored(out) for out in Text(reference, ids, of).outputs[:-1]]
            said += ids[2:]
        wanted = 12.0 * (np.asarray(said)[:, None] == reference.ids[None])
        tensors["lm_head.weight"] = np.linalg.lstsq(np.stack(outs), wanted, rcond=None)[0].T.astype(
            np.float32
        )
    return reference


@functools.cache
def drafter_of(reference, shape, dtype="float32"):
    return EagleDrafter(
        reference.config, lambda target: pack_head(reference.config, reference.tensors, target), shape, dtype
    )


HEADS = {
    "eagle": ("eagle",),
    "eagle, some tokens": ("eagle", 60),
    "eagle3": ("eagle3", None, True, False),
    "eagle3, some tokens": ("eagle3", 60, True, False),
    "eagle3, some of the target's rows": ("eagle3", 60, False, True),
}
SHAPES = {"chain": TreeShape.of(5), "tree": TreeShape(12, 4, 3)}


def drafter_for(name, shape):
    reference = head(*HEADS[name])
    return reference, drafter_of(reference, SHAPES[shape])


# ---------------------------------------------------------------- every step's tree


class Watched:
    """An engine whose steps are recorded: ``log`` has of each live row and step with a drafted tree the
    request, its pending token and that token's position, the tree's size, and its paths; ``steps`` the size
    of every step's tree.
    """

    def __init__(self, engine: Engine):
        self.engine, self.log, self.steps, self._nodes = engine, [], [], {}

    def __enter__(self):
        self._run = self.engine.runner.run
        self.engine.step_program, self.engine.runner.run = self._step_program, self._watch
        return self

    def __exit__(self, *_):
        del self.engine.step_program, self.engine.runner.run
        self.engine.chooser = None
        self.engine.close()

    def _step_program(self, capacity, sampled=False, nodes=None, record=True):
        step = Engine.step_program(self.engine, capacity, sampled, nodes, record)
        self._nodes[step] = nodes
        return step

    def _watch(self, program, *inputs):
        nodes, state = self._nodes.get(program, 1), self.engine.runner.state
        assert state is not None
        lengths, done = np.array(state.rows.lengths), np.array(state.rows.done)
        tree = self._run(program, *inputs)
        if program in self._nodes:
            self.steps.append(nodes)
        if nodes > 1:
            tokens, parents, depths = map(np.asarray, (tree.tokens, tree.parents, tree.depths))
            for row, request in enumerate(self.engine.rows):
                if request is not None and not done[row]:
                    paths = paths_of(tokens[row], parents[row], depths[row])
                    self.log.append((request, tokens[row, 0], lengths[row], nodes, paths))
        return tree

    def check(self, reference, least):
        """Every tree is the reference's, and there were ``least``; the lengths of the accepted paths."""
        drafter = self.engine.drafter
        assert isinstance(drafter, EagleDrafter)
        assert len(self.log) >= least
        texts, ties = {}, 0
        for request, pending, at, nodes, paths in self.log:
            if request not in texts:
                features = true_features(TARGET, drafter.taps, request.ids)
                texts[request] = Text(reference, request.ids, features)
            assert pending == request.ids[at]
            want, closest, _ = texts[request].tree(at, drafter.limited(nodes).shape)
            ties += paths != want
            assert paths == want or closest < CLOSE, (request.num_prompt, at, nodes, closest)
        assert ties <= 0.02 * len(self.log)
        for request in texts:
            assert request.new_ids == plain(tuple(request.prompt), request.max_tokens)[: len(request.new_ids)]
        return [n for request in texts for n in request.accepted_lengths]


def requests(tokens=TOKENS):
    return [Request(prompt, n) for prompt, n in zip(PROMPTS, tokens, strict=True)]


@pytest.mark.parametrize(
    ("name", "shape"),
    [("eagle", "tree"), ("eagle, some tokens", "chain"), ("eagle3, some of the target's rows", "tree")],
)
def test_trees_of_rows_that_come_and_go_are_the_reference_s(name, shape):
    """Prompts of one token and of three chunks, neighbours that end, rows refilled, a cache that grows."""
    reference, drafter = drafter_for(name, shape)
    with Watched(engine_for(drafter, 3)) as watched:
        drive(watched.engine, requests())
        assert watched.engine.capacity > 256
        lengths = watched.check(reference, 100)
    assert max(lengths) > 1  # or no path of a tree was ever taken


@pytest.mark.parametrize(("name", "shape"), [("eagle", "tree"), ("eagle3, some tokens", "chain")])
def test_trees_after_plain_steps_and_of_other_sizes_are_the_reference_s(name, shape):
    """As the chooser moves them, with as many plain steps between as can wait."""
    reference, drafter = drafter_for(name, shape)
    most, half = drafter.num_nodes, drafter.tree_sizes[0]
    with Watched(engine_for(drafter, 3)) as watched:
        sizes = [most, 1, half, *[1] * 5, most, half]
        watched.engine.chooser = ScriptedChooser(itertools.cycle(sizes), 8)
        drive(watched.engine, requests())
        assert set(watched.steps) == {1, half, most}
        in_a_row = [len(list(same)) for nodes, same in itertools.groupby(watched.steps) if nodes == 1]
        assert max(in_a_row) > drafter.most_waiting
        watched.check(reference, 50)


@pytest.mark.parametrize("name", ["eagle, some tokens", "eagle3"])
def test_trees_of_a_row_that_keeps_a_prefix_are_the_reference_s(name):
    """A chat's turns in a row whose neighbour goes on between them: more of the same, a beginning of it, what
    was said by plain steps and not read by the drafter yet, and nothing of it.
    """
    reference, drafter = drafter_for(name, "tree")
    most = drafter.num_nodes
    with Watched(engine_for(drafter, 3)) as watched:
        engine = watched.engine
        neighbour = Request(PROMPTS[3], 200)
        engine.admit(1, neighbour)
        before = None
        more = np.random.default_rng(5).integers(0, 97, 150).tolist()
        for cut, added, script, between in (
            (0, 40, (most,), (most,)),
            (-1, 3, (most, 1), (1,)),
            (-1, 140, (1,), ()),
            (-3, 2, (1, most, 1), (1,)),
            (60, 5, (1, 1), (most, 1, most)),
            (1, 30, (most,), ()),
            (0, 10, (1, most), ()),
        ):
            prompt = [*(before.ids[:cut] if before else []), *more[:added]]
            request = Request(prompt, 12, reuse=True)
            engine.chooser = ScriptedChooser(itertools.cycle(script), 8)
            engine.admit(0, request)
            if before is not None:
                shared = min(len(before.ids) - 1, len(before.ids[:cut]), len(prompt) - 1)
                assert request.num_prefilled <= len(prompt) - max(0, shared - 1)
            while not request.finished:
                engine.burst()
            before = engine.release(0)
            engine.chooser = ScriptedChooser(between)
            for _ in between:
                engine.burst()
        assert not neighbour.finished
        assert len({request for request, *_ in watched.log}) > 4
        watched.check(reference, 30)


@pytest.mark.parametrize(
    ("name", "groups"),
    [("eagle", ((2, 56), (1, 110), (1, 400))), ("eagle3, some tokens", ((2, 56), (1, 400)))],
    ids=str,
)
def test_trees_of_rows_that_move_or_wait_are_the_reference_s(name, groups):
    """Rows outgrow their groups, drafted or not; of two that do there may be room for one, and the other
    waits while its neighbours go on.
    """
    reference, drafter = drafter_for(name, "tree")
    most = drafter.num_nodes
    with Watched(engine_for(drafter, sum(rows for rows, _ in groups), groups)) as watched:
        engine, paused = watched.engine, set()
        migrate = engine.migrate_rows

        def looked_at():
            yield from migrate()
            paused.update(request for request in engine.rows if request is not None and request.paused)

        engine.migrate_rows = looked_at
        try:
            for script in ((most,), (most, 1)):
                engine.chooser = ScriptedChooser(itertools.cycle(script), 3)
                drive(engine, [*requests((50, 70, 40, 60, 80))])
        finally:
            del engine.migrate_rows
        assert engine.moved_rows
        assert paused or len(groups) > 2
        watched.check(reference, 100)


# ---------------------------------------------------------------- logits


@pytest.mark.parametrize("name", [*HEADS, "eagle without a bias"])
def test_logits_of_every_pass_are_the_reference_s(name, monkeypatch):
    """Two rows, one read in two chunks: the pass over what waited, and each level's best nodes."""
    reference = head(*HEADS.get(name, ("eagle", None, False, False)))
    shape = TreeShape(7, 3, 2)
    drafter = drafter_of(reference, shape)
    weights, model = drafter.weights(TARGET), TARGET.merge(TARGET.leaves)
    texts = [np.random.default_rng(i).integers(0, 97, n).tolist() for i, n in enumerate((20, 41))]
    state = drafter.init(kv.Groups.of(2, 64))
    for row, ids in enumerate(texts):
        features = true_features(TARGET, drafter.taps, ids)
        for start in range(0, len(ids) - 1, 32):
            count = min(32, len(ids) - 1 - start)
            tokens, seen = np.zeros((1, 32), np.int32), np.full((1, 32, features.shape[1]), 7, np.float32)
            tokens[0, :count], seen[0, :count] = ids[start:][:count], features[start:][:count]
            view = View(weights, model, (), 0, jnp.asarray(seen))
            at = (jnp.asarray(x) for x in ([row], tokens, [start], [count]))
            state = drafter.observe(view, state, *at)
    grow, scored = eagle.grow_tree, []

    def listening(passes, *rest):
        def score(out):
            scored.append(np.asarray(passes.score(out)))
            return passes.score(out)

        return grow(dataclasses.replace(passes, score=score), *rest)

    monkeypatch.setattr(eagle, "grow_tree", listening)
    pending, lengths = ([ids[-1] for ids in texts], [len(ids) - 1 for ids in texts])
    drafter.propose(View(weights, model, ()), state, jnp.asarray(pending), jnp.asarray(lengths))
    assert len(scored) == shape.depth
    for row, ids in enumerate(texts):
        text = Text(reference, ids, true_features(TARGET, drafter.taps, ids))
        _, closest, passes = text.tree(len(ids) - 1, shape)
        assert closest > CLOSE
        for mine, theirs in zip(scored, passes, strict=True):
            np.testing.assert_allclose(mine[row], theirs, atol=1e-4)


# ---------------------------------------------------------------- output


SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.1)
GRID = [  # greedy output is compared in the tests above, too
    ("eagle", TreeShape(4, 2, 2), 1),
    ("eagle3, some tokens", TreeShape.of(4), 1),
    ("eagle, some tokens", TreeShape.of(9), 4),
    ("eagle3", TreeShape(64, 6, 8), 4),
]


def answers(drafter, batch, sampled, groups=()):
    engine, asked = engine_for(drafter, batch, groups), []
    for i, (prompt, tokens) in enumerate(zip(PROMPTS, (30, 40, 30, 40, 12), strict=True)):
        sampling = device_sampling(SAMPLED, prompt, i, pad_bad_words(())) if sampled else None
        asked.append(Request(prompt, tokens, sampling=sampling))
    try:
        drive(engine, asked)
    finally:
        engine.close()
    return [request.new_ids for request in asked]


@functools.cache
def plain_answers(sampled):
    return answers(None, 1, sampled)


@pytest.mark.parametrize(
    ("name", "shape", "batch", "sampled"),
    [*((*each, True) for each in GRID), *((*each, False) for each in (GRID[0], GRID[-1]))],
    ids=str,
)
def test_output_is_plain_decoding_s(name, shape, batch, sampled):
    assert answers(drafter_of(head(*HEADS[name]), shape), batch, sampled) == plain_answers(sampled)


def test_output_of_sampled_rows_in_groups_is_plain_decoding_s():
    drafter = drafter_for("eagle", "tree")[1]
    assert answers(drafter, 4, True, ((2, 56), (1, 110), (1, 400))) == plain_answers(True)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("groups", [(), ((2, 56), (1, 110), (1, 400))], ids=["one width", "groups"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", HEADS)
def test_buffers_are_those_of_state_and_weights_to_the_byte(name, dtype, groups):
    kind, *rest = HEADS[name]
    reference, target = head(kind, *rest), pack(CONFIG, iter(TENSORS.items()), jnp.dtype(dtype))
    drafter = drafter_of(reference, SHAPES["tree"], dtype)
    shapes = Shapes(CONFIG, dtype, "cpu", 400, 4, drafter, groups=groups)
    widths = shapes.groups_at(shapes.capacities[-1])
    weights = drafter.weights(target)
    assert [(x.shape, x.dtype) for x in weights] == [
        (x.shape, x.dtype) for x in drafter.weight_shapes(target)
    ]
    own = sum(leaf.nbytes for leaf in jax.tree.leaves((weights, drafter.init(widths))))
    assert sum(buffer.bytes for buffer in drafter.buffers(widths)) == own


@pytest.mark.parametrize(
    ("name", "shape", "batch", "dtype"),
    [
        ("eagle", "tree", 3, "float32"),
        ("eagle3, some tokens", "tree", 1, "bfloat16"),
        ("eagle3", "chain", 3, "bfloat16"),
    ],
)
def test_every_program_is_within_its_price(name, shape, batch, dtype):
    """Its own, not the largest's: what it needs beside the state, which is aliased as a whole."""
    drafter = drafter_of(head(*HEADS[name]), SHAPES[shape], dtype)
    plan = lay_out(Shapes(CONFIG, dtype, "cpu", 400, batch, drafter, chunks=(128,)))
    programs = Programs(abstract_target(CONFIG, jnp.dtype(dtype), "cpu"), plan.shapes)
    state = jax.tree.leaves(programs.abstract_state(plan.shapes.capacities[-1]))
    priced = {program.name: program.bytes for program in plan.footprint.programs}
    compiled = {name: lower for name, lower in lowerings(programs) if "greedy" not in name}
    assert {"settle", "prefill 128, sampled", f"step {drafter.num_nodes}, sampled"} <= compiled.keys()
    for what, lower in compiled.items():
        figures = compiled_memory(programs.compile(lower()))
        assert figures.aliased >= sum(leaf.size * leaf.dtype.itemsize for leaf in state)
        assert figures.extra <= priced.get(what.removesuffix(", sampled"), min(priced.values())), what
