"""What one pass of a Llama keeps alive at once: the live buffers at each point where a pass can peak.

A pass runs R = B T nodes through L layers (a step's tree, or a prompt's chunk with B = 1 and T = C). At
every moment XLA holds what was computed before and is still to be read: the residual, the new keys and
values of the layers so far, and the operands and results of the operation that runs. The sums here are
those sets at the operations that can be the largest, each buffer by its shape (docs/memory-model.md
derives them and says which platform keeps which). All sizes are a device's: tensor parallelism over m
devices splits heads, ffn columns and vocabulary, and leaves hidden states whole.
"""

import dataclasses
import math

from specmemo_jax.llama.attention import TILE, in_tiles
from specmemo_jax.llama.buffers import Buffer
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.tiles import tiled_rows

LiveSet = tuple[Buffer, ...]  # buffers that exist at once

FULL = 4  # bytes of float32 and int32
CUBLAS_WORKSPACE = (
    4 * 2**20
)  # XLA's, a matrix product; Hopper's larger one is only for what Triton does not take
SPLITS = 8  # most parts that XLA's GPU backend sums a product's inner dimension in
SPLIT_BYTES = 14 * 2**20  # most bytes such parts take: beyond, the product's own tiles fill the device
WAITING_SUMS = 2**20  # elements of a sum over devices from which XLA's GPU backend adds it at once
YNN_ROWS = 4096  # rows of scores from which XLA's CPU backend reduces them without a second copy


