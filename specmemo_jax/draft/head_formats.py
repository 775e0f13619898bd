"""The published formats of draft heads: from a config.json and tensors' names to `HeadConfig` and its names.

- Ours: a block ``specmemo`` in the config says all; tensors as `HeadConfig` names them.
- SafeAILab, SpecForge: a Llama's config of one layer. EAGLE-3 has ``midlayer.*`` (also ``layers.0.*``),
  ``d2t`` and ``t2d``; ``eagle_config`` may list layers by their outputs, one less than what enters the next.
- vLLM's EAGLE-1: ``model_type: eagle`` around a nested ``model`` config; ``token_map`` lists its vocabulary.
- speculators: ``speculators_model_type`` and a nested ``transformer_layer_config``; EAGLE-1 has ``fusion_fc``
  and ``transformer.*``; layers are listed by what enters them.
- Medusa: residual blocks and rows by depth; heads are counted in the file, whatever the config says.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from specmemo_jax.draft.head_config import KINDS, HeadConfig, HeadKind, default_taps, head_layer
from specmemo_jax.errors import ConfigError, WeightsError
from specmemo_jax.llama.config import LlamaConfig

_ARCHITECTURES = {
    "LlamaForCausalLMEagle3": "eagle3",
    "Eagle3LlamaForCausalLM": "eagle3",
    "Eagle3Speculator": "eagle3",
    "Eagle3DraftModel": "eagle3",
    "LlamaForCausalLMEagle": "eagle",
    "EagleLlamaForCausalLM": "eagle",
    "EAGLEModel": "eagle",
    "EagleSpeculator": "eagle",
    "MedusaModel": "medusa",
}
# What a config may ask for and HeadConfig cannot say, with the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "norm_before_residual": (False, None),
    "norm_before_fc": (False, None),
    "fc_norm": (False, None),
    "norm_output": (False, None),
    "embed_requires_grad": (False, None),
    "layernorms": (False, None),
    "add_para_norm": (False, None),
    "medusa_num_layers": (1, None),
    "quantization_config": (None,),
}
# The target's own tables, and what is computed here.
_SHARED = ("embed_tokens.weight",)
_DROPPED = re.compile(r"(.*\.)?rotary_emb\.inv_freq|verifier_lm_head\.weight|verifier_norm\.weight")
_BLOCK = re.compile(r"(\d+)\.0\.linear\.weight")
_WORKS = "a head trained for this target would work"


@dataclasses.dataclass(frozen=True)
class FoundTensor:
    """A tensor of a head's file: its name there, shape, type (safetensors' word) and how to read it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A head's config and its file's tensors by `HeadConfig`'s names, with ``d2t`` and ``t2d`` where it has
    them; ``shared``: copies of the target's own, which are not read.
    """

    config: HeadConfig
    tensors: dict[str, FoundTensor]
    shared: dict[str, FoundTensor]


def config_names_head(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json says by itself that it is a draft head's."""
    marks = ("specmemo", "speculators_model_type", "medusa_num_heads", "draft_vocab_size")
    return (
        any(raw.get(mark) is not None for mark in marks)
        or raw.get("model_type") in KINDS
        or any(name in _ARCHITECTURES for name in _architectures(raw))
    )


def names_of_head(names: Iterable[str]) -> bool:
    """Whether these are a head's tensors."""
    return any(_plain(name) in ("fc.weight", "fusion_fc.weight") or _BLOCK.fullmatch(name) for name in names)


def head_layout(raw: Mapping[str, Any], found: Mapping[str, FoundTensor], target: LlamaConfig) -> Layout:
    """Recognise the format. Raises ConfigError for what is not supported or another target's, WeightsError
    for tensors that no head has. With nothing ``found`` all is by the config, which must be ours.
    """
    ours = raw.get("specmemo")
    if not found and not isinstance(ours, Mapping):
        raise WeightsError("it has no weights; the head's own file beside its config.json would work")
    kind = _kind(raw, found)
    for field, harmless in _REFUSED.items():
        if raw.get(field) not in harmless:
            works = next((f"with {field}={value}" for value in harmless if value is not None), "without it")
            raise ConfigError(f"{field}={raw[field]!r} is not supported; a head {works} would work")
    tensors, shared = _by_canonical_name(kind, found)
    layer = head_layer(target) if kind == "medusa" else _layer(raw, target)
    if isinstance(ours, Mapping):
        config = _our_config(kind, raw, ours, layer, tensors, target, bool(found))
    else:
        config = _published_config(kind, raw, layer, tensors, target)
    known = {*config.tensor_shapes(), "d2t", "t2d"}
    strange = [tensor.name for name, tensor in tensors.items() if name not in known]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise WeightsError(f"tensor {strange[0]!r}{more} is not one of a head of kind {kind}; {_WORKS}")
    return Layout(config, tensors, shared)


