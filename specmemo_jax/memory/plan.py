"""MemoryPlan: every static shape of the engine and the bytes of every persistent buffer.

Today's plan is computed simply: persistent buffers exactly, temporaries by a coarse
bound. Nothing in the engine chooses a shape by itself.
"""

import dataclasses
import math
from collections.abc import Iterable

import jax.numpy as jnp

from specmemo_jax.errors import CapacityError, ConfigError
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.memory.buffers import Buffer, DraftCost

MAX_STOP_IDS = 8
MAX_BAD_WORDS = (16, 8)  # token sequences a row, and tokens of the longest
PREFILL_CHUNKS = (128, 32)
FIRST_CAPACITY = 256


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Frozen shapes and bytes of one engine: B ``batch`` rows of at most ``context`` tokens.

    ``capacities``: the cache slots S a row can have; on CPU the cache grows through
    them, elsewhere there is one. ``chunks``: prefill widths C, largest first.
    ``tree_nodes``: T, 1 without a drafter. ``buffers`` hold at the largest capacity.
    """

    config: LlamaConfig
    dtype: str
    platform: str
    batch: int
    context: int
    capacities: tuple[int, ...]
    chunks: tuple[int, ...]
    tree_nodes: int
    max_depth: int
    max_stop_ids: int
    max_bad_words: tuple[int, int]
    buffers: tuple[Buffer, ...]
    temporary_bytes: int

    @property
    def weights_bytes(self) -> int:
        """The target's weights, as packed."""
        return sum(b.bytes for b in self.buffers if b.name == "target weights")

    @property
    def peak_bytes(self) -> int:
        """Persistent buffers plus the bound on temporaries."""
        return sum(b.bytes for b in self.buffers) + self.temporary_bytes

    @property
    def generation_bytes(self) -> int:
        """`peak_bytes` without the target's weights."""
        return self.peak_bytes - self.weights_bytes

    def capacity_for(self, slots: int) -> int:
        """The smallest capacity with at least ``slots`` slots a row."""
        for capacity in self.capacities:
            if capacity >= slots:
                return capacity
        raise CapacityError(f"a row needs {slots} cache slots, the plan has {self.capacities[-1]}")

    @property
    def slack(self) -> int:
        """Slots a step may touch beyond a row's length."""
        return self.max_depth + 1

    def table(self) -> str:
        """The buffers and totals, one a line, for a terminal."""
        rows = [(b.name, "x".join(map(str, b.shape)), b.dtype, b.bytes) for b in self.buffers]
        rows.append(("temporaries (bound)", "", "", self.temporary_bytes))
        rows.append(("peak", "", "", self.peak_bytes))
        rows.append(("generation memory", "", "", self.generation_bytes))
        return "\n".join(f"{n:<22}{s:>22} {d:>9} {b / 2**20:>10.2f} MiB" for n, s, d, b in rows)


def make_plan(
    config: LlamaConfig,
    *,
    dtype: jnp.dtype,
    platform: str,
    batch: int = 1,
    context: int | None = None,
    drafter: DraftCost | None = None,
    budget: int | None = None,
) -> MemoryPlan:
    """Shapes for ``batch`` rows of ``context`` tokens (default: the model's own maximum).

    ``budget`` bounds ``peak_bytes``; a context that was asked for is never reduced, an
    open one is halved until the plan fits. Raises CapacityError with the figures.
    """
    if batch < 1:
        raise ConfigError(f"max_batch must be at least 1, found {batch}")
    if context is not None and context < 1:
        raise ConfigError(f"max_context must be at least 1, found {context}")
    if context is not None and context > config.max_context:
        why = (
            " (beyond it 'dynamic' rope scaling changes with the length, which a tree's nodes do not share)"
            if config.rope_scaling.kind == "dynamic"
            else ""
        )
        raise CapacityError(f"max_context {context} exceeds the model's {config.max_context}{why}")
    tries = [context] if context is not None else _halvings(config.max_context)
    plans = []
    for tokens in tries:
        plans.append(_plan(config, jnp.dtype(dtype), platform, batch, tokens, drafter))
        if budget is None or plans[-1].peak_bytes <= budget:
            return plans[-1]
    least = plans[-1]
    assert budget is not None
    raise CapacityError(
        f"memory_budget {budget / 2**20:.0f} MiB is too small: "
        f"weights {least.weights_bytes / 2**20:.0f} MiB + "
        f"generation {least.generation_bytes / 2**20:.0f} MiB at context {least.context}, batch {batch}; "
        f"{math.ceil(least.peak_bytes / 2**20)} MiB would work"
    )