@dataclasses.dataclass(frozen=True)
class ForwardShape:
    """One pass: ``rows`` B of ``nodes`` T over ``slots`` S of cache, by one of `backends`.

    Where rows lie in groups, ``slots`` is a row's on average, rounded up, and ``most`` the widest's.
    ``seen``: M, the nodes that a node can see beside the cache (T, or more where earlier passes' are
    not committed). ``gathered``: the rows are copied out of a wider cache. ``score_nodes``: the most
    nodes whose scores exist at once. ``layers``: L, None for all of the model's. ``in_order``: accepted
    nodes are the first ones, so that nothing is gathered for the commit (a chain). ``quantized``: the cache
    is `specmemo_jax.llama.kv.Quantized`. ``taps``: hidden states a node that are kept for a draft head.
    """

    config: LlamaConfig
    itemsize: int
    backend: str
    rows: int
    nodes: int
    slots: int
    seen: int | None = None
    gathered: bool = False
    score_nodes: int | None = None
    shards: int = 1
    layers: int | None = None
    in_order: bool = False
    quantized: bool = False
    most: int | None = None
    taps: int = 0

    @property
    def widest(self) -> int:
        """S of the widest row."""
        return self.slots if self.most is None else self.most

    @property
    def depth(self) -> int:
        """L, layers that run."""
        return self.config.num_layers if self.layers is None else self.layers

    @property
    def all_nodes(self) -> int:
        """R, nodes of all rows."""
        return self.rows * self.nodes

    def product_rows(self, rows: int) -> int:
        """Rows of a product's result for ``rows``: whole tiles in float32 on CPU."""
        return tiled_rows(rows) if self.on_cpu and self.itemsize == FULL else rows

    @property
    def on_cpu(self) -> bool:
        """Whether XLA's CPU backend compiles it."""
        return self.backend == "cpu"

    @property
    def parted(self) -> bool:
        """Whether attention runs in a loop over parts of the nodes."""
        return self.score_nodes is not None and self.score_nodes < self.nodes

    @property
    def tiled(self) -> bool:
        """Whether attention reads the cache in tiles."""
        return in_tiles(self.rows, self.nodes, self.backend)

    @property
    def heads(self) -> tuple[int, int]:
        """Query and key-value heads of one device."""
        return -(-self.config.num_heads // self.shards), -(-self.config.num_kv_heads // self.shards)


def backends(platform: str, compute_capability: str | None = None) -> tuple[str, ...]:
    """What may compile matrix products: ``cpu``, ``triton`` (CUDA from Ampere on) or ``cublas``; a GPU whose
    capability is not known may have either.
    """
    if platform == "cpu":
        return ("cpu",)
    try:
        return ("triton",) if float(compute_capability or "") >= 8.0 else ("cublas",)
    except ValueError:
        return "triton", "cublas"


def array(name: str, shape: tuple[int, ...], itemsize: int, dtype: str | None = None) -> Buffer:
    """A buffer of ``shape``."""
    kind = dtype or ("float32" if itemsize == FULL else "16 bit")
    return Buffer(name, shape, kind, math.prod(shape) * itemsize)


def until_commit(p: ForwardShape) -> LiveSet:
    """What lives from the first layer to the commit: new keys and values, rotary tables, small integers."""
    c, R = p.config, p.all_nodes
    N, K = p.heads
    if p.on_cpu and (p.quantized or (p.itemsize == FULL and not (p.in_order and p.rows > 1))):
        # The projection's result itself: what is sliced, gathered or quantized of it is fused into the write.
        new = array("new keys and values", (p.depth, p.product_rows(R), (N + 2 * K) * c.head_dim), FULL)
    elif p.quantized:
        new = array("new keys and values, scales", (p.depth, 2, R, K, c.head_dim + FULL), 1, "int8")
    else:
        new = array("new keys and values", (p.depth, 2, R, K, c.head_dim), p.itemsize)
    tables = array("rotary tables", (2, R, c.head_dim), FULL)
    tapped = array("features of the nodes", (p.taps, R, c.hidden_size), p.itemsize)
    return new, tables, bookkeeping(p), *((tapped,) if p.taps else ())


def bookkeeping(p: ForwardShape) -> Buffer:
    """Tree, ancestor mask, positions, lengths, acceptance, and each buffer's alignment: a bound."""
    per_node = 2 * (p.seen or p.nodes) + 64 + 8 * min(p.nodes, 16)
    bytes_ = (
        p.all_nodes * per_node + 8 * p.rows * p.slots // 8 + 512 * p.depth + (2**17 if p.on_cpu else 2**19)
    )
    return Buffer("masks, trees, alignment", (p.rows, p.nodes, p.seen or p.nodes), "small", bytes_)


def fragmentation(p: ForwardShape) -> Buffer:
    """Room that XLA's heap leaves between buffers of different sizes: a residual, and half of one on CPU
    unless a row's cache is copied or a loop runs.
    """
    size = p.all_nodes * p.config.hidden_size * FULL
    half = p.on_cpu and not (p.gathered or p.parted)
    return Buffer("packing", (), "padding", size // 2 if half else size)


def workspace(p: ForwardShape) -> Buffer:
    """cuBLAS' for one product; Triton's kernels take none."""
    size = CUBLAS_WORKSPACE if p.backend == "cublas" else 0
    return Buffer("workspace", (size,), "int8", size)


def _query_rows(p: ForwardShape, rows: int) -> int:
    """Rows of a KV head's score matrix for ``rows`` of queries: two at least (`tree_attention`), and whole
    tensor-core tiles where cuBLAS multiplies 16-bit values.
    """
    if p.itemsize == FULL:
        return rows if p.on_cpu else max(2, rows)
    return -(-rows // 8) * 8 if p.backend == "cublas" else max(2, rows)


def attention(p: ForwardShape) -> tuple[LiveSet, ...]:
    """Live sets of one layer's attention, the layer's own new keys and values counted by `kept`."""
    c, R, S = p.config, p.all_nodes, min(p.slots, TILE) if p.tiled else p.slots
    N, K = p.heads
    D = c.head_dim
    chunk = p.nodes if p.score_nodes is None else min(p.nodes, p.score_nodes)
    M, residual = p.seen or p.nodes, array("residual", (R, c.hidden_size), FULL)
    queried = p.rows * K * _query_rows(p, N // K * chunk)
    scores = array("scores over the cache", (queried, S), FULL)
    among = array("scores among nodes", (queried, M), FULL)
    queries = array("queries", (R, N, D), p.itemsize)
    item = (
        FULL if p.on_cpu else p.itemsize
    )  # a row's values, which XLA's CPU backend converts while it copies
    copies: LiveSet = ()
    if p.tiled:
        copies = tuple(array(f"tile's {what}", (K, S, D), FULL) for what in ("keys", "values"))
        if p.itemsize < FULL and not p.quantized:  # a row goes through the loop as integers
            copies += (array("row's keys and values", (2, K, p.slots, D), p.itemsize),)
        copies += (array("attended so far", (2, queried, D + 2), FULL),)
    elif p.gathered and p.quantized:
        copies = tuple(
            array(f"row's {what}, scales", (K, S, D + FULL), 1, "int8") for what in ("keys", "values")
        )
    elif p.gathered:
        copies = (array("row's keys", (K, S, D), p.itemsize), array("row's values", (K, S, D), item))
    base = (*until_commit(p), residual, fragmentation(p))
    as_keys = as_values = ()
    if p.quantized and p.backend != "triton":  # which converts what it reads; others need a layer's in whole
        as_keys, as_values = (
            (array(f"{what} of a layer, converted", (p.rows, K, S, D), p.itemsize),)
            for what in ("keys", "values")
        )
    if p.quantized and not p.on_cpu:
        base = (*base, array("new keys and values, converted", (2, R, K, D), FULL))
    if p.parted:  # a loop, whose operands and results live through all its rounds
        loop = array("queries and results of all parts", (2, R, N, D), FULL)
        base = (*base, loop, array("new keys and values for all parts", (2, R, K, D), FULL), *copies)
        copies = ()
    if not p.on_cpu:
        weights: LiveSet = ()
        if p.itemsize < FULL:
            weights = (array("weights of the cache", (queried, S), p.itemsize),)
        elif p.backend == "cublas":  # whose results come in a tuple, and are not overwritten
            weights = (dataclasses.replace(scores, name="weights of the cache"),)
        out = _product(p, "attended", queried, D, S)
        work = workspace(p)
        return (
            (*base, queries, scores, among, *copies, *as_keys, work),
            (*base, scores, among, *weights, *copies[1:], *as_values, work),
            (*base, among, *(weights or (scores,)), *copies[1:], *as_values, out),
        )
    # A chain's new keys are whole arrays already; elsewhere they are rearranged, as values are.
    ready = p.itemsize == FULL and p.in_order and p.rows > 1
    near: LiveSet = (array("new keys and values for their scores", (1 if ready else 2, R, K, D), FULL),)
    values: LiveSet = (array("new values for their scores", (R, K, D), FULL),)
    if p.parted:
        near = values = ()
    turned = array("queries", (queried, D), FULL)
    narrow = () if p.itemsize == FULL else (array("queries, 16 bit", (queried, D), p.itemsize),)
    both = (*base, turned, *narrow, *near, scores, *copies, *as_keys)
    base = (*base, *as_values)
    again = dataclasses.replace(scores, name="scores over the cache, masked")
    if queried < YNN_ROWS:  # reduced by YNN from a masked copy, while the exponential reads the first
        masked = dataclasses.replace(among, name="scores among nodes, masked")
        return both, (*base, *values, scores, again, among, masked, *copies[1:])
    if p.rows > 1 and K > 1:  # masked in place
        return (
            both,
            (*base, turned, *near, scores, among, *copies),
            (*base, *values, scores, among, *copies[1:]),
        )
    return both, (*base, *values, scores, again, among, *copies[1:])


def projections(p: ForwardShape) -> tuple[LiveSet, ...]:
    """Live sets at a layer's matrix products: QKV, attention's output, gate and up, down."""
    c, R, m = p.config, p.all_nodes, p.shards
    N, K = p.heads
    H, D, F = c.hidden_size, c.head_dim, -(-c.ffn_size // m)
    residual = array("residual", (R, H), FULL)
    normed = array("normed residual", (R, H), p.itemsize)
    P = p.product_rows(R)
    both = array("gate and up", (P, 2 * F), FULL)
    active = array("gated", (P, F), p.itemsize)
    qkv = array("queries, keys and values", (P, (N + 2 * K) * D), FULL)
    turned = array("turned queries and keys", (R, (N + K) * D), FULL)
    base = (*until_commit(p), residual, fragmentation(p))
    if p.parted:
        base = (*base, array("results of all parts, empty", (R, N, D), FULL))
    if p.on_cpu:
        down = array("down", (P, H), FULL)
        final = array("final hidden states", (R, H), FULL)
        live = [(*base, qkv, turned), (*base, both, active), (*base, active, down), (*base, final)]
        if m > 1:
            live.append((*base, down, array("sum over devices", (R, H), FULL)))
        return tuple(live)
    final = array("final hidden states", (R, H), FULL)
    sums: LiveSet = (array("output's parts", (_splits(p, R, H, N * D), R, H), FULL),)
    if m > 1:
        # A sum over devices is added to the residual when the residual is next written; small ones wait.
        waiting = 3 if R * H < WAITING_SUMS else 1
        sums = (array("sums over devices", (waiting, R, H), FULL),)
    return (
        (*base, normed, turned, _product(p, "queries, keys and values", R, (N + 2 * K) * D, H)),
        (*base, *sums, normed, _product(p, "gate and up", R, 2 * F, H)),
        (*base, *sums, both, active),
        (*base, *sums, active, _product(p, "down", R, H, F)),
        (*base, *sums, *((sums[0],) if m > 1 and R * H >= WAITING_SUMS else ()), final),
    )


def head(p: ForwardShape, rows: int, sampled: bool, draws: int) -> tuple[LiveSet, ...]:
    """Live sets at the logits of ``rows`` nodes, from which ``draws`` rows are then sampled; fewer rows than
    the pass has nodes are computed by parts, with the others' hidden states waiting.
    """
    c = p.config
    V = -(-c.vocab_size // p.shards)
    hidden = array("final hidden states", (rows, c.hidden_size), p.itemsize)
    scores = array("logits", (p.product_rows(rows), V), FULL)
    base = (*until_commit(p), scores, fragmentation(p))
    if rows < p.all_nodes:
        base = (*base, array("final hidden states of all nodes", (p.all_nodes, c.hidden_size), FULL))
    live = [(*base, hidden, *(() if p.on_cpu else (workspace(p),)))]
    if p.on_cpu and p.itemsize == FULL and sampled and rows > 1:
        live.append((*base, dataclasses.replace(scores, name="logits, transposed")))
    if sampled:
        live.append((*base, array("sampling", (7 if p.on_cpu else 5, draws, V), FULL)))
    return tuple(live)


def _splits(p: ForwardShape, rows: int, out: int, inner: int) -> int:
    """Most parts of a product ``[rows, inner] x [inner, out]`` that XLA sums apart under Triton."""
    if p.backend != "triton" or inner < 0.6 * out:
        return 1
    room = max(1, SPLIT_BYTES // (rows * out * FULL))
    return min(SPLITS, 2 ** (room.bit_length() - 1))


def _product(p: ForwardShape, name: str, rows: int, out: int, inner: int) -> Buffer:
    """A GPU product's float32 result, in its parts, or with cuBLAS' workspace."""
    parts = _splits(p, rows, out, inner)
    plain = rows * out * FULL
    return Buffer(name, (parts, rows, out), "float32", parts * plain + workspace(p).bytes)
