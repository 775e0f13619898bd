import json

import pytest
from tiny_checkpoints import raw_config

from specmemo_jax.checkpoints import GenerationDefaults, generation_defaults, zoo_entry
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.config import LlamaConfig

CONFIG = LlamaConfig.from_dict(raw_config(eos_token_id=7))


def test_without_a_file_the_config_tells(tmp_path):
    assert generation_defaults(tmp_path, CONFIG) == GenerationDefaults((7,))
    assert generation_defaults(None, CONFIG) == GenerationDefaults((7,))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, GenerationDefaults((7,))),
        ({"eos_token_id": 3}, GenerationDefaults((3,))),
        (
            {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50},
            GenerationDefaults((1, 2), 0.6, 0.9, 50),
        ),
        ({"do_sample": False, "temperature": 0.6}, GenerationDefaults((7,), temperature=0.0)),
    ],
)
def test_from_the_file(tmp_path, raw, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    assert generation_defaults(tmp_path, CONFIG) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"cannot read .*generation_config\.json"),
        ("[]", "JSON object"),
        ('{"eos_token_id": "x"}', "eos_token_id"),
        ('{"temperature": -1}', "temperature must be a positive number, found -1"),
        ('{"top_p": 1.5}', "top_p"),
        ('{"top_k": 2.5}', "top_k"),
    ],
)
def test_malformed_files_are_named(tmp_path, text, message):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        generation_defaults(tmp_path, CONFIG)


def test_default_model_stops_at_both_end_tokens():
    entry = zoo_entry("smollm2-135m-instruct")
    assert entry is not None
    assert generation_defaults(entry.folder, entry.config).eos_token_ids == (2, 0)
