"""Draft heads slot by slot in NumPy, as a drafter runs them; nothing of `train` has a part in it."""

import numpy as np

from specmemo_jax.llama.rope import inverse_frequencies


def norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def turned(x, position, config):
    """One slot's heads ``[N, D]`` at their position."""
    angles = position * inverse_frequencies(config)
    cos, sin = np.concatenate([np.cos(angles)] * 2), np.concatenate([np.sin(angles)] * 2)
    half = x.shape[-1] // 2
    return x * cos + np.concatenate([-x[:, half:], x[:, :half]], axis=-1) * sin


class Chain:
    """A head that has read the target's features at some slots, and goes on with its own."""

    def __init__(self, head, params):
        self.head, self.params, self.keys, self.values = head, params, [], []

    def fork(self):
        other = Chain(self.head, self.params)
        other.keys, other.values = list(self.keys), list(self.values)
        return other

    def read(self, embedded, features):
        """The slot's output, of the target's features."""
        state = self.params["fc.weight"] @ features if self.head.kind == "eagle3" else features
        return self.feed(embedded, state)

    def feed(self, embedded, state):
        """The slot's output, of a state that the head put out itself."""
        head, w, c = self.head, self.params, self.head.layer
        prefix = "midlayer" if head.kind == "eagle3" else "layers.0"
        eps, D = c.rms_norm_eps, c.head_dim
        if head.kind == "eagle3":
            x = state
            inner = np.concatenate(
                [
                    norm(embedded, w[f"{prefix}.input_layernorm.weight"], eps),
                    norm(state, w[f"{prefix}.hidden_norm.weight"], eps),
                ]
            )
        else:
            x = inner = w["fc.weight"] @ np.concatenate([embedded, state])
        q, k, v = (
            (w[f"{prefix}.self_attn.{name}_proj.weight"] @ inner).reshape(-1, D) for name in ("q", "k", "v")
        )
        position = len(self.keys)
        q = turned(q, position, c)
        self.keys.append(turned(k, position, c))
        self.values.append(v)
        attended = []
        for n, query in enumerate(q):
            of = n // (c.num_heads // c.num_kv_heads)
            scores = np.array([query @ key[of] for key in self.keys]) / np.sqrt(D)
            chances = np.exp(scores - scores.max())
            chances /= chances.sum()
            attended.append(sum(p * value[of] for p, value in zip(chances, self.values, strict=True)))
        x = x + w[f"{prefix}.self_attn.o_proj.weight"] @ np.concatenate(attended)
        inner = norm(x, w[f"{prefix}.post_attention_layernorm.weight"], eps)
        gate, up = w[f"{prefix}.mlp.gate_proj.weight"] @ inner, w[f"{prefix}.mlp.up_proj.weight"] @ inner
        return x + w[f"{prefix}.mlp.down_proj.weight"] @ (silu(gate) * up)