def _kind(raw: Mapping[str, Any], found: Iterable[str]) -> HeadKind:
    names = {_plain(name) for name in found}
    ours, speculators = raw.get("specmemo"), raw.get("speculators_model_type")
    said: Any = None
    if isinstance(ours, Mapping):
        said = ours.get("kind")
    elif speculators is not None:
        said = speculators
    elif raw.get("medusa_num_heads") is not None or any(_BLOCK.fullmatch(name) for name in names):
        said = "medusa"
    elif any(name.startswith("midlayer.") or name.endswith(".hidden_norm.weight") for name in names):
        said = "eagle3"  # before the config, which may call it a LlamaForCausalLM
    elif raw.get("model_type") in KINDS:
        said = raw["model_type"]
    else:
        said = next((_ARCHITECTURES[name] for name in _architectures(raw) if name in _ARCHITECTURES), None)
        if said is None:
            said = "eagle" if {"fc.weight", "fusion_fc.weight"} & names else None
    if said is None:
        raise WeightsError(
            f"neither its config nor its tensors are a draft head's; {', '.join(KINDS)} would work"
        )
    if said not in KINDS:
        raise ConfigError(f"a head of kind {said!r} is not supported; {', '.join(KINDS)} would work")
    return said


def _architectures(raw: Mapping[str, Any]) -> list[str]:
    found = raw.get("architectures")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _plain(name: str) -> str:
    return name.removeprefix("model.")


def _by_canonical_name(
    kind: HeadKind, found: Mapping[str, FoundTensor]
) -> tuple[dict[str, FoundTensor], dict[str, FoundTensor]]:
    tensors: dict[str, FoundTensor] = {}
    shared: dict[str, FoundTensor] = {}
    for tensor in found.values():
        name = _canonical(kind, tensor.name)
        if _DROPPED.fullmatch(name):
            continue
        place = shared if name in _SHARED else tensors
        if name in place:
            raise WeightsError(
                f"tensor {name!r} is there twice, as {place[name].name!r} and {tensor.name!r}; "
                "one of them would work"
            )
        place[name] = tensor
    if "token_map" in tensors:
        tensors["d2t"] = _as_distances(tensors.pop("token_map"))
    return tensors, shared


def _canonical(kind: HeadKind, name: str) -> str:
    name = _plain(name)
    if kind == "medusa":
        return name
    if name.startswith("fusion_fc."):
        return name.removeprefix("fusion_")
    if kind == "eagle3":
        return re.sub(r"^layers\.0\.", "midlayer.", name)
    return re.sub(r"^transformer\.", "layers.0.", name)


def _as_distances(ids: FoundTensor) -> FoundTensor:
    """A list of the target's ids as their distances from the draft's."""

    def read() -> np.ndarray:
        values = ids.read().astype(np.int64)
        return values - np.arange(len(values))

    return dataclasses.replace(ids, read=read)


def _layer(raw: Mapping[str, Any], target: LlamaConfig) -> LlamaConfig:
    """The decoder layer; what it shares with the target is the target's."""
    nested = next((raw[key] for key in ("transformer_layer_config", "model") if key in raw), None)
    fields = dict(raw)
    if isinstance(nested, Mapping):
        # vLLM lets what stands outside win; speculators has nothing of a layer there.
        outside = raw if "model" in raw else {}
        fields = {key: outside.get(key, value) for key, value in nested.items()}
    elif nested is not None:
        raise ConfigError(f"the nested config must be an object, found {nested!r:.40}")
    if fields.get("model_type", "llama") not in ("llama", *KINDS):
        raise ConfigError(
            f"a layer of model_type {fields['model_type']!r} is not supported; llama would work"
        )
    fields |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "auto_map": None}
    try:
        layer = LlamaConfig.from_dict(fields)
    except ConfigError as error:
        own = "" if "would work" in str(error) else "; the head's own config.json would work"
        raise ConfigError(f"{error}{own}") from error
    _same("hidden size", layer.hidden_size, target.hidden_size)
    given = raw.get("target_hidden_size")
    _same("target_hidden_size", target.hidden_size if given is None else given, target.hidden_size)
    _same("vocabulary", layer.vocab_size, target.vocab_size)
    if layer.num_layers != 1:
        raise ConfigError(f"it has {layer.num_layers} layers, which is not supported; one layer would work")
    for field in ("attention_bias", "mlp_bias"):
        if getattr(layer, field):
            raise ConfigError(f"{field}=True is not supported in a head; a head without would work")
    return dataclasses.replace(
        layer,
        tied_embeddings=target.tied_embeddings,
        bos_token_id=target.bos_token_id,
        eos_token_ids=target.eos_token_ids,
    )


def _same(what: str, found: Any, wanted: int) -> None:
    if found != wanted:
        raise ConfigError(f"its {what} is {found}, the target's {wanted}; {_WORKS}")


