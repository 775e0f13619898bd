import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmemo_jax.checkpoints.open import open_model
from specmemo_jax.draft.head_config import HeadKind
from specmemo_jax.testing import TINY, tiny_llama
from specmemo_jax.train import start
from specmemo_jax.train.checkpoints import Checkpoints
from specmemo_jax.train.loop import Report, Schedule, Trainer
from specmemo_jax.train.loss import Objective, Rows, Vocabulary
from specmemo_jax.train.target import load_target

F32 = jnp.dtype("float32")
WEIGHTS = load_target(open_model(TINY, tiny_llama()), F32)
SCHEDULE = Schedule(rate=3e-3, steps=12, batch=4, burst=2, report_every=1e9, save_every=1e9)


def rows(count: int, seed: int) -> Rows:
    tokens = np.random.default_rng(seed).integers(0, 8, (count, 24)).astype(np.int32)
    segments = np.ones((count, 24), np.int32)
    segments[:, 14:] = 2
    answers = np.ones((count, 24), bool)
    answers[:, [0, 1, 14, 15]] = False
    return Rows(jnp.asarray(tokens), jnp.asarray(segments), jnp.asarray(answers))


def trainer(kind: HeadKind = "eagle3", draft_vocab: int | None = 40, depth: int = 3, **changes):
    head = start.head_config(kind, TINY, draft_vocab=draft_vocab, heads=depth)
    ids = start.draft_ids(np.arange(TINY.vocab_size), head.draft_vocab_size, TINY.vocab_size, (0,))
    places = np.full(TINY.vocab_size, -1, np.int32)
    places[ids] = np.arange(len(ids))
    made = Trainer(
        TINY,
        WEIGHTS,
        head,
        Objective(depth, "kl", F32, *((0.1, 1.0) if kind == "eagle" else (0.0, 1.0))),
        dataclasses.replace(SCHEDULE, **changes),
        Vocabulary(jnp.asarray(ids), jnp.asarray(places)),
        rows(11, 0),
        rows(4, 1),
    )
    return made, made.fresh(start.start_params(head, TINY, WEIGHTS, ids, 0))


def weights_of(state) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("kind", ["eagle3", "eagle", "medusa"])
def test_training_lowers_the_loss(kind):
    made, state = trainer(kind, depth=2, burst=4, report_every=0)
    reports: list[Report] = []
    made.run(state, report=lambda report, _: reports.append(report))
    seen = [report.losses for report in reports if report.losses]
    assert reports[-1].step == 12
    assert sum(seen[-1]) < sum(seen[0])
    assert len(reports[-1].acceptance) == 2


def test_a_head_shares_the_targets_rows_over_the_whole_vocabulary():
    made, state = trainer("eagle", None, depth=1, burst=12)
    _, report = made.run(state)
    assert np.isfinite(report.acceptance).all()


def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path):
    made, state = trainer()
    whole, _ = made.run(state)

    made, state = trainer(save_every=0.0, report_every=0.0)

    def stop(report, _):
        if report.step >= 6:
            raise StoppedError

    first = Checkpoints(tmp_path / "run")
    with pytest.raises(StoppedError):
        made.run(state, first, stop)
    first.close()
    made, state = trainer(burst=5)
    again, report = made.run(state, Checkpoints(tmp_path / "run"))
    assert report.step == 12
    for a, b in zip(weights_of(whole), weights_of(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_epoch_has_each_row_once_in_an_order_of_its_own():
    made, _ = trainer()
    numbered = Rows(*(jnp.arange(11, dtype=jnp.int32)[:, None],) * 3)
    seen = [made._batch(numbered, jnp.int32(step)).tokens[:, 0].tolist() for step in range(4)]
    assert len({*seen[0], *seen[1]}) == len({*seen[2], *seen[3]}) == 8
    assert seen[:2] != seen[2:]


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    made, _ = trainer(steps=100, warmup=0.1, rate=1.0)
    rates = [float(made._rate(jnp.int32(step), jnp.float32(0))) for step in (0, 9, 50, 99)]
    np.testing.assert_allclose(rates, [0.1, 0.982, 0.55, 0.1], atol=2e-3)
    made, _ = trainer(steps=None, minutes=1.0, warmup=0.1, rate=1.0)
    assert float(made._rate(jnp.int32(7), jnp.float32(0.5))) == pytest.approx(0.55)
