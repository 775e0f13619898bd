import json
import struct
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny_checkpoints import random_tensors, raw_config, write_folder

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.checkpoints import open_checkpoint, safetensors_files
from specmemo_jax.errors import CheckpointWarning, ConfigError, SpecMemoError, WeightsError
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.planning.request import named_config

LAYER = "layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_safetensors_round_trip(tmp_path, config, dtype, shards):
    tensors = random_tensors(config, dtype)
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", tensors, raw_config(), shards))
    read = dict(checkpoint.tensors())
    assert checkpoint.config == config
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        assert read[name].dtype == dtype
        np.testing.assert_array_equal(read[name], array)
    assert checkpoint.nbytes == sum(array.nbytes for array in tensors.values())
    assert (
        checkpoint.stored_as
        == {4: "F32", 2: "F16" if dtype == np.float16 else "BF16"}[np.dtype(dtype).itemsize]
    )


def test_float64_comes_as_float32(tmp_path, config):
    checkpoint = open_checkpoint(
        write_folder(tmp_path / "m", random_tensors(config, np.float64), raw_config())
    )
    assert {array.dtype for _, array in checkpoint.tensors()} == {np.dtype(np.float32)}


def test_harmless_extras_are_ignored(tmp_path):
    raw = raw_config(tie_word_embeddings=True)
    config = LlamaConfig.from_dict(raw)
    tensors = random_tensors(config)
    extras = {
        "lm_head.weight": tensors["embed_tokens.weight"],
        "layers.0.self_attn.rotary_emb.inv_freq": np.ones(4),
    }
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", tensors | extras, raw))
    assert {name for name, _ in checkpoint.tensors()} == set(tensors)


def test_names_without_prefix(tmp_path, config):
    tensors = random_tensors(config)
    write_folder(tmp_path / "m", tensors, raw_config())
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    assert {name for name, _ in open_checkpoint(tmp_path / "m").tensors()} == set(tensors)


