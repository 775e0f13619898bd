"""The training loop: on the device from the rows to the weights, and resumable at any step.

A batch is a function of the seed and the step alone, so that a run that was killed goes on with what it would
have seen. With a limit of steps the learning rate is one, too: the final weights are those of a run that was
never killed, bit by bit. With a limit of minutes it follows the clock.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from specmemo_jax.draft.head_config import HeadConfig
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.train.checkpoints import Checkpoints
from specmemo_jax.train.loss import Objective, Outcome, Rows, Vocabulary, read_target, total_loss
from specmemo_jax.train.target import TargetWeights

LEAST_RATE = 0.1  # of the learning rate, at the end


@dataclasses.dataclass(frozen=True)
class Schedule:
    """``rate``: the highest learning rate, after ``warmup`` (a share of the run). ``steps``, ``minutes``:
    what ends it, whichever comes first. ``batch``: rows a step. ``burst``: steps that run without the host.
    ``save_every``, ``report_every``: seconds.
    """

    rate: float = 1e-3
    steps: int | None = None
    minutes: float | None = None
    batch: int = 8
    burst: int = 1
    warmup: float = 0.03
    weight_decay: float = 0.01
    clip: float = 0.5
    seed: int = 0
    save_every: float = 60.0
    report_every: float = 30.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """``params``: float32 masters; ``moments``: the optimizer's; ``step``: steps done."""

    params: dict[str, Array]
    moments: Any
    step: Array


@dataclasses.dataclass(frozen=True)
class Report:
    """Where a run is. ``losses``: of each depth, in training since the last report. ``acceptance``: of
    held-out chains from every position, by depth, given all former tokens right; empty where nothing is held
    out. ``accepted_length``: tokens that a step of decoding brings on those answers with a greedy chain, the
    bonus token counted.
    """

    step: int
    seconds: float
    tokens: int
    tokens_per_second: float
    losses: tuple[float, ...]
    acceptance: tuple[float, ...]
    accepted_length: float = 1.0

    def __str__(self) -> str:
        losses = " ".join(f"{x:.2f}" for x in self.losses)
        shares = "/".join(f"{x:.2f}".lstrip("0") for x in self.acceptance)
        held = f", held-out acceptance {shares}, length {self.accepted_length:.2f}" if shares else ""
        return f"step {self.step}, {self.tokens_per_second:,.0f} tok/s, loss {losses}{held}"