def _our_config(
    kind: HeadKind,
    raw: Mapping[str, Any],
    ours: Mapping[str, Any],
    layer: LlamaConfig,
    tensors: Mapping[str, FoundTensor],
    target: LlamaConfig,
    with_weights: bool,
) -> HeadConfig:
    block = ours.get("target")
    said: Mapping[str, Any] = block if isinstance(block, Mapping) else {}
    for field in ("hidden_size", "num_layers", "vocab_size"):
        wanted = getattr(target, field)
        if said.get(field, wanted) != wanted:
            raise ConfigError(
                f"it was trained for {said.get('name', 'a target')} with {field} {said[field]}, "
                f"this target has {wanted}; {_WORKS}"
            )
    size = _draft_vocabulary(raw, tensors, target, with_weights)
    heads = ours.get("num_heads", 0) if kind == "medusa" else 0
    if not isinstance(heads, int) or isinstance(heads, bool):
        raise ConfigError(f"specmemo.num_heads must be an integer, found {heads!r}")
    return HeadConfig(
        kind,
        layer,
        _taps(kind, ours.get("taps"), target, "specmemo.taps"),
        draft_vocab_size=size,
        own_lm_head=bool(ours.get("own_lm_head", False)),
        fc_bias="fc.bias" in tensors if with_weights else bool(raw.get("bias", False)),
        num_heads=heads,
    )


def _published_config(
    kind: HeadKind,
    raw: Mapping[str, Any],
    layer: LlamaConfig,
    tensors: Mapping[str, FoundTensor],
    target: LlamaConfig,
) -> HeadConfig:
    if kind == "medusa":
        depths = {int(match[1]) for match in map(_BLOCK.fullmatch, tensors) if match}
        if any(re.fullmatch(r"\d+\.1\.linear\.weight", name) for name in tensors):
            raise ConfigError("its blocks have more than one layer; medusa_num_layers of 1 would work")
        if depths != set(range(len(depths))) or not depths:
            raise WeightsError(f"its heads are {sorted(depths)}; 0, 1, 2 ... with none left out would work")
        own = any(re.fullmatch(r"\d+\.1\.weight", name) for name in tensors)
        return HeadConfig(kind, layer, default_taps(kind, target), own_lm_head=own, num_heads=len(depths))
    return HeadConfig(
        kind,
        layer,
        _published_taps(kind, raw, target),
        draft_vocab_size=_draft_vocabulary(raw, tensors, target, True),
        own_lm_head=kind == "eagle3" or "lm_head.weight" in tensors,
        fc_bias="fc.bias" in tensors,
    )


def _published_taps(kind: HeadKind, raw: Mapping[str, Any], target: LlamaConfig) -> tuple[int, ...]:
    key = "eagle_aux_hidden_state_layer_ids"
    if kind != "eagle3":
        return default_taps(kind, target)
    inner = raw.get("eagle_config")
    inner = inner if isinstance(inner, Mapping) else {}
    if inner.get("use_aux_hidden_state", True) is False:
        raise ConfigError("use_aux_hidden_state=False is not supported; a head over three states would work")
    given = raw.get(key)
    if given is None and inner.get(key) is None:
        return default_taps(kind, target)
    taps = _taps(kind, given if given is not None else inner[key], target, key)
    if given is None:  # outputs of layers, as SGLang reads them: each enters the layer after
        taps = tuple(tap + 1 for tap in taps)
    if max(taps) >= target.num_layers:
        raise ConfigError(
            f"it reads the last layer's output {list(taps)} before the final norm, which is not supported; "
            f"layers below {target.num_layers} would work"
        )
    return taps


def _taps(kind: HeadKind, given: Any, target: LlamaConfig, field: str) -> tuple[int, ...]:
    if given is None:
        return default_taps(kind, target)
    good = isinstance(given, list) and all(
        isinstance(tap, int) and not isinstance(tap, bool) for tap in given
    )
    if not good or not given or not all(0 <= tap <= target.num_layers for tap in given):
        raise ConfigError(
            f"{field} is {given!r}, the target has layers 0 to {target.num_layers - 1}; {_WORKS}"
        )
    return tuple(given)


def _draft_vocabulary(
    raw: Mapping[str, Any], tensors: Mapping[str, FoundTensor], target: LlamaConfig, with_weights: bool
) -> int | None:
    """How many tokens it can propose, None for all."""
    said = next(
        (raw[key] for key in ("draft_vocab_size", "truncated_vocab_size") if raw.get(key) is not None), None
    )
    if said is not None and (not isinstance(said, int) or isinstance(said, bool) or said < 1):
        raise ConfigError(f"draft_vocab_size is {said!r}; a positive integer would work")
    table = tensors.get("d2t")
    if table is not None:
        size = table.shape[0] if len(table.shape) == 1 else 0
        if size < 1 or said not in (None, size):
            raise WeightsError(
                f"tensor {table.name!r} has shape {list(table.shape)}, "
                f"the config's draft vocabulary is {said}; a file and a config that agree would work"
            )
        said = size
    elif with_weights and ("t2d" in tensors or said not in (None, target.vocab_size)):
        size = "a part of the target's" if said is None else f"{said}"
        raise WeightsError(f"its draft vocabulary has {size} tokens, but d2t is missing; {_WORKS}")
    return None if said == target.vocab_size else said
