"""A trained head as files that others read, too: model.safetensors and config.json in the published style."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from specmemo_jax.draft.head_config import HeadConfig
from specmemo_jax.draft.heads import target_ids
from specmemo_jax.files.json_files import write_json
from specmemo_jax.llama.config import LlamaConfig

ARCHITECTURES = {
    "eagle3": "LlamaForCausalLMEagle3",
    "eagle": "LlamaForCausalLMEagle",
    "medusa": "MedusaModel",
}


def write_head(
    folder: Path,
    head: HeadConfig,
    params: Mapping[str, Any],
    ids: np.ndarray,
    *,
    target_name: str,
    target: LlamaConfig,
    training: Mapping[str, Any],
) -> None:
    """Weights in bfloat16, and what they are. ``ids`` ``[Vd]``: the draft vocabulary's target ids.

    ``training``: how it was trained and what it reached, for whoever reads the file.
    """
    tensors = {name: np.asarray(params[name]).astype(ml_dtypes.bfloat16) for name in head.tensor_shapes()}
    if head.draft_vocab_size is not None:
        tensors["d2t"] = ids.astype(np.int64) - np.arange(len(ids))
    write_files(folder, tensors, head_json(head, target_name, target, training))


def write_files(folder: Path, tensors: Mapping[str, np.ndarray], content: Mapping[str, Any]) -> None:
    """``tensors`` by `HeadConfig`'s names, with ``t2d`` ``[V]`` beside ``d2t`` as published, and config.json
    with ``content``; each file in one move.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if "d2t" in tensors:
        marks = np.isin(np.arange(content["vocab_size"]), target_ids(tensors["d2t"]))
        tensors = {**tensors, "t2d": marks}
    temporary = folder / ".model.safetensors"
    save_file(dict(tensors), temporary, {"format": "pt"})
    temporary.chmod(0o644)
    temporary.replace(folder / "model.safetensors")
    write_json(folder / "config.json", dict(content))


def head_json(
    head: HeadConfig, target_name: str, target: LlamaConfig, training: Mapping[str, Any]
) -> dict[str, Any]:
    """What config.json says: the layer as a Llama of one layer, and a block of our own."""
    c = head.layer
    known: dict[str, Any] = {
        "architectures": [ARCHITECTURES[head.kind]],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.ffn_size,
        "num_hidden_layers": 1,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_context,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": _scaling(c),
        "vocab_size": c.vocab_size,
        "draft_vocab_size": head.num_draft_tokens,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bias": head.fc_bias,
        "bos_token_id": target.bos_token_id,
        "eos_token_id": list(target.eos_token_ids),
        "torch_dtype": "bfloat16",
    }
    if head.kind == "medusa":
        known |= {"medusa_num_heads": head.num_heads, "medusa_num_layers": 1}
    known["specmemo"] = {
        "kind": head.kind,
        "taps": list(head.taps),
        "own_lm_head": head.own_lm_head,
        "num_heads": head.num_heads,
        "target": {
            "name": target_name,
            "hidden_size": target.hidden_size,
            "num_layers": target.num_layers,
            "vocab_size": target.vocab_size,
        },
        "training": dict(training),
    }
    return known


def _scaling(config: LlamaConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling.kind == "default":
        return None
    fields = dataclasses.asdict(scaling)
    found = {"rope_type": fields.pop("kind"), **fields}
    found["original_max_position_embeddings"] = found.pop("original_context")
    return {key: value for key, value in found.items() if value is not None}
