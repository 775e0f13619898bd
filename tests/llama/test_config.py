import dataclasses
import json

import pytest

from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.config import LlamaConfig, RopeScaling

RAW = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "eos_token_id": [2, 3],
}


def test_old_and_new_spelling_agree():
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    old = LlamaConfig.from_dict({**RAW, "rope_theta": 5e5, "rope_scaling": llama3})
    new = LlamaConfig.from_dict({**RAW, "rope_parameters": {**llama3, "rope_theta": 5e5}})
    assert old == new
    assert old.rope_theta == 5e5
    assert old.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)


def test_defaults_that_a_config_leaves_out():
    config = LlamaConfig.from_dict(RAW)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 4, 10_000.0)
    assert config.eos_token_ids == (2, 3)
    assert not config.tied_embeddings
    assert "lm_head.weight" in config.tensor_shapes()


def test_dynamic_stops_at_the_original_length():
    scaling = {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 32}
    assert LlamaConfig.from_dict({**RAW, "rope_scaling": scaling}).max_context == 32
    assert (
        LlamaConfig.from_dict({**RAW, "rope_scaling": {"type": "dynamic", "factor": 4.0}}).max_context == 64
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mistral"}, "mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"sliding_window": 512}, "sliding_window=512"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "original_max_position_embeddings"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"num_key_value_heads": 3}, "num_key_value_heads (3)"),
        ({"hidden_size": 18}, "hidden_size (18)"),
        ({"head_dim": 5}, "head_dim"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, named):
    with pytest.raises(ConfigError) as caught:
        LlamaConfig.from_dict({**RAW, **changes})
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '"llama"', "\x00"])
def test_files_that_are_not_configs(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        LlamaConfig.from_json(path)


def test_parameters_of_a_known_model():
    """Llama-2-7B has 6,738,415,616 parameters."""
    raw = {
        **RAW,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    assert LlamaConfig.from_dict(raw).num_params == 6_738_415_616


def test_config_is_frozen_and_reads_back(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(RAW))
    config = LlamaConfig.from_json(path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 1  # type: ignore[misc]
    assert config == LlamaConfig.from_dict(RAW)