class Trainer:
    """One head in training: a frozen target, rows on the device, and the two programs.

    ``train``, ``held``: rows as `specmemo_jax.train.data.PackedRows` has them.
    """

    def __init__(
        self,
        target: LlamaConfig,
        weights: TargetWeights,
        head: HeadConfig,
        objective: Objective,
        schedule: Schedule,
        vocabulary: Vocabulary,
        train: Rows,
        held: Rows,
    ):
        self.head, self.objective, self.schedule = head, objective, schedule
        self.fixed = (weights, vocabulary, train)
        self.held = held
        self.num_rows, self.length = train.tokens.shape
        self.batch = min(schedule.batch, self.num_rows)
        self.optimizer = _optimizer(schedule)
        self._look = partial(_look, target, head, objective)
        self._run = jax.jit(self._steps, donate_argnums=0)
        self._judge = jax.jit(self._look)

    def fresh(self, params: dict[str, np.ndarray]) -> State:
        """The state before the first step."""
        masters = {name: jnp.asarray(array, jnp.float32) for name, array in params.items()}
        return State(masters, self.optimizer.init(masters), jnp.zeros((), jnp.int32))

    def _steps(self, state: State, fixed: Any, count: Array, share: Array) -> tuple[State, Array]:
        """``count`` steps, and their losses' sum by depth. ``share``: of the time, gone."""
        weights, vocabulary, train = fixed

        def one(_: Array, carried: tuple[State, Array]) -> tuple[State, Array]:
            state, sums = carried
            rows = self._batch(train, state.step)

            def loss(params: dict[str, Array]) -> tuple[Array, Outcome]:
                return self._look(params, weights, vocabulary, rows)

            gradient, outcome = jax.grad(loss, has_aux=True)(state.params)
            with jax.numpy_dtype_promotion("standard"):  # optax raises floats to whole numbers
                updates, moments = self.optimizer.update(gradient, state.moments, state.params)
            rate = self._rate(state.step, share)
            params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
            return State(params, moments, state.step + jnp.int32(1)), sums + outcome.losses

        depths = self.head.num_heads or self.objective.steps
        return jax.lax.fori_loop(0, count, one, (state, jnp.zeros((depths,), jnp.float32)))

    def _batch(self, train: Rows, step: Array) -> Rows:
        """The rows of a step: each epoch in an order of its own."""
        in_epoch = jnp.int32(self.num_rows // self.batch)
        epoch, place = step // in_epoch, step % in_epoch
        key = jax.random.fold_in(jax.random.key(self.schedule.seed), epoch)
        order = jax.random.permutation(key, self.num_rows)
        chosen = jax.lax.dynamic_slice(order, (place * jnp.int32(self.batch),), (self.batch,))
        return jax.tree.map(lambda x: x[chosen], train)

    def _rate(self, step: Array, share: Array) -> Array:
        s = self.schedule
        if s.steps is not None:
            share = jnp.maximum(share, step.astype(jnp.float32) / s.steps)
        fall = LEAST_RATE + (1 - LEAST_RATE) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(share, 1.0)))
        if s.steps is not None:
            share = jnp.maximum(share, (step.astype(jnp.float32) + 1) / s.steps)
        return s.rate * fall * jnp.minimum(1.0, jnp.maximum(share, 1e-3) / s.warmup)

    def run(
        self,
        state: State,
        checkpoints: Checkpoints | None = None,
        report: Callable[[Report, State], object] = lambda report, state: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> tuple[State, Report]:
        """Train from ``state``, or from the last of ``checkpoints``, to the end. The time that compiling
        takes is not counted.
        """
        s, gone = self.schedule, 0.0
        if checkpoints is not None:
            state, gone = checkpoints.restore(state)
        step = first = int(state.step)
        per_step, sums, since = self.batch * self.length, None, 0

        def reported() -> Report:
            spent = max(clock() - reported_at, 1e-9)
            acceptance, length = self.judge(state.params)
            losses = () if sums is None else tuple(float(x) / since for x in np.asarray(sums))
            found = Report(
                step=step,
                seconds=clock() - began,
                tokens=step * per_step,
                tokens_per_second=since * per_step / spent,
                losses=losses,
                acceptance=acceptance,
                accepted_length=length,
            )
            report(found, state)
            return found

        began, reported_at = clock() - gone, clock()
        if not self._is_over(step, gone):
            reported()
        began, reported_at, saved_at = clock() - gone, clock(), clock()
        while not self._is_over(step, clock() - began):
            count = s.burst if s.steps is None else min(s.burst, s.steps - step)
            share = 0.0 if s.minutes is None else min((clock() - began) / (60 * s.minutes), 1.0)
            state, added = self._run(state, self.fixed, jnp.int32(count), jnp.float32(share))
            jax.block_until_ready(added)
            step += count
            if step == first + count:  # compiling is no training
                began, reported_at = clock() - gone, clock()
                continue
            sums, since = added if sums is None else sums + added, since + count
            if self._is_over(step, clock() - began):
                break
            if clock() - reported_at >= s.report_every:
                reported()
                sums, since, reported_at = None, 0, clock()
            if checkpoints is not None and clock() - saved_at >= s.save_every:
                checkpoints.save(step, state, clock() - began)
                saved_at = clock()
        last = reported()
        if checkpoints is not None:
            checkpoints.save(step, state, last.seconds)
            checkpoints.close()
        return state, last

    def _is_over(self, step: int, seconds: float) -> bool:
        s = self.schedule
        return (s.steps is not None and step >= s.steps) or (
            s.minutes is not None and seconds >= 60 * s.minutes
        )

    def judge(self, params: dict[str, Array]) -> tuple[tuple[float, ...], float]:
        """`Report.acceptance` and `Report.accepted_length` of held-out answers."""
        weights, vocabulary, _ = self.fixed
        total, walks, size = None, np.zeros(2, np.int64), min(self.batch, self.held.tokens.shape[0])
        for begin in range(0, self.held.tokens.shape[0] - size + 1, max(size, 1)) if size else ():
            rows = jax.tree.map(lambda x, at=begin: x[at : at + size], self.held)
            found = self._judge(params, weights, vocabulary, rows)[1]
            counts = np.stack([np.asarray(found.right), np.asarray(found.tried)])
            total = counts if total is None else total + counts
            walks += np.array([int(found.walks), int(found.walked)])
        if total is None:
            return (), 1.0
        return tuple(float(r) / max(int(t), 1) for r, t in total.T), float(walks[1] / max(walks[0], 1))


def _look(
    target: LlamaConfig,
    head: HeadConfig,
    objective: Objective,
    params: dict[str, Array],
    weights: TargetWeights,
    vocabulary: Vocabulary,
    rows: Rows,
) -> tuple[Array, Outcome]:
    reading = jax.lax.stop_gradient(read_target(target, weights, vocabulary, head.taps, rows))
    return total_loss(head, objective, params, weights.head[vocabulary.ids], reading, rows)


def _optimizer(schedule: Schedule) -> optax.GradientTransformation:
    """AdamW without its rate, which the loop multiplies in."""

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(schedule.clip),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(schedule.weight_decay, matrices),
    )
