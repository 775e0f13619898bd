import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file
from torch_zip import save_torch
from typer.testing import CliRunner

from specmemo_jax.cli.main import app
from specmemo_jax.draft.head_config import HeadConfig, default_taps, head_layer
from specmemo_jax.draft.head_files import names_head, open_head
from specmemo_jax.llama.config import LlamaConfig

IDS = np.arange(1, 40, 2)


@pytest.fixture
def target(tiny_model) -> LlamaConfig:
    return LlamaConfig.from_json(tiny_model / "config.json")


@pytest.fixture
def source(tiny_model, target, tmp_path):
    """A published EAGLE-3 head of the tiny model, pickled."""
    folder = tmp_path / "source"
    folder.mkdir()
    raw = json.loads((tiny_model / "config.json").read_text())
    raw |= {"num_hidden_layers": 1, "draft_vocab_size": len(IDS), "architectures": ["LlamaForCausalLMEagle3"]}
    (folder / "config.json").write_text(json.dumps(raw))
    taps = default_taps("eagle3", target)
    config = HeadConfig("eagle3", head_layer(target), taps, draft_vocab_size=len(IDS), own_lm_head=True)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape).astype(np.float16) for name, shape in config.tensor_shapes().items()
    }
    tables = {"d2t": IDS - np.arange(len(IDS)), "t2d": np.isin(np.arange(target.vocab_size), IDS)}
    save_torch(folder / "pytorch_model.bin", tensors | tables)
    return folder


def convert(*arguments):
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    return result, re.sub(r"\s+", " ", result.output)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_a_published_head_becomes_one_of_ours(source, target, tiny_model, tmp_path, dtype):
    out = tmp_path / "out"
    options = [] if dtype is None else ["--dtype", dtype]
    result, output = convert(source, "--out", out, "--target", tiny_model, *options)
    assert result.exit_code == 0, output
    assert str(out) in result.stdout.replace("\n", "")
    assert names_head(out)
    published, ours = open_head(source, target), open_head(out, target)
    assert ours.config == published.config
    wanted, found = published.tensors(), ours.tensors()
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        as_written = array if name == "d2t" or dtype is None else array.astype(np.dtype(dtype))
        assert found[name].dtype == as_written.dtype
        np.testing.assert_array_equal(found[name], as_written)
    stored = load_file(out / "model.safetensors")
    np.testing.assert_array_equal(np.flatnonzero(stored["t2d"]), IDS)
    content = json.loads((out / "config.json").read_text())
    assert content["torch_dtype"] == (dtype or "float16")
    assert content["specmemo"]["training"] == {"converted_from": str(source)}


def test_what_is_there_is_not_overwritten(source, tiny_model):
    result, output = convert(source, "--out", source, "--target", tiny_model)
    assert result.exit_code != 0
    assert "holds a config.json already; another folder as --out would work" in output


def test_another_targets_head_is_refused_and_nothing_is_written(source, tmp_path):
    result, output = convert(source, "--out", tmp_path / "out", "--target", "llama-2-7b-chat")
    assert result.exit_code != 0
    assert "the target's 4096" in output
    assert not (tmp_path / "out").exists()
