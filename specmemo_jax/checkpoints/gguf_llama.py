"""Llama checkpoints in GGUF: config from metadata, tensors dequantised and un-permuted."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from specmemo_jax.checkpoints.gguf_header import GgufHeader, GgufTensor
from specmemo_jax.errors import ConfigError, WeightsError
from specmemo_jax.llama.config import LlamaConfig, RopeScaling

ROPE_FACTORS = "rope_freqs.weight"
_ROWS_BYTES = 4 << 20  # float32 bytes dequantised at a time: bounds the temporaries beside one tensor
_GLOBAL_NAMES = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_REFUSED = (
    "expert_count",
    "attention.sliding_window",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
)
_PLAIN_DTYPES = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


def canonical_name(name: str) -> str | None:
    """The canonical name of a GGUF tensor, or None where a Llama has no such tensor."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in _LAYER_NAMES:
        return f"layers.{int(parts[1])}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return None


def undo_permutation(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Q or K rows ``[heads * D, ...]`` from GGUF's interleaved rotary order (pairs 2i, 2i+1)
    to Hugging Face's (pairs i, i + D/2). Works on weights and biases alike."""
    head_dim = rows.shape[0] // num_heads
    pairs = rows.reshape(num_heads, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def read_tensor(header: GgufHeader, tensor: GgufTensor) -> np.ndarray:
    """The tensor's values ``tensor.shape``: F32, F16 and BF16 as they are, quantised types as
    float32. At most the result and a few megabytes are held. Raises WeightsError."""
    try:
        with header.path.open("rb") as file:
            file.seek(tensor.offset)
            plain = _PLAIN_DTYPES.get(tensor.ggml_type)
            if plain is not None:
                flat = np.fromfile(file, dtype=np.uint8, count=tensor.nbytes)
                _require_read(flat.size, tensor)
                return flat.view(plain).reshape(tensor.shape)
            out = np.empty((math.prod(tensor.shape[:-1]), tensor.shape[-1]), np.float32)
            row_bytes = tensor.nbytes // out.shape[0]
            step = max(1, _ROWS_BYTES // (4 * out.shape[1]))
            for start in range(0, out.shape[0], step):
                rows = min(step, out.shape[0] - start)
                packed = np.fromfile(file, dtype=np.uint8, count=rows * row_bytes)
                _require_read(packed.size, tensor, rows * row_bytes)
                # A broken scale can hold NaN or Inf; the caller reports it by name.
                with np.errstate(all="ignore"):
                    out[start : start + rows] = dequantize(packed.reshape(rows, row_bytes), tensor.ggml_type)
            return out.reshape(tensor.shape)
    except OSError as error:
        raise WeightsError(f"cannot read {header.path}: {error.strerror or error}") from error


def _require_read(got: int, tensor: GgufTensor, wanted: int | None = None) -> None:
    wanted = tensor.nbytes if wanted is None else wanted
    if got != wanted:
        raise WeightsError(
            f"tensor {tensor.name!r}: read {got:,} of {wanted:,} bytes; the file changed or is cut"
        )


def gguf_config(header: GgufHeader) -> LlamaConfig:
    """The model's config from the file's metadata.

    Raises ConfigError for another architecture, a missing key, or a feature (experts,
    sliding window, another rope scaling) that this model does not implement.
    """
    try:
        return _config(header)
    except ConfigError as error:
        raise ConfigError(f"{header.path}: {error}") from error


def _config(header: GgufHeader) -> LlamaConfig:
    meta = header.metadata
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"architecture {architecture!r} is not supported; a GGUF of architecture 'llama' would work"
        )
    if _integer(meta, "split.count", 1) > 1:
        raise ConfigError(f"one of {meta['split.count']} split files; merged into one file it would work")
    _refuse_unsupported(meta)
    heads, hidden = _integer(meta, "llama.attention.head_count"), _integer(meta, "llama.embedding_length")
    head_dim = _integer(meta, "llama.attention.key_length", hidden // max(heads, 1))
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if _integer(meta, key, head_dim) != head_dim:
            raise ConfigError(
                f"{key}={meta[key]} with a head of {head_dim} is not supported; equal ones would work"
            )
    theta = _number(meta, "llama.rope.freq_base", 10_000.0)
    ends = (_optional_id(meta, kind) for kind in ("eos", "eot", "eom"))
    return LlamaConfig(
        vocab_size=_vocab_size(header),
        hidden_size=hidden,
        ffn_size=_integer(meta, "llama.feed_forward_length"),
        num_layers=_integer(meta, "llama.block_count"),
        num_heads=heads,
        num_kv_heads=_integer(meta, "llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_context=_integer(meta, "llama.context_length"),
        rms_norm_eps=_number(meta, "llama.attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(header, theta, head_dim),
        tied_embeddings="output.weight" not in header.tensors,
        attention_bias=any(f"blk.0.attn_{x}.bias" in header.tensors for x in ("q", "k", "v", "output")),
        mlp_bias=any(f"blk.0.ffn_{x}.bias" in header.tensors for x in ("gate", "up", "down")),
        bos_token_id=_optional_id(meta, "bos"),
        eos_token_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
    )


def _refuse_unsupported(meta: Mapping[str, Any]) -> None:
    for key in _REFUSED:
        value = meta.get(f"llama.{key}")
        if value not in (None, 0):
            raise ConfigError(f"llama.{key}={value!r} is not supported; a Llama without it would work")


def _vocab_size(header: GgufHeader) -> int:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ConfigError("tensor 'token_embd.weight' is missing")
    return embedding.shape[0]


def _integer(meta: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = meta.get(key, default)
    if isinstance(value, list):  # one entry a layer
        if len(set(value)) != 1:
            raise ConfigError(
                f"{key} differs between layers, which is not supported; equal layers would work"
            )
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{key} must be an integer, found {value!r}")
    return value


def _optional_id(meta: Mapping[str, Any], kind: str) -> int | None:
    key = f"tokenizer.ggml.{kind}_token_id"
    return None if meta.get(key) is None else _integer(meta, key)


def _number(meta: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = meta.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{key} must be a number, found {value!r}")
    # Metadata is float32: its shortest decimal is what the model's authors wrote (1e-05, not 9.99e-06).
    return float(str(np.float32(value)))


def _rope_scaling(header: GgufHeader, theta: float, head_dim: int) -> RopeScaling:
    meta = header.metadata
    kind = meta.get("llama.rope.scaling.type", "none")
    factor = _number(meta, "llama.rope.scaling.factor", _number(meta, "llama.rope.scale_linear", 0.0))
    key = "llama.rope.scaling.original_context_length"
    original = None if meta.get(key) is None else _integer(meta, key)
    if ROPE_FACTORS in header.tensors:
        if kind not in ("none", "llama3"):
            raise ConfigError(f"{ROPE_FACTORS} beside rope scaling {kind!r} is not supported")
        return _llama3_scaling(header, theta, head_dim, original)
    if kind in ("none", "linear"):
        factor = factor or 1.0  # 0 stands for "not given"
        return RopeScaling() if factor == 1.0 else RopeScaling("linear", factor, original_context=original)
    raise ConfigError(
        f"rope scaling {kind!r} is not supported; none, 'linear', or Llama 3's {ROPE_FACTORS} would work"
    )


def _llama3_scaling(header: GgufHeader, theta: float, head_dim: int, original: int | None) -> RopeScaling:
    """GGUF stores Llama 3's scaling as one divisor a frequency. Only its parameters are known to
    the model, so take the published ones and accept them if they give the stored divisors."""
    stored = read_tensor(header, header.tensors[ROPE_FACTORS]).astype(np.float64).ravel()
    if stored.size == head_dim // 2 and np.isfinite(stored).all():
        if (stored == 1.0).all():
            return RopeScaling()
        scaling = RopeScaling("llama3", float(str(np.float32(stored.max()))), 1.0, 4.0, original or 8192)
        expected = llama3_divisors(scaling, theta, head_dim)
        if scaling.factor >= 1.0 and np.allclose(stored, expected, rtol=1e-4):
            return scaling
    raise ConfigError(
        f"{ROPE_FACTORS} does not hold Llama 3's factors (low 1, high 4, context {original or 8192}), "
        "which is the only such scaling supported"
    )


def llama3_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """What each rotary frequency is divided by under Llama 3's scaling, float64 ``[D/2]``."""
    assert scaling.original_context is not None
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling.original_context * frequency / (2 * np.pi)  # full turns within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: untouched, 0: divided by the whole factor
    return 1.0 / ((1.0 - kept) / scaling.factor + kept)


@dataclasses.dataclass(frozen=True)
class GgufTensorReader:
    """Reads one canonical tensor of a GGUF Llama when called."""

    header: GgufHeader
    tensor: GgufTensor
    heads_to_unpermute: int | None = None

    def __call__(self) -> np.ndarray:
        """The tensor's values. Raises WeightsError."""
        values = read_tensor(self.header, self.tensor)
        if self.heads_to_unpermute is not None:
            values = undo_permutation(values, self.heads_to_unpermute)
        return values
