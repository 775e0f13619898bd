"""The engine's programs, lowered from shapes alone: for the device at hand, a mesh, or a described GPU."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from specmemo_jax.decode.emitted import init_emitted
from specmemo_jax.decode.rows import MAX_STOP_IDS, Settings, init_rows
from specmemo_jax.decode.sampling import greedy_sampling
from specmemo_jax.decode.score import score_chunk
from specmemo_jax.decode.step import (
    Chunking,
    EngineState,
    catch_up,
    end,
    move,
    prefill_chunk,
    restore,
    settle,
    speculative_step,
    taps_of,
)
from specmemo_jax.devices.allocator import is_out_of_memory
from specmemo_jax.devices.compiler import compiler_options
from specmemo_jax.draft.protocol import Drafter
from specmemo_jax.llama import kv
from specmemo_jax.llama.packing import Target, packed_axes
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.mesh.axes import placed, sharding

STATE = 2  # the donated argument of every program: f(leaves, draft_weights, state, ...)


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """What to lower: a ``target`` (shapes will do: `abstract_target`), at the ``shapes`` of a plan.

    ``mesh``: devices to lower for, the target split over them and the drafter whole on each; None
    is the default device. Every program takes ``(leaves, draft_weights, state, ...)`` and donates
    the state.
    """

    target: Target
    shapes: Shapes
    mesh: Mesh | None = None

    @property
    def drafter(self) -> Drafter | None:
        """None for plain decoding."""
        return self.shapes.drafter

    def empty_state(self, capacity: int) -> EngineState:
        """A new device state at ``capacity`` slots a row, fewer where its group has fewer: no row in it, the
        cache zeroed.
        """
        config, groups = self.target.config, self.shapes.groups_at(capacity)
        heads, D = config.num_kv_heads, config.head_dim
        slots_last = kv.keys_slots_last(self._kv_dtype, self.target.platform)
        return EngineState(
            caches=kv.init_caches(config.num_layers, groups, heads, D, self._kv_dtype, slots_last),
            rows=init_rows(groups.rows, config.vocab_size),
            draft=() if self.drafter is None else self.drafter.init(groups),
            emitted=init_emitted(groups.rows, self.shapes.trees.max_depth),
        )

    def abstract_state(self, capacity: int) -> EngineState:
        """Shapes and dtypes of the device state at ``capacity`` slots, without allocating."""
        return jax.eval_shape(lambda: self.empty_state(capacity))

    def step(
        self, capacity: int, sampled: bool = False, nodes: int | None = None, record: bool = False
    ) -> jax.stages.Lowered:
        """The speculative step: ``-> state, None``. ``nodes``: the tree's size, 1 for plain decoding while
        the drafter sleeps; ``record`` returns the proposed tree.
        """
        drafter = self._limited(nodes)
        observer = self.drafter if drafter is None and taps_of(self.drafter) else drafter
        static = self.target, drafter, observer, self._layout, sampled, record
        return self._lower(speculative_step, capacity, *static)

    def prefill(
        self, capacity: int, width: int, sampled: bool = False, group: int = -1
    ) -> jax.stages.Lowered:
        """Prefill of ``width`` tokens of a row of ``group``, the last (widest) unless said otherwise:
        ``f(..., tokens, start, count, row, settings) -> state, first``.
        """
        inputs = (*_chunk(width), self._settings())
        static = self.target, self.drafter, self._layout, sampled, self._group(group)
        return self._lower(prefill_chunk, capacity, *static, inputs=inputs)

    def catch_up(self, capacity: int, width: int, group: int = -1) -> jax.stages.Lowered:
        """Telling a drafter that slept: ``f(..., tokens, start, count, row) -> state, None``."""
        static = self.target, self.drafter, self._group(group)
        return self._lower(catch_up, capacity, *static, inputs=_chunk(width))

    def settle(self, capacity: int) -> jax.stages.Lowered:
        """Letting a drafter with taps read what plain steps left: ``f(...) -> state, None``."""
        return self._lower(settle, capacity, self.target, self.drafter)

    def score(self, capacity: int, width: int) -> jax.stages.Lowered:
        """Scoring ``width`` tokens of a row of the last group:
        ``f(..., tokens, following, start, row) -> state, (log probability, likeliest)``.
        """
        tokens = jax.ShapeDtypeStruct((1, width), jnp.int32)
        static = self.target, self.shapes.score_nodes, self._group(-1)
        return self._lower(score_chunk, capacity, *static, inputs=(tokens, tokens, _scalar(), _scalar()))

    def move(self, capacity: int, source: int, target: int) -> jax.stages.Lowered:
        """Moving a row between two groups: ``f(..., row, to) -> state, None``."""
        static = self.drafter, self.target.platform, source, target
        return self._lower(move, capacity, *static, inputs=(_scalar(), _scalar()))

    def _group(self, group: int) -> int:
        return range(len(self.shapes.groups_at(0).sizes))[group]

    def restore(self, capacity: int) -> jax.stages.Lowered:
        """Setting a row: ``f(..., row, length, pending, settings, seen, recent) -> state, None``."""
        history = self.abstract_state(1).rows.history
        of_a_row = (jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (history.seen, history.recent))
        inputs = (_scalar(), _scalar(), _scalar(), self._settings(), *of_a_row)
        return self._lower(restore, capacity, inputs=inputs)

    def end(self, capacity: int) -> jax.stages.Lowered:
        """Letting a row emit nothing more: ``f(..., row) -> state, None``."""
        return self._lower(end, capacity, inputs=(_scalar(),))

    def empty(self, capacity: int) -> jax.stages.Lowered:
        """`empty_state` as a program without arguments: ``f() -> state``."""
        shardings = None
        if self.mesh is not None:
            shardings = state_shardings(self.mesh, self.abstract_state(capacity))
        return jax.jit(lambda: self.empty_state(capacity), out_shardings=shardings).lower()

    @property
    def _kv_dtype(self) -> jnp.dtype:
        """The plan's, where it is not the weights' own (which another may stand in for, to be compiled)."""
        return self.target.dtype if self.shapes.kv_dtype is None else jnp.dtype(self.shapes.kv_dtype)

    @property
    def _layout(self) -> Chunking:
        shapes = self.shapes
        whole = shapes.policy == "unbounded"
        return Chunking(shapes.score_nodes, shapes.logit_nodes, whole, shapes.whole_prompts)

    def _limited(self, nodes: int | None) -> Drafter | None:
        if nodes == 1 or self.drafter is None:
            return None
        return self.drafter if nodes is None else self.drafter.limited(nodes)

    def _settings(self) -> Settings:
        sampling = jax.eval_shape(lambda: greedy_sampling(1))
        stop_ids = jax.ShapeDtypeStruct((MAX_STOP_IDS,), jnp.int32)
        of_a_row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), sampling)
        return Settings(_scalar(), stop_ids, of_a_row)

    def _lower(
        self, function: Callable, capacity: int, *static: Any, inputs: tuple[Any, ...] = ()
    ) -> jax.stages.Lowered:
        weights: Any = () if self.drafter is None else self.drafter.weight_shapes(self.target)
        leaves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.target.leaves)
        state = self.abstract_state(capacity)
        outputs = None
        if self.mesh is not None:
            mesh, whole = self.mesh, sharding(self.mesh)
            axes = packed_axes(self.target.config, mesh.size)
            leaves = placed(leaves, tuple(sharding(mesh, names) for names in axes))
            states = state_shardings(mesh, state)
            state, weights, inputs = placed(state, states), placed(weights, whole), placed(inputs, whole)
            outputs = (states, whole)
        jitted = jax.jit(functools.partial(function, *static), donate_argnums=(STATE,), out_shardings=outputs)
        return jitted.lower(leaves, weights, state, *inputs)

    def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """With the platform's compiler options; untuned where a GPU has no memory left to try kernels in."""
        platform = self.target.platform
        try:
            return lowered.compile(compiler_options(platform))
        except jax.errors.JaxRuntimeError as error:
            if platform == "cpu" or not is_out_of_memory(error):
                raise
            return lowered.compile(compiler_options(platform, tuned=False))


def tuning_bytes(target: Target) -> int:
    """Memory to try a GPU's kernels in: about twice the largest matrix, and some for their results."""
    return 2 * max(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in target.leaves) + 2**27


def state_shardings(mesh: Mesh, state: EngineState) -> EngineState:
    """Where each leaf of ``state`` lies on a ``mesh``: the cache is split by KV heads, the tokens seen by
    vocabulary as the logits are; the rest, the drafter's included, is whole on every device.
    """
    whole = jax.tree.map(lambda _: sharding(mesh), state)
    seen = sharding(mesh, ("batch", "vocab"))
    history = dataclasses.replace(whole.rows.history, seen=seen)
    return EngineState(
        caches=jax.tree.map(lambda _: sharding(mesh, kv.KV_AXES), state.caches),
        rows=dataclasses.replace(whole.rows, history=history),
        draft=whole.draft,
        emitted=whole.emitted,
    )


def _scalar() -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), jnp.int32)


def _chunk(width: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return jax.ShapeDtypeStruct((1, width), jnp.int32), _scalar(), _scalar(), _scalar()
