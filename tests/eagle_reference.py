"""EAGLE's heads and trees in NumPy, from their papers: no cache, chunk or batch, slot by slot in float64.

Slot p of a text pairs the token at p + 1 with the target's hidden states at p, and its output says what
follows at p + 2 (arXiv 2401.15077, section 3; EAGLE-3's inputs: arXiv 2503.01840, section 3.2). A drafted
node goes on from its parent's output. Trees: arXiv 2406.16858, section 4.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specmemo_jax.draft import TreeShape
from specmemo_jax.draft.head_config import HeadConfig
from specmemo_jax.llama import kv
from specmemo_jax.llama.model import forward_with_taps
from specmemo_jax.llama.packing import Target

Path = tuple[int, ...]


@functools.lru_cache(32)
def _causal(target: Target, taps: tuple[int, ...], length: int) -> Callable[..., jax.Array]:
    config = target.config

    def run(leaves, ids):
        nothing = kv.init_cache(config.num_layers, (1, config.num_kv_heads, 1, config.head_dim), target.dtype)
        positions, causal = jnp.arange(length)[None], jnp.tril(jnp.ones((1, length, length), bool))
        zero = jnp.zeros((1,), jnp.int32)
        return forward_with_taps(target.merge(leaves), (nothing,), ids, positions, causal, zero, taps)[2]

    return jax.jit(run)


def true_features(target: Target, taps: tuple[int, ...], ids: Sequence[int]) -> np.ndarray:
    """The target's hidden states at every position of a text ``[n, F]``, from one pass without a cache."""
    length = -(-len(ids) // 128) * 128
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(_causal(target, taps, length)(target.leaves, tokens))[0, : len(ids)].astype(np.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """A head as named tensors, with the target's embedding ``[V, H]`` and head ``[V, H]``."""

    config: HeadConfig
    tensors: Mapping[str, np.ndarray]
    embedding: np.ndarray
    target_head: np.ndarray

    @property
    def ids(self) -> np.ndarray:
        """The target's ids that it can propose."""
        if self.config.draft_vocab_size is None:
            return np.arange(self.config.layer.vocab_size)
        return np.arange(self.config.draft_vocab_size) + self.tensors["d2t"]

    def inputs(self, token: int, features: np.ndarray, drafted: bool) -> tuple[np.ndarray, np.ndarray]:
        """The residual and what attention reads; ``features``: a parent's output where it was ``drafted``."""
        embedded = self.embedding[token].astype(np.float64)
        if self.config.kind == "eagle":
            x = self._fc(np.concatenate([embedded, features]))
            return x, x
        g = features if drafted else self._fc(features)
        normed = self._norm(embedded, "input_layernorm"), self._norm(g, "hidden_norm")
        return g, np.concatenate(normed)

    def slot(
        self,
        token: int,
        features: np.ndarray,
        drafted: bool,
        position: int,
        keys: np.ndarray,
        values: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One slot after those of ``keys`` and ``values`` ``[m, K, D]``: its output, key and value."""
        c, layer = self.config.layer, self._layer
        residual, read = self.inputs(token, features, drafted)
        q, k, v = (
            (self.tensors[f"{layer}.self_attn.{name}_proj.weight"] @ read).reshape(heads, c.head_dim)
            for name, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads))
        )
        q, k = self._rotated(q, position), self._rotated(k, position)
        keys, values = np.concatenate([keys, k[None]]), np.concatenate([values, v[None]])
        grouped = q.reshape(c.num_kv_heads, -1, c.head_dim)
        scores = np.einsum("kgd,mkd->kgm", grouped, keys) / np.sqrt(c.head_dim)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("kgm,mkd->kgd", weights / weights.sum(-1, keepdims=True), values)
        x = residual + self.tensors[f"{layer}.self_attn.o_proj.weight"] @ attended.reshape(-1)
        y = self._norm(x, "post_attention_layernorm")
        gate, up = (self.tensors[f"{layer}.mlp.{name}_proj.weight"] @ y for name in ("gate", "up"))
        return x + self.tensors[f"{layer}.mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up), k, v

    def scored(self, out: np.ndarray) -> np.ndarray:
        """What the rows that score tokens read of an output."""
        return out if self.config.kind == "eagle" else self._norm(out, "norm", "")

    def logits(self, out: np.ndarray) -> np.ndarray:
        """Of the tokens that it can propose."""
        own = self.config.own_lm_head
        rows = self.tensors["lm_head.weight"] if own else self.target_head[self.ids]
        return rows.astype(np.float64) @ self.scored(out)

    @property
    def _layer(self) -> str:
        return "layers.0" if self.config.kind == "eagle" else "midlayer"

    def _fc(self, x: np.ndarray) -> np.ndarray:
        return self.tensors["fc.weight"].astype(np.float64) @ x + self.tensors.get("fc.bias", 0.0)

    def _norm(self, x: np.ndarray, name: str, scope: str | None = None) -> np.ndarray:
        weight = self.tensors[f"{self._layer if scope is None else scope}.{name}.weight".lstrip(".")]
        return x / np.sqrt(np.mean(x * x) + self.config.layer.rms_norm_eps) * weight

    def _rotated(self, x: np.ndarray, position: int) -> np.ndarray:
        half = x.shape[-1] // 2
        angles = position * self.config.layer.rope_theta ** (-np.arange(half) / half)
        a, b = x[:, :half], x[:, half:]
        return np.concatenate(
            [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1
        )


@dataclasses.dataclass(frozen=True)
class Node:
    """A drafted node: its path below the root, its joint log probability, and what its own slot reads: its
    parent's output, and keys and values of the slots between the text's and its own.
    """

    path: Path
    joint: float
    parent: np.ndarray
    keys: tuple[np.ndarray, ...] = ()
    values: tuple[np.ndarray, ...] = ()


class Text:
    """A head over the true ``features`` ``[n, F]`` of a text ``ids``."""

    def __init__(self, head: Reference, ids: Sequence[int], features: np.ndarray):
        c, n = head.config.layer, len(ids) - 1
        self.head, self.ids = head, list(ids)
        self.keys, self.values = (np.zeros((n, c.num_kv_heads, c.head_dim)) for _ in range(2))
        self.outputs = np.zeros((n, c.hidden_size))
        for p in range(n):
            self.outputs[p], self.keys[p], self.values[p] = head.slot(
                ids[p + 1], features[p], False, p, self.keys[:p], self.values[:p]
            )

    def tree(self, at: int, shape: TreeShape) -> tuple[set[Path], float, list[np.ndarray]]:
        """The T - 1 likeliest paths below the token at position ``at``, by expanding the best ``branches`` a
        level; the closest call among the choices; and the logits of each pass, the best node's first.
        """
        head, k = self.head, shape.branches
        level, closest, seen = self._children(Node((), 0.0, self.outputs[at - 1]), self.outputs[at - 1], k)
        met, passes = list(level), [seen[None]]
        for depth in range(1, shape.depth):
            beam, margin = _best(level, k)
            closest, level, logits = min(closest, margin), [], []
            for node in beam:
                keys = np.concatenate([self.keys[:at], *(key[None] for key in node.keys)])
                values = np.concatenate([self.values[:at], *(value[None] for value in node.values)])
                out, key, value = head.slot(node.path[-1], node.parent, True, at - 1 + depth, keys, values)
                inner = dataclasses.replace(node, keys=(*node.keys, key), values=(*node.values, value))
                children, margin, scores = self._children(inner, out, k)
                level += children
                logits.append(scores)
                closest = min(closest, margin)
            met += level
            passes.append(np.stack(logits))
        chosen, margin = _best(met, shape.num_nodes - 1)
        return {node.path for node in chosen}, min(closest, margin), passes

    def _children(self, node: Node, out: np.ndarray, k: int) -> tuple[list[Node], float, np.ndarray]:
        logits = self.head.logits(out)
        shifted = logits - logits.max()
        log_p = shifted - np.log(np.exp(shifted).sum())
        every = [
            Node((*node.path, int(token)), node.joint + float(own), out, node.keys, node.values)
            for token, own in zip(self.head.ids, log_p, strict=True)
        ]
        return *_best(every, k), logits


def _best(nodes: list[Node], count: int) -> tuple[list[Node], float]:
    """The likeliest nodes, and by how much the last of them is likelier than the next."""
    ranked = sorted(nodes, key=lambda node: -node.joint)
    left = ranked[count - 1 : count + 1]
    return ranked[:count], left[0].joint - left[1].joint if len(left) == 2 else np.inf


def paths_of(tokens: Sequence[int], parents: Sequence[int], depths: Sequence[int]) -> set[Path]:
    """The paths of one row's tree below its root."""
    found: list[Path] = [()]
    for token, parent, depth in zip(tokens[1:], parents[1:], depths[1:], strict=True):
        assert parent < len(found)
        found.append((*found[parent], int(token)))
        assert len(found[-1]) == depth
    assert len(set(found)) == len(found)
    return set(found[1:])


def random_tensors(config: HeadConfig, seed: int) -> dict[str, np.ndarray]:
    """Of the shapes that `HeadConfig` names, norms around one; with a draft vocabulary its ``d2t``."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, shape in config.tensor_shapes().items():
        noise = rng.standard_normal(shape).astype(np.float32)
        tensors[name] = noise / np.float32(np.sqrt(shape[-1])) if len(shape) > 1 else 0.3 * noise
        if name.endswith("norm.weight"):
            tensors[name] += 1
    if config.draft_vocab_size is not None:
        chosen = np.sort(rng.choice(config.layer.vocab_size, config.draft_vocab_size, replace=False))
        tensors["d2t"] = chosen.astype(np.int64) - np.arange(config.draft_vocab_size)
    return tensors
