import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from specmemo_jax.testing import TINY
from specmemo_jax.train import start
from specmemo_jax.train.export import write_head


@pytest.mark.parametrize("kind", ["eagle3", "eagle", "medusa"])
def test_a_head_reads_back(kind, tmp_path):
    head = start.head_config(kind, TINY, draft_vocab=3, heads=2)
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(s).astype(np.float32) for name, s in head.tensor_shapes().items()}
    ids = np.array([1, 5, 90], np.int32)
    training = {"seed": 3, "acceptance": [0.5]}
    write_head(tmp_path, head, params, ids, target_name="tiny", target=TINY, training=training)
    found = load_file(tmp_path / "model.safetensors")
    assert found.pop("d2t").tolist() == [1, 4, 88]
    t2d = found.pop("t2d")
    assert t2d.dtype == bool
    assert np.flatnonzero(t2d).tolist() == [1, 5, 90]
    assert {name: array.shape for name, array in found.items()} == head.tensor_shapes()
    for name, array in found.items():
        assert array.dtype.name == "bfloat16"
        np.testing.assert_allclose(array.astype(np.float32), params[name], rtol=0.01)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["draft_vocab_size"] == 3
    assert config["vocab_size"] == TINY.vocab_size
    assert config["specmemo"]["taps"] == list(head.taps)
    assert config["specmemo"]["training"] == training
    if kind == "eagle3":
        assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    if kind == "medusa":
        assert config["medusa_num_heads"] == 2


def test_a_whole_vocabulary_has_no_table(tmp_path):
    head = start.head_config("eagle", TINY, draft_vocab=None)
    params = {name: np.zeros(shape, np.float32) for name, shape in head.tensor_shapes().items()}
    write_head(tmp_path, head, params, np.arange(97), target_name="tiny", target=TINY, training={})
    assert set(load_file(tmp_path / "model.safetensors")) == set(params)
