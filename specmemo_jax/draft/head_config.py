"""What a trained draft head says of itself: its kind, its shapes, and what it reads of the target.

Three published kinds. Medusa (arXiv 2401.10774): residual blocks over the target's last hidden state, one
a depth. EAGLE 1 and 2 (arXiv 2401.15077, 2406.16858): one decoder layer over a token's embedding and the
target's last hidden state before it. EAGLE-3 (arXiv 2503.01840): the same over the hidden states at three
of the target's layers. Tensors have the names and shapes of the published files, linear ones ``[out, in]``.
"""

import dataclasses
from typing import Literal

from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.config import LlamaConfig

HeadKind = Literal["medusa", "eagle", "eagle3"]
KINDS: tuple[HeadKind, ...] = ("medusa", "eagle", "eagle3")


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Static description of a head.

    ``layer``: its decoder layer as a Llama of one layer (Medusa reads only H and V of it).
    ``taps``: the target's hidden states that it reads, by the layer that they enter, as Hugging Face counts
    ``hidden_states``: the number of layers means the last one, after the final norm.
    ``draft_vocab_size``: how many of the target's tokens it can propose, None for all.
    ``own_lm_head``: it brings the rows that score them; else they are the target's.
    ``num_heads``: Medusa's, one a depth.
    """

    kind: HeadKind
    layer: LlamaConfig
    taps: tuple[int, ...]
    draft_vocab_size: int | None = None
    own_lm_head: bool = False
    fc_bias: bool = False
    num_heads: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"a draft head is {', '.join(KINDS)}, found {self.kind!r}")
        if (self.kind == "medusa") != (self.num_heads > 0):
            raise ConfigError(f"num_heads={self.num_heads} does not go with a head of kind {self.kind}")
        if self.kind != "eagle3" and len(self.taps) != 1:
            raise ConfigError(f"{self.kind} reads one hidden state of the target, found taps {self.taps}")
        size = self.draft_vocab_size
        if size is not None and not 0 < size <= self.layer.vocab_size:
            raise ConfigError(
                f"draft_vocab_size must be between 1 and the target's {self.layer.vocab_size}, found {size}"
            )

    @property
    def num_draft_tokens(self) -> int:
        """Vd, tokens that it can propose."""
        return self.layer.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every float tensor. With a draft vocabulary ``d2t`` (int64 ``[Vd]``) comes beside them: a draft
        id's distance to the target's id.
        """
        c = self.layer
        H, F, D, Vd = c.hidden_size, c.ffn_size, c.head_dim, self.num_draft_tokens
        N, K = c.num_heads, c.num_kv_heads
        shapes: dict[str, tuple[int, ...]] = {}
        if self.kind == "medusa":
            for i in range(self.num_heads):
                shapes[f"{i}.0.linear.weight"], shapes[f"{i}.0.linear.bias"] = (H, H), (H,)
                if self.own_lm_head:
                    shapes[f"{i}.1.weight"] = (Vd, H)
            return shapes
        shapes["fc.weight"] = (H, (len(self.taps) + (self.kind == "eagle")) * H)
        if self.fc_bias:
            shapes["fc.bias"] = (H,)
        layer, inner = ("layers.0", H) if self.kind == "eagle" else ("midlayer", 2 * H)
        if self.kind == "eagle3":
            shapes[f"{layer}.hidden_norm.weight"] = shapes[f"{layer}.input_layernorm.weight"] = (H,)
        for name, rows in {"q_proj": N * D, "k_proj": K * D, "v_proj": K * D}.items():
            shapes[f"{layer}.self_attn.{name}.weight"] = (rows, inner)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (H, N * D)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (H,)
        for name, shape in {"gate_proj": (F, H), "up_proj": (F, H), "down_proj": (H, F)}.items():
            shapes[f"{layer}.mlp.{name}.weight"] = shape
        if self.kind == "eagle3":
            shapes["norm.weight"] = (H,)
        if self.own_lm_head:
            shapes["lm_head.weight"] = (Vd, H)
        return shapes


def default_taps(kind: HeadKind, target: LlamaConfig) -> tuple[int, ...]:
    """What published heads of a kind read: the last hidden state, or those entering layers 2, L/2, L-3."""
    L = target.num_layers
    if kind != "eagle3":
        return (L,)
    return tuple(min(max(layer, 0), L) for layer in (2, L // 2, L - 3))


def head_layer(target: LlamaConfig) -> LlamaConfig:
    """A decoder layer of the target's own shape."""
    return dataclasses.replace(target, num_layers=1, attention_bias=False, mlp_bias=False)
