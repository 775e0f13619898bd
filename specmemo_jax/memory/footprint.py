"""The memory of generation in theory: every persistent buffer exactly, each program's peak of temporaries.

Arithmetic over shapes; no program is traced or compiled. ``docs/memory-model.md`` derives every term,
and ``scripts/check_memory_model.py`` holds the sums against the compiler.
"""

import dataclasses
import functools
import math

import jax

from specmemo_jax.decode.emitted import init_emitted
from specmemo_jax.decode.rows import init_rows
from specmemo_jax.decode.score import SCORED_NODES
from specmemo_jax.devices.table import DeviceSpec
from specmemo_jax.draft.protocol import Drafter, TreeLimits
from specmemo_jax.llama.buffers import Buffer, cache_buffer
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.kv import Groups
from specmemo_jax.llama.live_sets import (
    FULL,
    ForwardShape,
    LiveSet,
    array,
    attention,
    backends,
    head,
    projections,
    until_commit,
)
from specmemo_jax.memory.shapes import Shapes

WEIGHTS = "target weights"
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
GPU_ALIGNMENT = 256  # bytes to which XLA's and CUDA's allocators round every buffer
# XLA tries cuBLAS beside its own kernels when it tunes on the device: its workspace on Hopper and later.
TUNED_WORKSPACE = 32 * 2**20
# What a compiler may do otherwise than the theory says: a share of the generation memory, and bytes.
MARGIN_SHARE, MARGIN_LEAST = 1 / 128, 2**20


@dataclasses.dataclass(frozen=True)
class ProgramFootprint:
    """What a program needs beside the persistent buffers at its peak: live set, inputs and outputs."""

    name: str
    terms: tuple[Buffer, ...]

    @functools.cached_property
    def bytes(self) -> int:
        """The sum of the terms."""
        return sum(term.bytes for term in self.terms)


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes a device. ``reserve``: the platform's own, outside of generation memory."""

    persistent: tuple[Buffer, ...]
    programs: tuple[ProgramFootprint, ...]
    reserve: int

    @property
    def weights_bytes(self) -> int:
        """The target's weights as packed, shared tables once."""
        return sum(buffer.bytes for buffer in self.persistent if buffer.name == WEIGHTS)

    @property
    def largest(self) -> ProgramFootprint:
        """The program with the highest peak."""
        return max(self.programs, key=lambda program: program.bytes)

    @property
    def generation_bytes(self) -> int:
        """Persistent buffers without the target's weights, and the largest program's temporaries."""
        persistent = sum(buffer.bytes for buffer in self.persistent if buffer.name != WEIGHTS)
        return persistent + (self.largest.bytes if self.programs else 0)

    @property
    def peak_bytes(self) -> int:
        """Reserve, weights and generation memory."""
        return self.reserve + self.weights_bytes + self.generation_bytes


