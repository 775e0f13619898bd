"""What a Llama checkpoint says of itself, checked and in one spelling.

Reads Hugging Face ``config.json`` files, old (``rope_theta`` / ``rope_scaling``)
and new (``rope_parameters``) alike, as plain JSON. Whatever a config carries
that changes the computation and is not implemented here is refused by name.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from specmemo_jax.errors import ConfigError

RopeType = Literal["default", "linear", "llama3", "dynamic"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for long contexts.

    ``linear`` divides every frequency by ``factor``. ``llama3`` divides the low
    ones and blends in between (Llama 3.1). ``dynamic`` leaves them alone up to
    ``original_context``; beyond it they would depend on the current length, which
    the nodes of a tree do not share, so the context stops there.
    """

    kind: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int | None = None


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Static description of a Llama. L layers, H hidden, N query heads, K KV heads,
    D head dim, F ffn, V vocabulary (the legend in docs/architecture.md)."""

    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    tied_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[:8]:
            _size(field.name, getattr(self, field.name))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embeddings, found {self.head_dim}")
        for field in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{field} must be a positive number, found {value!r}")

    @property
    def num_params(self) -> int:
        """Weights of all tensors together."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical tensors of this model: Hugging Face names without the ``model.``
        prefix, linear weights ``[out, in]``; ``lm_head.weight`` is absent when tied."""
        H, F, D = self.hidden_size, self.ffn_size, self.head_dim
        N, K, V = self.num_heads, self.num_kv_heads, self.vocab_size
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (V, H)}
        for i in range(self.num_layers):
            layer = f"layers.{i}"
            shapes[f"{layer}.input_layernorm.weight"] = (H,)
            linears = {"q_proj": (N * D, H), "k_proj": (K * D, H), "v_proj": (K * D, H), "o_proj": (H, N * D)}
            for name, shape in linears.items():
                shapes[f"{layer}.self_attn.{name}.weight"] = shape
                if self.attention_bias:
                    shapes[f"{layer}.self_attn.{name}.bias"] = shape[:1]
            shapes[f"{layer}.post_attention_layernorm.weight"] = (H,)
            for name, shape in {"gate_proj": (F, H), "up_proj": (F, H), "down_proj": (H, F)}.items():
                shapes[f"{layer}.mlp.{name}.weight"] = shape
                if self.mlp_bias:
                    shapes[f"{layer}.mlp.{name}.bias"] = shape[:1]
        shapes["norm.weight"] = (H,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (V, H)
        return shapes

    @classmethod
    def from_json(cls, path: str | Path) -> "LlamaConfig":
        """Read ``config.json``. Raises ConfigError naming the file and the field."""
        path = Path(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        try:
            return cls.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, raw: Any) -> "LlamaConfig":
        """Accept a Hugging Face Llama config in its old or new spelling.

        Raises ConfigError for another architecture, a missing field, or a feature
        that this model does not implement.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(f"expected a JSON object, found {type(raw).__name__}")
        _refuse_unsupported(raw)

        def need(key: str) -> int:
            if raw.get(key) is None:
                raise ConfigError(f"missing field {key!r}")
            return _size(key, raw[key])

        def given(key: str, default: int) -> int:
            return default if raw.get(key) is None else need(key)

        heads, hidden = need("num_attention_heads"), need("hidden_size")
        head_dim = raw.get("head_dim")
        if head_dim is None:
            if hidden % heads:
                raise ConfigError(
                    f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}) "
                    "when head_dim is not given"
                )
            head_dim = hidden // heads
        bos = token_ids(raw.get("bos_token_id"), "bos_token_id")
        theta, scaling = _rope(raw)
        max_context = given("max_position_embeddings", 2048)
        if scaling.kind == "dynamic":
            max_context = scaling.original_context or max_context
        eos = raw.get("eos_token_id")
        return cls(
            vocab_size=need("vocab_size"),
            hidden_size=hidden,
            ffn_size=need("intermediate_size"),
            num_layers=need("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=given("num_key_value_heads", heads),
            head_dim=_size("head_dim", head_dim),
            max_context=max_context,
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=token_ids(eos, "eos_token_id"),
        )


def _size(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, found {value!r}")
    return value


def token_ids(value: Any, field: str) -> tuple[int, ...]:
    """An id, a list of ids or None, as a tuple."""
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ConfigError(f"{field} must be an id or a list of ids, found {value!r}")
    return ids


def _number(raw: Mapping[str, Any], key: str, default: float) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{key} must be a number, found {value!r}")
    return float(value)


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    model_type = raw.get("model_type", "llama")
    architectures = raw.get("architectures") or ["LlamaForCausalLM"]
    if model_type != "llama" or "LlamaForCausalLM" not in architectures:
        raise ConfigError(
            f"architecture {architectures} (model_type {model_type!r}) is not supported: "
            "this engine runs LlamaForCausalLM (Llama 1, 2, 3, 3.1, 3.2 and models of that shape)"
        )
    refused = {
        "hidden_act": ("silu", "swish", None),
        "pretraining_tp": (1, None),
        "sliding_window": (None,),
        "quantization_config": (None,),
        "partial_rotary_factor": (1, 1.0, None),
        "attention_multiplier": (None,),
        "residual_multiplier": (None,),
        "logit_scale": (None,),
        "auto_map": (None,),
    }
    for key, allowed in refused.items():
        if raw.get(key) not in allowed:
            works = " or ".join(repr(a) for a in allowed if a is not None) or "leaving it out"
            raise ConfigError(f"{key}={raw[key]!r} is not supported; {works} would work")


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling]:
    """Rope base and scaling: ``rope_parameters`` (transformers 5), or ``rope_theta`` + ``rope_scaling``."""
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    fields = new if new is not None else old if old is not None else {}
    if not isinstance(fields, Mapping):
        raise ConfigError(f"rope_parameters / rope_scaling must be an object, found {fields!r}")
    theta = _number(fields, "rope_theta", _number(raw, "rope_theta", 10_000.0))
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "dynamic"):
        raise ConfigError(
            f"rope type {kind!r} is not supported; 'default', 'linear', 'llama3' and 'dynamic' are"
        )
    if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ConfigError(f"partial_rotary_factor={fields['partial_rotary_factor']!r} is not supported")
    if kind == "default":
        return theta, RopeScaling()
    factor = _number(fields, "factor", math.nan)
    if not factor >= 1.0:
        raise ConfigError(f"rope type {kind!r} needs a factor of at least 1, found {fields.get('factor')!r}")
    original = fields.get("original_max_position_embeddings")
    if kind == "dynamic":
        original = original or raw.get("max_position_embeddings", 2048)
    scaling = RopeScaling(kind=kind, factor=factor, original_context=original)
    if kind == "llama3":
        if not isinstance(original, int) or original < 1:
            raise ConfigError(
                f"rope type 'llama3' needs original_max_position_embeddings, found {original!r}"
            )
        low, high = _number(fields, "low_freq_factor", 1.0), _number(fields, "high_freq_factor", 4.0)
        if not 0 < low < high:
            raise ConfigError(
                f"rope type 'llama3' needs 0 < low_freq_factor < high_freq_factor, found {low}, {high}"
            )
        scaling = dataclasses.replace(scaling, low_freq_factor=low, high_freq_factor=high)
    return theta, scaling
