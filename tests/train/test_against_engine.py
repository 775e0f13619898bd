"""The trainer's unrolled head and the engine's drafter are written apart; they must say the same."""

import jax.numpy as jnp
import numpy as np
import pytest

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.checkpoints.open import open_model
from specmemo_jax.draft import TreeShape
from specmemo_jax.draft.eagle import EagleDrafter
from specmemo_jax.draft.head_config import HeadKind
from specmemo_jax.draft.heads import pack_head
from specmemo_jax.draft.medusa import MedusaDrafter
from specmemo_jax.testing import TINY, tiny_llama
from specmemo_jax.train import start
from specmemo_jax.train.loop import Schedule, Trainer
from specmemo_jax.train.loss import Objective, Rows, Vocabulary, walk
from specmemo_jax.train.target import load_target

F32, DEPTH, NEW = jnp.dtype("float32"), 3, 40
PARAMS = tiny_llama()
PROMPTS = [[int(x) for x in np.random.default_rng(i).integers(1, 97, 6)] for i in range(8)]
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)


def answered(drafter=None) -> list:
    with LLM(TINY, PARAMS, drafter=drafter, max_batch=4, max_context=64, adaptive=False) as llm:
        return llm.generate(PROMPTS, GREEDY)


def rows_of(outputs) -> Rows:
    tokens = np.asarray(
        [[*prompt, *o.outputs[0].token_ids] for prompt, o in zip(PROMPTS, outputs, strict=True)]
    )
    answers = np.arange(tokens.shape[1])[None, :] >= len(PROMPTS[0])
    answers = np.broadcast_to(answers, tokens.shape)
    return Rows(jnp.asarray(tokens, jnp.int32), jnp.ones(tokens.shape, jnp.int32), jnp.asarray(answers))


@pytest.mark.parametrize("kind", ["eagle3", "eagle", "medusa"])
def test_steps_of_the_engine_are_those_that_the_trainer_foretells(kind: HeadKind):
    rows, weights = rows_of(answered()), load_target(open_model(TINY, PARAMS), F32)
    head = start.head_config(kind, TINY, draft_vocab=None, heads=DEPTH)
    ids = np.arange(TINY.vocab_size, dtype=np.int32)
    schedule = Schedule(rate=1e-2, steps=60, batch=8, burst=20, report_every=1e9, save_every=1e9)
    vocabulary = Vocabulary(jnp.asarray(ids), jnp.asarray(ids))
    trainer = Trainer(TINY, weights, head, Objective(DEPTH, "kl", F32), schedule, vocabulary, rows, rows)
    state, report = trainer.run(trainer.fresh(start.start_params(head, TINY, weights, ids, 0)))
    tensors = {name: np.asarray(state.params[name]) for name in head.tensor_shapes()}

    def load(target):
        return pack_head(head, tensors, target)

    if kind == "medusa":
        chain = tuple((0.9 - 0.1 * depth, 0.0) for depth in range(DEPTH))
        drafter = MedusaDrafter(head, load, DEPTH + 1, "float32", chances=chain)
    else:
        drafter = EagleDrafter(head, load, TreeShape.of(DEPTH + 1), "float32")
    drafted = answered(drafter)
    steps = sum(output.metrics.steps for output in drafted)
    assert report.accepted_length > 1.3
    walks = int(trainer._judge(state.params, weights, vocabulary, rows)[1].walks)
    assert walks == steps


def test_walk_goes_on_after_what_was_accepted_and_begins_anew_where_nothing_starts():
    starts = np.array([[1, 1, 1, 1, 0, 1, 1, 1]], bool)
    accepted = np.array([[2, 9, 9, 1, 7, 0, 0, 0]], np.int32)
    steps, tokens = walk(jnp.asarray(starts), jnp.asarray(accepted))
    assert (int(steps), int(tokens)) == (5, 3 + 2 + 1 + 1 + 1)


def test_walk_of_nothing_accepted_is_plain_decoding():
    starts = jnp.ones((2, 5), bool)
    steps, tokens = walk(starts, jnp.zeros((2, 5), jnp.int32))
    assert (int(steps), int(tokens)) == (10, 10)