def footprint(shapes: Shapes, device: DeviceSpec | None = None) -> Footprint:
    """Price a plan's shapes on one of its devices, at the largest capacity.

    ``device`` adds its runtime's reserve, and says what compiles for a GPU; None prices the worse of what a
    GPU may do.
    """
    config, drafter, groups = shapes.config, shapes.drafter, shapes.groups_at(shapes.capacities[-1])
    buffers = (
        weights(config, shapes.dtype, shapes.shards),
        *state(config, shapes.cache_dtype, groups, shapes.shards),
        emitted(groups.rows, shapes.trees.max_depth),
        *(() if drafter is None else drafter.buffers(groups)),
    )
    quantized = shapes.cache_dtype == "int8"
    if shapes.platform != "cpu":
        leaves = (4 if quantized else 2) * config.num_layers * len(groups.sizes)
        leaves += 24 + (8 if drafter is None else 64)
        buffers += (Buffer("alignment", (leaves,), "padding", leaves * GPU_ALIGNMENT),)

    programs: dict[str, ProgramFootprint] = {}
    for backend in backends(shapes.platform, None if device is None else device.compute_capability):
        base = ForwardShape(
            config,
            ITEM_BYTES[shapes.dtype],
            backend,
            groups.rows,
            1,
            -(-groups.total // groups.rows),
            score_nodes=shapes.score_nodes,
            shards=shapes.shards,
            quantized=quantized,
            most=groups.most,
            taps=0 if drafter is None else len(drafter.taps),
        )
        found = [_step(base, _limited(drafter, nodes), shapes) for nodes in shapes.tree_sizes]
        found += [_prefill(base, drafter, width, shapes.policy) for width in shapes.chunks]
        if drafter is not None and drafter.most_waiting:
            found.append(_program("settle", list(drafter.live_sets(base, 0)), _results(config)))
        found += [_score(base, width) for width in shapes.chunks if shapes.scoring]
        for program in found:
            known = programs.get(program.name)
            programs[program.name] = program if known is None else max(known, program, key=lambda p: p.bytes)
    if len(groups.sizes) > 1:
        programs["move"] = _move(shapes, groups)
    kept_bytes = sum(buffer.bytes for buffer in buffers if buffer.name != WEIGHTS)
    tuned = _tuned_workspace(device)
    priced = [
        _with_margin(dataclasses.replace(program, terms=(*program.terms, *tuned)), kept_bytes)
        for program in programs.values()
    ]
    if len(shapes.capacities) > 1:
        priced.append(_growth(shapes, shapes.groups_at(shapes.capacities[-2])))
    return Footprint(buffers, tuple(priced), 0 if device is None else device.reserve_bytes)


def _tuned_workspace(device: DeviceSpec | None) -> LiveSet:
    """What a program needs more where XLA tunes on the device and takes cuBLAS: nothing before Hopper.
    Without it a step of 64 nodes of llama-2-7b was 4 MiB above its price (docs/performance-log.md).
    """
    if device is None or device.platform != "cuda" or float(device.compute_capability or 0) < 9:
        return ()
    return (Buffer("workspace of a tuned product", (TUNED_WORKSPACE,), "int8", TUNED_WORKSPACE),)


def _with_margin(program: ProgramFootprint, persistent: int) -> ProgramFootprint:
    margin = math.ceil((persistent + program.bytes) * MARGIN_SHARE) + MARGIN_LEAST
    return ProgramFootprint(program.name, (*program.terms, Buffer("margin", (), "padding", margin)))


def _limited(drafter: Drafter | None, nodes: int) -> Drafter | None:
    return None if drafter is None or nodes == 1 else drafter.limited(nodes)


def _step(base: ForwardShape, drafter: Drafter | None, shapes: Shapes) -> ProgramFootprint:
    """Draft, verify, accept, commit: what is drafted with has gone when the target runs, and of the widths
    that one program can verify one runs.
    """
    trees = TreeLimits.of(drafter)
    peaks = [live for width in trees.verify_buckets for live in _verify(base, trees, width, shapes)]
    if drafter is not None:
        drafting = dataclasses.replace(base, nodes=trees.num_nodes, in_order=trees.is_chain)
        peaks += drafter.live_sets(drafting, None)
    return _program(f"step {trees.num_nodes}", peaks, _results(base.config))


def _verify(base: ForwardShape, trees: TreeLimits, nodes: int, shapes: Shapes) -> list[LiveSet]:
    """Live sets of verification: attention, products, the commit, and the logits by `Chunking`."""
    config, batch = base.config, base.rows
    depth, logit_nodes = trees.max_depth, shapes.logit_nodes
    verify = dataclasses.replace(base, nodes=nodes, in_order=trees.is_chain)
    kv_heads, D = verify.heads[1], config.head_dim
    item = 1 if base.quantized else base.itemsize
    length = D + FULL if base.quantized else D
    path = array("accepted keys and values", (config.num_layers, 2, batch, kv_heads, depth + 1, length), item)
    waiting = array(
        "features of the path", (batch, depth + 1, verify.taps * config.hidden_size), base.itemsize
    )
    peaks = [*attention(verify), *projections(verify), (*until_commit(verify), path, waiting)]
    by_parts = logit_nodes is not None and logit_nodes < nodes
    peaks += head(verify, batch * (logit_nodes if by_parts and logit_nodes else nodes), False, batch)
    *others, drawing = head(verify, batch * (1 if by_parts else nodes), True, batch)
    if len(trees.verify_buckets) > 1:  # the branch that runs updates a copy, and copies it
        columns = -(-config.vocab_size // base.shards)
        drawing = (*drawing, array("seen tokens of the branch", (2, batch, columns), FULL, "int32"))
    peaks += (*others, drawing)
    if shapes.policy == "unbounded" and trees.num_nodes > 1:
        paths = array("logits by path", (batch, trees.max_leaves, depth + 1, config.vocab_size), FULL)
        peaks += [(*live, paths) for live in head(verify, batch * nodes, False, batch)]
    if verify.taps and verify.on_cpu and base.itemsize < FULL:  # the path's are picked out of float32
        width = verify.taps * config.hidden_size
        wider = array("features, converted", (verify.all_nodes, width), FULL - base.itemsize)
        peaks = [(*live, wider) for live in peaks]
    return peaks


def _prefill(base: ForwardShape, drafter: Drafter | None, width: int, policy: str) -> ProgramFootprint:
    """A chunk of one row. The drafter reads it in the same program, unordered, so both may live."""
    config = base.config
    read = dataclasses.replace(base, rows=1, nodes=width, slots=base.widest, gathered=base.rows > 1)
    rows = width if policy == "unbounded" else 1
    seen = array("seen tokens of a row", (-(-config.vocab_size // base.shards),), FULL, "int32")
    peaks = [(*live, seen) for live in (*attention(read), *projections(read))]
    peaks += [(*live, seen, seen, seen) for live in head(read, rows, True, 1)]
    drafting = () if drafter is None else drafter.live_sets(base, width)
    beside: LiveSet = ()
    if drafting and read.on_cpu and not read.taps:  # else it waits for what it reads there
        beside = max(drafting, key=_size)
    elif drafting:  # one after the other, while what the other keeps for its commit waits
        peaks = [(*live, *min(drafting, key=_size)) for live in peaks] + [
            (*live, *until_commit(read)) for live in drafting
        ]
    inputs = array("tokens and settings", (width + 256,), FULL)
    return _program(f"prefill {width}", peaks, (*beside, inputs, *_results(config)))


def _score(base: ForwardShape, width: int) -> ProgramFootprint:
    """A prompt's chunk whose every position has its logits, `SCORED_NODES` at a time in a loop."""
    read = dataclasses.replace(base, rows=1, nodes=width, slots=base.widest, gathered=base.rows > 1)
    loop = array("hidden states of all parts", (2, width, base.config.hidden_size), FULL)
    peaks = [*attention(read), *projections(read)]
    nodes, columns = min(width, SCORED_NODES), -(-base.config.vocab_size // base.shards)
    scores = array("logits, shifted and exponentiated", (2, nodes, columns), FULL)
    peaks += [(*live, scores, loop) for live in head(read, nodes, False, 1)]
    inputs = array("tokens and scores", (4, width + 64), FULL)
    return _program(f"score {width}", peaks, (inputs, *_results(base.config)))


def _move(shapes: Shapes, groups: Groups) -> ProgramFootprint:
    """A row's copy between groups: caches from buffer to buffer, settings and the drafter's state by way
    of a row's copy.
    """
    config, drafter = shapes.config, shapes.drafter
    rows = [array("seen tokens of a row", (-(-config.vocab_size // shapes.shards),), FULL, "int32")]
    for buffer in () if drafter is None else drafter.buffers(groups):
        if buffer.kind == "state":
            size = -(-buffer.bytes // groups.rows)
            rows.append(Buffer(f"a row of {buffer.name}", buffer.shape[1:], buffer.dtype, size))
    return _program("move", [tuple(rows)], _results(config))


def _growth(shapes: Shapes, groups: Groups) -> ProgramFootprint:
    """Growing to the last capacity from ``groups``: what is old beside what is new, of caches a layer at a
    time (`llama.kv.grow`), the drafter's state before the target's.
    """
    config, dtype = shapes.config, shapes.cache_dtype
    rows, slots = max(groups, key=math.prod)
    shape = (2, rows, config.num_kv_heads // shapes.shards, slots, config.head_dim)
    scale = FULL if dtype == "int8" else 0  # a vector's, beside its numbers
    size = math.prod(shape[:-1]) * (config.head_dim * ITEM_BYTES[dtype] + scale)
    old = [Buffer("a layer's KV before", shape, dtype, size)]
    for buffer in () if shapes.drafter is None else shapes.drafter.buffers(groups):
        if buffer.kind == "cache":
            layers, *rest = buffer.shape
            name = f"a layer of {buffer.name} before"
            old.append(Buffer(name, tuple(rest), buffer.dtype, buffer.bytes // layers))
        elif buffer.kind != "weights":
            old.append(dataclasses.replace(buffer, name=f"{buffer.name} before"))
    return ProgramFootprint("growth", tuple(old))


def weights(config: LlamaConfig, dtype: str, shards: int) -> Buffer:
    """The target's packed weights on one device: norms and the biases of hidden states are whole."""
    H, D, L = config.hidden_size, config.head_dim, config.num_layers
    N, K = config.num_heads, config.num_kv_heads
    split = (1 if config.tied_embeddings else 2) * config.vocab_size * H
    split += L * ((2 * N + 2 * K) * D * H + 3 * H * config.ffn_size)
    whole = H + L * 2 * H
    if config.attention_bias:
        split, whole = split + L * (N + 2 * K) * D, whole + L * H
    if config.mlp_bias:
        split, whole = split + L * 2 * config.ffn_size, whole + L * H
    count = split // shards + whole
    return Buffer(WEIGHTS, (count,), dtype, count * ITEM_BYTES[dtype])


def state(config: LlamaConfig, dtype: str, groups: Groups, shards: int) -> tuple[Buffer, ...]:
    """The engine's state on one device, without the drafter's: cache, rows and the tokens seen."""
    vector, batch = (config.num_layers, 2, config.num_kv_heads // shards), groups.rows
    cache = (cache_buffer("target KV", groups, (*vector, config.head_dim), dtype, ITEM_BYTES[dtype]),)
    if dtype == "int8":
        cache = (*cache, cache_buffer("target KV scales", groups, (*vector, 1), "float32", FULL))
    return (
        *cache,
        Buffer("rows", (batch,), "settings", batch * row_bytes()),
        array("seen tokens", (batch, config.vocab_size // shards), FULL, "int32"),
    )


@functools.cache
def row_bytes() -> int:
    """What `specmemo_jax.decode.rows.Rows` holds a row, beside the seen tokens."""
    rows = jax.eval_shape(lambda: init_rows(1, 1))
    rows = dataclasses.replace(rows, history=dataclasses.replace(rows.history, seen=()))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(rows))


@functools.cache
def emitted(batch: int, depth: int) -> Buffer:
    """What the last steps emitted, and the place of the next."""
    log = jax.eval_shape(lambda: init_emitted(batch, depth)).log
    return Buffer("emitted", log.shape, "int32", (log.size + 1) * FULL)


def _results(config: LlamaConfig) -> LiveSet:
    """What aliases no argument: a token, and the table of a tuple's pointers."""
    pointers = 2 * config.num_layers + 64
    return (Buffer("table of results", (pointers,), "pointers", 8 * pointers),)


def _program(name: str, peaks: list[LiveSet], always: LiveSet) -> ProgramFootprint:
    return ProgramFootprint(name, (*max(peaks, key=_size), *always))


def _size(live: LiveSet) -> int:
    return sum(buffer.bytes for buffer in live)