def test_missing_unexpected_and_misshapen(tmp_path, config):
    tensors = random_tensors(config)
    lost = {name: array for name, array in tensors.items() if name != LAYER}
    with pytest.raises(WeightsError, match=LAYER + r".* missing"):
        open_checkpoint(write_folder(tmp_path / "a", lost, raw_config()))
    with pytest.raises(WeightsError, match=r"nonsense.* not expected"):
        open_checkpoint(write_folder(tmp_path / "b", tensors | {"nonsense": np.ones(3)}, raw_config()))
    with pytest.raises(WeightsError, match=rf"{LAYER}' has shape \[32, 64\], the config asks for \[64, 32\]"):
        open_checkpoint(
            write_folder(tmp_path / "c", tensors | {LAYER: tensors[LAYER].T.copy()}, raw_config())
        )
    with pytest.raises(WeightsError, match="1,000,000,000 layers"):
        open_checkpoint(write_folder(tmp_path / "d", tensors, raw_config(num_hidden_layers=10**9)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(tmp_path, config, dtype, value):
    tensors = random_tensors(config, dtype)
    tensors[LAYER][3, 5] = value
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", tensors, raw_config()))
    with pytest.raises(WeightsError, match=f"{LAYER}' holds NaN or Inf"):
        list(checkpoint.tensors())


def test_integer_weights_are_refused(tmp_path, config):
    tensors = random_tensors(config) | {LAYER: np.ones((64, 32), np.int8)}
    with pytest.raises(WeightsError, match=r"up_proj.weight' is I8"):
        open_checkpoint(write_folder(tmp_path / "m", tensors, raw_config()))


def test_quantised_config_is_refused(tmp_path, config):
    raw = raw_config(quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(WeightsError, match=r"quantised .gptq."):
        open_checkpoint(write_folder(tmp_path / "m", random_tensors(config), raw))


def test_shards(tmp_path, config):
    folder = write_folder(tmp_path / "m", random_tensors(config), raw_config(), shards=2)
    second = folder / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-7])
    with pytest.raises(WeightsError, match=r"00002-of-00002.safetensors is truncated"):
        open_checkpoint(folder)
    second.unlink()
    with pytest.raises(WeightsError, match=r"shard model-00002-of-00002.safetensors is missing"):
        open_checkpoint(folder)
    second.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(WeightsError, match="is not in this shard"):
        open_checkpoint(folder)


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/passwd", "a\\b", 3])
def test_index_cannot_leave_the_folder(tmp_path, config, shard):
    folder = write_folder(tmp_path / "m", random_tensors(config), raw_config(), shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(WeightsError, match="names shard"):
        open_checkpoint(folder)


def test_folders_without_usable_weights(tmp_path):
    with pytest.raises(WeightsError, match="has no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"only pickled weights .*safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        open_checkpoint(tmp_path)
    with pytest.raises(WeightsError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="is not a checkpoint"):
        open_checkpoint(tmp_path / "config.json")


def test_one_tensor_in_memory_at_a_time(tmp_path):
    raw = raw_config(hidden_size=128, intermediate_size=1024, vocab_size=1024, num_hidden_layers=4)
    config = LlamaConfig.from_dict(raw)
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", random_tensors(config), raw))
    largest = max(entry.nbytes for entry in checkpoint.entries)
    assert checkpoint.nbytes > 8 * largest
    tracemalloc.start()
    for _ in checkpoint.tensors():
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # While one is being read the loop still holds the last; the mask of the check is a chunk of 1 MiB.
    assert peak < 2 * largest + (1 << 20) + (1 << 18)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_corrupt_safetensors_never_crash(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "corrupt-safetensors"
    config = LlamaConfig.from_dict(raw_config())
    if not folder.exists():
        write_folder(folder, random_tensors(config), raw_config())
        (folder / "whole").write_bytes((folder / "model.safetensors").read_bytes())
    content = bytearray((folder / "whole").read_bytes())
    (header,) = struct.unpack("<Q", content[:8])
    for at, byte in data.draw(
        st.lists(st.tuples(st.integers(0, header + 7), st.integers(0, 255)), min_size=1)
    ):
        content[at] = byte
    keep = data.draw(st.sampled_from([len(content), 0, 7, header, len(content) - 1]))
    (folder / "model.safetensors").write_bytes(content[:keep])
    try:
        for _ in open_checkpoint(folder).tensors():
            pass
    except SpecMemoError as error:
        assert "\n" not in str(error)  # noqa: PT017


def tied_folder(folder, head, dtype: Any = np.float32, **changes):
    """A config that ties the head, and a file that has one all the same."""
    config = LlamaConfig.from_dict(raw_config())
    tensors = random_tensors(config, dtype)
    tensors["lm_head.weight"] = head(tensors["embed_tokens.weight"])
    return write_folder(folder, tensors, raw_config(tie_word_embeddings=True, **changes)), tensors


def test_open_tied_config_with_another_head_uses_the_file_s(tmp_path):
    folder, tensors = tied_folder(tmp_path / "m", lambda table: table[::-1].copy())
    with pytest.warns(CheckpointWarning, match="lm_head.weight in the file is another table"):
        checkpoint = open_checkpoint(folder)
    assert not checkpoint.config.tied_embeddings
    found = dict(checkpoint.tensors())
    np.testing.assert_array_equal(found["lm_head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize("at", [0, 23, 47])
def test_open_tied_config_one_number_apart_is_another_head(tmp_path, at, monkeypatch):
    monkeypatch.setattr(safetensors_files, "_BLOCK", 1000)  # a few rows at a time

    def other(table):
        table = table.copy()
        table[at, 5] += 1
        return table

    folder, _ = tied_folder(tmp_path / "m", other)
    with pytest.warns(CheckpointWarning):
        assert not open_checkpoint(folder).config.tied_embeddings


@pytest.mark.parametrize(
    "head", [np.copy, lambda table: table.astype(np.float16)], ids=["same", "same, 16 bits"]
)
def test_open_tied_config_with_the_same_head_stays_tied(tmp_path, head):
    folder, _ = tied_folder(tmp_path / "m", head, np.float16)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.tied_embeddings
    assert "lm_head.weight" not in dict(checkpoint.tensors())


def test_llm_tied_config_with_another_head_answers_as_untied_and_is_planned_so(tmp_path):
    folder, tensors = tied_folder(tmp_path / "m", lambda table: table[::-1].copy())
    with pytest.warns(CheckpointWarning):
        tied = LLM(folder, max_context=32, drafter=None)
    untied = LLM(LlamaConfig.from_dict(raw_config()), tensors, max_context=32, drafter=None)
    with tied, untied:
        assert tied.plan.weights_bytes == untied.plan.weights_bytes == tied.target.num_bytes
        params = SamplingParams(temperature=0, max_tokens=12)
        mine, theirs = (llm.generate([[1, 2, 3]], params)[0].outputs[0].token_ids for llm in (tied, untied))
        assert mine == theirs
    with pytest.warns(CheckpointWarning):
        assert not named_config(folder).config.tied_embeddings