def _halvings(context: int) -> Iterable[int]:
    while context >= FIRST_CAPACITY:
        yield context
        context //= 2
    if context:
        yield context


def _plan(
    config: LlamaConfig, dtype: jnp.dtype, platform: str, batch: int, context: int, drafter: DraftCost | None
) -> MemoryPlan:
    nodes = 1 if drafter is None else drafter.num_nodes
    depth = 0 if drafter is None else drafter.max_depth
    largest = -(-(context + depth + 1) // 64) * 64
    capacities = [largest]
    if platform == "cpu":
        capacities = [FIRST_CAPACITY * 2**i for i in range(32) if FIRST_CAPACITY * 2**i < largest] + [largest]
    chunks = tuple(c for c in PREFILL_CHUNKS if c <= capacities[0])
    kv_shape = (batch, config.num_kv_heads, largest, config.head_dim)
    item = dtype.itemsize
    buffers = [
        Buffer("target weights", (config.num_params,), dtype.name, config.num_params * item),
        Buffer(
            "target KV",
            (config.num_layers, 2, *kv_shape),
            dtype.name,
            config.num_layers * 2 * math.prod(kv_shape) * item,
        ),
        Buffer("rows", (batch,), "settings", batch * _row_bytes()),
        Buffer("seen tokens", (batch, config.vocab_size), "int32", batch * config.vocab_size * 4),
    ]
    if drafter is not None:
        buffers.extend(drafter.buffers(batch, largest))
    temporary = max(
        program_temporaries(config, batch, nodes, largest),
        program_temporaries(config, 1, max(chunks), largest),
    )
    temporary += 4 * 12 * batch * config.vocab_size  # sampling
    if drafter is not None:
        temporary += drafter.temporary_bytes(config, batch, largest)
    if batch > 1:  # prefill works on a copy of one row
        temporary += 2 * config.num_layers * math.prod(kv_shape[1:]) * item
    return MemoryPlan(
        config=config,
        dtype=dtype.name,
        platform=platform,
        batch=batch,
        context=context,
        capacities=tuple(capacities),
        chunks=chunks,
        tree_nodes=nodes,
        max_depth=depth,
        max_stop_ids=MAX_STOP_IDS,
        max_bad_words=MAX_BAD_WORDS,
        buffers=tuple(buffers),
        temporary_bytes=temporary,
    )


def _row_bytes() -> int:
    """What `specmemo_jax.speculate.rows.Rows` holds a row, beside the seen tokens."""
    words, longest = MAX_BAD_WORDS
    own = 4 + 4 + 1  # lengths, pending, done
    limits = 4 + 4 * MAX_STOP_IDS  # left, stop_ids
    sampling = 6 * 4 + 4 + 4 + 8 + 4 * words * longest  # factors, top_k, min_length, key, bad_words
    return own + limits + sampling + 4 * (longest - 1)  # and the answer's recent tokens


def program_temporaries(config: LlamaConfig, batch: int, nodes: int, capacity: int) -> int:
    """Coarse bound of a program's temporaries: float32 scores three times, activations, logits, new KV."""
    rows = batch * nodes
    scores = 3 * rows * config.num_heads * (capacity + nodes)
    activations = rows * (
        8 * config.hidden_size + 4 * config.ffn_size + 4 * config.num_heads * config.head_dim
    )
    new_kv = 4 * config.num_layers * rows * config.num_kv_heads * config.head_dim
    return 4 * (scores + activations + new_kv + 2 * rows * config.vocab_size) + 2**20
