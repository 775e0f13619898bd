"""Tiny checkpoints of both formats, made on the fly."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from safetensors.numpy import save_file

from specmemo_jax.llama.config import LlamaConfig

GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def raw_config(**changes) -> dict:
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    return raw | changes


def random_tensors(config: LlamaConfig, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in config.tensor_shapes().items()}


def write_folder(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    raw: Mapping,
    shards: int = 1,
) -> Path:
    """A Hugging Face folder, with names as transformers writes them."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    named = {
        name if name.startswith("lm_head") else f"model.{name}": array for name, array in tensors.items()
    }
    if shards == 1:
        save_file(named, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(named.items())[shard::shards])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("layers."):
        _, layer, part = stem.split(".", 2)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """What a converter to GGUF does to Q and K: pairs (i, i + D/2) become neighbours."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    config: LlamaConfig,
    types: Callable[[str], Type] = lambda name: Type.F32,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    packed: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A GGUF of float32 ``tensors``; ``packed`` gives raw blocks instead for some of them."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    extra(writer)
    heads = {".q_proj.": config.num_heads, ".k_proj.": config.num_kv_heads}
    for name, array in tensors.items():
        kind = types(name)
        if packed is not None and name in packed:
            writer.add_tensor(gguf_name(name), packed[name], raw_dtype=kind)
            continue
        for part, count in heads.items():
            if part in name:
                array = permute(array, count)
        data = array if kind is Type.F32 else gguf.quants.quantize(array, kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
