"""Where training starts: a head made of the target's own last layer, and the tokens that it can propose."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specmemo_jax.draft.head_config import HeadConfig, HeadKind, default_taps, head_layer
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.train.heads import scope
from specmemo_jax.train.target import TargetWeights, read

NOISE = 0.02  # standard deviation of what starts without meaning


def head_config(
    kind: HeadKind,
    target: LlamaConfig,
    *,
    draft_vocab: int | None,
    taps: tuple[int, ...] | None = None,
    heads: int = 4,
    own_lm_head: bool = False,
) -> HeadConfig:
    """The head that is trained: a layer of the target's own shape. ``draft_vocab``: None for all tokens.
    ``own_lm_head``: it learns rows that score tokens of its own, instead of using the target's.
    """
    taps = default_taps(kind, target) if taps is None else taps
    if not all(0 <= tap <= target.num_layers for tap in taps):
        raise ConfigError(f"taps {taps} of a target of {target.num_layers} layers; 0 to that would work")
    size = None if draft_vocab is None or draft_vocab >= target.vocab_size else draft_vocab
    return HeadConfig(
        kind,
        head_layer(target),
        taps,
        draft_vocab_size=size,
        own_lm_head=own_lm_head,
        num_heads=heads if kind == "medusa" else 0,
    )


def draft_ids(answers: np.ndarray, size: int | None, vocab_size: int, always: Sequence[int]) -> np.ndarray:
    """The draft vocabulary ``[Vd]``, int32, ascending: ``always`` and the most frequent of the tokens
    ``answers``; all for None. Of equally frequent tokens the lower ids.
    """
    if size is None:
        return np.arange(vocab_size, dtype=np.int32)
    counts = np.bincount(answers.astype(np.int64), minlength=vocab_size).astype(np.float64)
    counts[list(always)] = np.inf
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


def start_params(
    head: HeadConfig, target: LlamaConfig, weights: TargetWeights, ids: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Float32 masters. An EAGLE layer starts as the target's last one, reading the hidden state alone."""
    rng = np.random.default_rng(seed)

    def noise(*shape: int) -> np.ndarray:
        return NOISE * rng.standard_normal(shape, np.float32)

    if head.kind == "medusa":  # A = 0: the heads start as the target's own (Medusa, section 2.2)
        rows = np.asarray(weights.head[ids], np.float32) if head.own_lm_head else None
        return {
            name: rows if rows is not None and name.endswith(".1.weight") else np.zeros(shape, np.float32)
            for name, shape in head.tensor_shapes().items()
        }
    last, H = _last_layer(target, weights), target.hidden_size
    prefix = scope(head)
    params = {f"{prefix}.{name}": last[name] for name in last if f"{prefix}.{name}" in head.tensor_shapes()}
    taps = len(head.taps)
    if head.kind == "eagle3":
        params[f"{prefix}.hidden_norm.weight"] = last["input_layernorm.weight"]
        params[f"{prefix}.input_layernorm.weight"] = np.ones(H, np.float32)
        for name in ("q_proj", "k_proj", "v_proj"):
            name = f"self_attn.{name}.weight"
            params[f"{prefix}.{name}"] = np.concatenate([noise(*last[name].shape), last[name]], axis=1)
        params["fc.weight"] = np.concatenate(
            [noise(H, (taps - 1) * H) * np.float32(0.1), np.eye(H, dtype=np.float32)], axis=1
        )
        params["norm.weight"] = np.asarray(weights.norm, np.float32)
    else:
        # This layer reads and writes what the final norm has scaled: its weights make up for that.
        unit = np.asarray(weights.norm, np.float32)
        unit = np.where(np.abs(unit) < 0.1 * np.median(np.abs(unit)), np.median(unit), unit)
        scale = unit / _residual_size(target, weights)
        for name in ("q_proj", "k_proj", "v_proj"):
            part = last[f"self_attn.{name}.weight"] * last["input_layernorm.weight"]
            params[f"{prefix}.self_attn.{name}.weight"] = part / unit
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            params[f"{prefix}.{name}.weight"] = last[f"{name}.weight"] * scale[:, None]
        after = last["post_attention_layernorm.weight"] / unit * np.median(unit)
        params[f"{prefix}.post_attention_layernorm.weight"] = after
        params["fc.weight"] = np.concatenate([noise(H, H), np.eye(H, dtype=np.float32)], axis=1)
    if head.own_lm_head:
        params["lm_head.weight"] = np.asarray(weights.head[ids], np.float32)
    if head.fc_bias:
        params["fc.bias"] = np.zeros(H, np.float32)
    wanted = head.tensor_shapes()
    assert {name: array.shape for name, array in params.items()} == wanted
    return {name: np.ascontiguousarray(params[name], np.float32) for name in wanted}


def _residual_size(target: LlamaConfig, weights: TargetWeights) -> float:
    """How large the residual entering the last layer is, by its root mean square over some tokens."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, target.vocab_size, (1, 64)), jnp.int32)
    at, sees = jnp.arange(64, dtype=jnp.int32)[None], jnp.tril(jnp.ones((1, 64, 64), bool))
    x, _ = read(target, weights, tokens, at, sees, (target.num_layers - 1,))
    return float(np.median(np.sqrt(np.mean(np.square(np.asarray(x, np.float32)), axis=-1))))


def _last_layer(target: LlamaConfig, weights: TargetWeights) -> dict[str, np.ndarray]:
    """The tensors of the target's last layer under their canonical names, float32; no biases."""
    c = dataclasses.replace(target, num_layers=1)
    packed: dict[str, Any] = jax.tree.map(lambda x: np.asarray(x[-1], np.float32), weights.layers)
    rows = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim]
    q, k, v = np.split(packed["self_attn.qkv_proj.weight"], np.cumsum([rows[0], rows[1]]))
    gate, up = np.split(packed["mlp.gate_up_proj.weight"], 2)
    parts = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}
    parts |= {"mlp.gate_proj": gate, "mlp.up_proj": up}
    whole = ("self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
    return {f"{name}.weight": part for name, part in parts.items()} | {
        f"{name}.weight": packed[f"{name}.weight"] for name in whole
    }
