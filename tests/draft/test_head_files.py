import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import save_file
from tiny_checkpoints import random_tensors, raw_config, write_folder
from torch_zip import BF16, save_torch

from specmemo_jax.checkpoints import zoo
from specmemo_jax.draft.head_config import HeadConfig, default_taps, head_layer
from specmemo_jax.draft.head_files import names_head, open_head
from specmemo_jax.errors import ConfigError, DownloadError, ModelNotFoundError, WeightsError
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.train.export import write_head

TARGET = LlamaConfig.from_dict(raw_config(num_hidden_layers=8))
V, H = TARGET.vocab_size, TARGET.hidden_size
IDS = np.arange(0, V, 3)  # a draft vocabulary
Vd = len(IDS)
LAYER = raw_config(num_hidden_layers=1, model_type="llama", rms_norm_eps=1e-6)
EAGLE3 = {**LAYER, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": Vd}
TAPS = (2, 4, 5)


def head(kind, **changes) -> HeadConfig:
    return HeadConfig(kind, head_layer(TARGET), default_taps(kind, TARGET), **changes)


def weights(config: HeadConfig, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in config.tensor_shapes().items()}


DEEP = weights(head("eagle3", draft_vocab_size=Vd, own_lm_head=True), BF16)
TABLES = {"d2t": IDS - np.arange(Vd), "t2d": np.isin(np.arange(V), IDS)}
FIRST = weights(head("eagle", fc_bias=True))
BLOCKS = weights(head("medusa", own_lm_head=True, num_heads=3), BF16)
# Targets and billions of parameters, the embedding not counted.
HEADS = {
    "eagle-llama2-chat-7b": ("llama-2-7b-chat", 0.24),
    "eagle-llama2-chat-13b": ("llama-2-13b-chat", 0.37),
    "eagle-llama2-chat-70b": ("llama-2-70b-chat", 0.99),
    "eagle-vicuna-7b-v1.3": ("vicuna-7b-v1.3", 0.24),
    "eagle3-llama3.1-instruct-8b": ("llama-3.1-8b-instruct", 0.42),
}
SHARED = {"embed_tokens.weight": np.zeros((V, H), np.float32)}


def published(folder: Path, raw: dict, tensors: dict, file="model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    (save_file if file.endswith(".safetensors") else lambda found, path: save_torch(path, found))(
        tensors, folder / file
    )
    return folder


def renamed(tensors: dict, **parts: str) -> dict:
    for old, new in parts.items():
        tensors = {name.replace(f"{old}.", new, 1): array for name, array in tensors.items()}
    return tensors


def same(found: dict, wanted: dict):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    "config",
    [
        head("eagle3", draft_vocab_size=Vd, own_lm_head=True),
        head("eagle3", draft_vocab_size=Vd),
        head("eagle3", own_lm_head=True, fc_bias=True),
        dataclasses.replace(head("eagle3"), taps=(1, 8)),
        head("eagle", fc_bias=True),
        head("eagle", draft_vocab_size=Vd),
        head("medusa", num_heads=3),
        head("medusa", num_heads=2, own_lm_head=True, draft_vocab_size=Vd),
    ],
)
def test_ours_round_trip(tmp_path, config):
    params = weights(config, BF16)
    write_head(tmp_path / "h", config, params, IDS, target_name="t", target=TARGET, training={})
    assert names_head(tmp_path / "h")
    opened = open_head(tmp_path / "h", TARGET)
    assert opened.config == config
    assert opened.name == str(tmp_path / "h")
    tables = {"d2t": TABLES["d2t"]} if config.draft_vocab_size else {}
    same(opened.tensors(), params | tables)


def test_ours_keeps_the_layers_rotary_settings(tmp_path):
    scaled = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
    target = LlamaConfig.from_dict(raw_config(rope_scaling=scaled, rope_theta=5e5))
    config = HeadConfig("eagle", head_layer(target), (2,))
    write_head(tmp_path, config, weights(config), IDS, target_name="t", target=target, training={})
    assert open_head(tmp_path, target).config == config


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("raw", "prefix"),
    [
        (EAGLE3, "midlayer."),
        (EAGLE3, "layers.0."),
        ({**EAGLE3, "architectures": ["LlamaForCausalLM"]}, "midlayer."),
    ],
)
def test_eagle3_of_safeailab_and_specforge(tmp_path, file, raw, prefix):
    folder = published(tmp_path / "h", raw, renamed(DEEP, midlayer=prefix) | TABLES | SHARED, file)
    assert names_head(folder)
    opened = open_head(str(folder), TARGET)
    assert opened.config.kind == "eagle3"
    assert opened.config.taps == TAPS
    assert opened.config.draft_vocab_size == Vd
    assert opened.config.own_lm_head
    assert opened.config.layer.rms_norm_eps == 1e-6
    same(opened.tensors(), DEEP | {"d2t": TABLES["d2t"]})


def test_eagle3_over_the_whole_vocabulary(tmp_path):
    whole = weights(head("eagle3", own_lm_head=True))
    for name, tables in {
        "none": {},
        "both": {"d2t": np.zeros(V, np.int64), "t2d": np.ones(V, bool)},
    }.items():
        folder = published(tmp_path / name, EAGLE3 | {"draft_vocab_size": V}, whole | tables)
        opened = open_head(folder, TARGET)
        assert opened.config.draft_vocab_size is None
        same(opened.tensors(), whole)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("bias", [True, False])
def test_eagle_1_whose_config_looks_like_a_llamas(tmp_path, file, bias):
    tensors = {name: array for name, array in FIRST.items() if bias or name != "fc.bias"}
    folder = published(tmp_path / "h", LAYER, tensors | SHARED, file)
    assert names_head(folder)
    opened = open_head(folder, TARGET)
    assert opened.config.kind == "eagle"
    assert opened.config.taps == (TARGET.num_layers,)
    assert (opened.config.fc_bias, opened.config.own_lm_head) == (bias, False)
    same(opened.tensors(), tensors)


def test_eagle_1_of_vllm(tmp_path):
    tensors = {f"model.{name}": array for name, array in FIRST.items() if name != "fc.bias"}
    rows = {"lm_head.weight": np.ones((V, H), np.float32)}
    inv = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    raw = {"model_type": "eagle", "architectures": ["EAGLEModel"], "model": LAYER, "truncated_vocab_size": V}
    folder = published(tmp_path / "h", raw, tensors | rows | inv)
    assert names_head(folder)
    opened = open_head(folder, TARGET)
    assert (opened.config.kind, opened.config.own_lm_head) == ("eagle", True)
    same(opened.tensors(), {name: array for name, array in FIRST.items() if name != "fc.bias"} | rows)


def test_eagle_1_of_vllm_with_a_part_of_the_vocabulary(tmp_path):
    raw = {"model_type": "eagle", "model": LAYER, "truncated_vocab_size": Vd}
    folder = published(tmp_path / "h", raw, FIRST | {"token_map": IDS})
    opened = open_head(folder, TARGET)
    assert opened.config.draft_vocab_size == Vd
    same(opened.tensors(), FIRST | {"d2t": TABLES["d2t"]})


def speculators(kind: str, **fields) -> dict:
    return {
        "speculators_model_type": kind,
        "architectures": [f"{kind.capitalize()}Speculator"],
        "auto_map": {"": "config.SpeculatorModelConfig"},
        "transformer_layer_config": LAYER,
        "speculators_config": {"algorithm": kind, "verifier": {"name_or_path": "org/target"}},
        **fields,
    }


def test_eagle3_of_speculators(tmp_path):
    raw = speculators(
        "eagle3", draft_vocab_size=Vd, norm_before_residual=False, eagle_aux_hidden_state_layer_ids=[1, 3, 6]
    )
    folder = published(tmp_path / "h", raw, renamed(DEEP, midlayer="layers.0.") | TABLES | SHARED)
    assert names_head(folder)
    opened = open_head(folder, TARGET)
    assert opened.config.taps == (1, 3, 6)
    same(opened.tensors(), DEEP | {"d2t": TABLES["d2t"]})


def test_eagle_of_speculators(tmp_path):
    raw = speculators("eagle", fusion_bias=True, layernorms=False)
    tensors = renamed(FIRST, fc="fusion_fc.", **{"layers.0": "transformer."})
    opened = open_head(published(tmp_path / "h", raw, tensors), TARGET)
    assert opened.config.kind == "eagle"
    same(opened.tensors(), FIRST)


def test_layers_by_their_outputs_are_those_that_enter_the_next(tmp_path):
    inner = {"eagle_aux_hidden_state_layer_ids": [0, 2, 5], "use_aux_hidden_state": True}
    folder = published(tmp_path / "h", EAGLE3 | {"eagle_config": inner}, DEEP | TABLES)
    assert open_head(folder, TARGET).config.taps == (1, 3, 6)


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_medusas_heads_are_counted_in_the_file(tmp_path, file):
    raw = {"base_model_name_or_path": "lmsys/vicuna", "medusa_num_heads": 2, "medusa_num_layers": 1}
    folder = published(tmp_path / "h", raw, BLOCKS, file)
    assert names_head(folder)
    opened = open_head(folder, TARGET)
    assert (opened.config.num_heads, opened.config.own_lm_head) == (3, True)
    assert opened.config.layer == head_layer(TARGET)
    same(opened.tensors(), BLOCKS)


OTHER = {
    "hidden size": ({"hidden_size": 64}, {}, "its hidden size is 64, the target's 32"),
    "vocabulary": ({"vocab_size": 99}, {}, "its vocabulary is 99, the target's 48"),
    "target hidden size": ({"target_hidden_size": 64}, {}, "its target_hidden_size is 64, the target's 32"),
    "layers": ({"num_hidden_layers": 2}, {}, "it has 2 layers"),
    "bias": ({"attention_bias": True}, {}, "attention_bias=True is not supported"),
    "activation": ({"hidden_act": "gelu"}, {}, "hidden_act='gelu' is not supported"),
    "sizes": ({"intermediate_size": None}, {}, "missing field 'intermediate_size'"),
    "norm": ({"norm_before_residual": True}, {}, "norm_before_residual=True is not supported"),
    "norm before fc": ({"norm_before_fc": True}, {}, "norm_before_fc=True is not supported"),
    "fc norm": ({"fc_norm": True}, {}, "fc_norm=True is not supported"),
    "output norm": ({"norm_output": True}, {}, "norm_output=True is not supported"),
    "embedding": ({"embed_requires_grad": True}, {}, "embed_requires_grad=True is not supported"),
    "quantised": ({"quantization_config": {}}, {}, "quantization_config={} is not supported"),
    "taps": ({"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, {}, "the target has layers 0 to 7"),
    "no list": ({"eagle_aux_hidden_state_layer_ids": "123"}, {}, "the target has layers 0 to 7"),
    "last": ({"eagle_aux_hidden_state_layer_ids": [1, 2, 8]}, {}, "before the final norm"),
    "aux": ({"eagle_config": {"use_aux_hidden_state": False}}, {}, "use_aux_hidden_state=False"),
    "size of vocabulary": ({"draft_vocab_size": 7}, {}, "has shape [16], the config's draft vocabulary is 7"),
    "no size": ({"draft_vocab_size": "7"}, {}, "draft_vocab_size is '7'"),
    "flat table": ({}, {"d2t": np.zeros((Vd, 1), np.int64)}, "has shape [16, 1]"),
    "other table": ({}, {"d2t": None}, "has 16 tokens, but d2t is missing"),
    "missing": ({}, {"midlayer.hidden_norm.weight": None}, "'midlayer.hidden_norm.weight' is missing"),
    "no rows": ({}, {"lm_head.weight": None}, "'lm_head.weight' is missing"),
    "unknown": ({}, {"enorm.weight": np.ones(H, np.float32)}, "'enorm.weight' is not one of a head"),
    "twice": ({}, {"model.fc.weight": DEEP["fc.weight"]}, "'fc.weight' is there twice"),
    "turned": ({}, {"fc.weight": np.ones((3 * H, H), np.float32)}, "(it is transposed)"),
    "too few taps": ({}, {"fc.weight": np.ones((H, 2 * H), np.float32)}, "needs [32, 96]"),
    "whole numbers": ({}, {"norm.weight": np.ones(H, np.int64)}, "is I64; F64 or F32 or F16 or BF16 would"),
    "real table": ({}, {"d2t": np.zeros(Vd, np.float32)}, "is F32; I64 or"),
    "marks": ({}, {"t2d": np.ones(V - 1, bool)}, "'t2d' has shape [47]"),
    "embedding of another": ({}, {"embed_tokens.weight": np.ones((V + 1, H), np.float32)}, "[49, 32]"),
}


@pytest.mark.parametrize("case", OTHER)
def test_another_targets_head_or_a_broken_one_is_refused_before_anything_is_read(tmp_path, case):
    fields, changes, message = OTHER[case]
    tensors = {name: array for name, array in (DEEP | TABLES | changes).items() if array is not None}
    folder = published(tmp_path / "h", EAGLE3 | fields, tensors)
    with pytest.raises((ConfigError, WeightsError)) as caught:
        open_head(folder, TARGET)
    text = str(caught.value)
    assert message in text
    assert "would work" in text
    assert "\n" not in text
    assert str(folder) in text


def changed(table: str, **places: int) -> dict:
    array = TABLES[table].copy()
    for at, value in places.items():
        array[int(at[1:])] = value
    return TABLES | {table: array}


BAD_VALUES = {
    "nan": ({"norm.weight": np.full(H, np.nan, BF16)}, "holds NaN or Inf"),
    "inf": ({"fc.weight": np.full((H, 3 * H), np.inf, np.float32)}, "holds NaN or Inf"),
    "beyond": (changed("d2t", _15=V), "leads to token 63, the target has 0 to 47"),
    "below": (changed("d2t", _0=-1), "leads to token -1"),
    "far": (changed("d2t", _3=2**62), "beyond the target's vocabulary"),
    "farther": (changed("d2t", _3=-(2**63)), "beyond the target's vocabulary"),
    "again": (changed("d2t", _1=-1), "leads to token 0 after 0"),
    "backwards": (changed("d2t", _1=20), "tokens that ascend, each once"),
    "marks": (changed("t2d", _1=1), "t2d and d2t disagree about 1 tokens, 1 the first"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_values_are_checked_when_they_are_read(tmp_path, case):
    changes, message = BAD_VALUES[case]
    opened = open_head(published(tmp_path / "h", EAGLE3, DEEP | TABLES | changes), TARGET)
    with pytest.raises(WeightsError) as caught:
        opened.tensors()
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        ({"medusa_num_layers": 2}, {}, "medusa_num_layers=2 is not supported"),
        ({}, {"0.1.linear.weight": np.ones((H, H), np.float32)}, "more than one layer"),
        ({}, {"1.0.linear.weight": None}, "its heads are [0, 2]"),
        ({}, {"1.1.weight": None}, "'1.1.weight' is missing"),
        ({}, {"1.1.weight": np.ones((V + 1, H), np.float32)}, "has shape [49, 32]"),
    ],
)
def test_strange_medusas(tmp_path, fields, changes, message):
    tensors = {name: array for name, array in (BLOCKS | changes).items() if array is not None}
    folder = published(
        tmp_path / "h", {"medusa_num_heads": 3} | fields, tensors, "medusa_lm_head.safetensors"
    )
    with pytest.raises((ConfigError, WeightsError)) as caught:
        open_head(folder, TARGET)
    assert message in str(caught.value)


def test_kinds_that_are_not_supported_are_named(tmp_path):
    folder = published(tmp_path / "h", speculators("dflash"), FIRST)
    assert names_head(folder)
    with pytest.raises(ConfigError, match="kind 'dflash' is not supported; medusa, eagle, eagle3 would work"):
        open_head(folder, TARGET)
    raw = speculators("eagle3", transformer_layer_config=LAYER | {"model_type": "qwen3"})
    with pytest.raises(ConfigError, match="model_type 'qwen3' is not supported"):
        open_head(published(tmp_path / "q", raw, DEEP | TABLES), TARGET)
    with pytest.raises(ConfigError, match="layernorms=True is not supported"):
        open_head(published(tmp_path / "n", speculators("eagle", layernorms=True), FIRST), TARGET)


def test_ours_of_another_target(tmp_path):
    config = head("eagle")
    write_head(tmp_path, config, weights(config), IDS, target_name="mine", target=TARGET, training={})
    other = dataclasses.replace(TARGET, num_layers=9)
    with pytest.raises(ConfigError, match="trained for mine with num_layers 8, this target has 9"):
        open_head(tmp_path, other)


def test_names_that_are_no_heads(tmp_path):
    for name in ("ngram", "", "self:3", "smollm2-135m-instruct", "llama-2-7b-chat", str(tmp_path / "absent")):
        assert not names_head(name)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("[")
    assert not names_head(tmp_path / "bad")
    one = LlamaConfig.from_dict(LAYER)
    folder = write_folder(tmp_path / "llama", random_tensors(one), LAYER)
    assert not names_head(folder)
    with pytest.raises(WeightsError, match="neither its config nor its tensors are a draft head's"):
        open_head(folder, TARGET)


def test_what_is_not_there_says_what_would_work(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no draft head .* a folder with config\.json"):
        open_head("nothing", TARGET)
    (tmp_path / "h").mkdir()
    with pytest.raises(ConfigError, match=r"the head's own config\.json would work"):
        open_head(tmp_path / "h", TARGET)
    (tmp_path / "h" / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds no JSON object"):
        open_head(tmp_path / "h", TARGET)
    (tmp_path / "h" / "config.json").write_text(json.dumps(EAGLE3))
    with pytest.raises(WeightsError, match="it has no weights"):
        open_head(tmp_path / "h", TARGET)


def test_a_pickle_that_would_run_is_refused(tmp_path):
    folder = published(tmp_path / "h", EAGLE3, DEEP | TABLES, "pytorch_model.bin")
    data = (folder / "pytorch_model.bin").read_bytes()
    name = b"collections\nOrderedDict"
    (folder / "pytorch_model.bin").write_bytes(data.replace(name, b"os\nsystem".ljust(len(name), b"m")))
    with pytest.raises(WeightsError):
        open_head(folder, TARGET)


def test_a_head_of_the_zoo_by_its_name(tmp_path, monkeypatch):
    config = head("eagle3", draft_vocab_size=Vd)
    params = weights(config, BF16)
    monkeypatch.setattr(zoo, "zoo_root", lambda: tmp_path)
    write_head(tmp_path / "mine", config, params, IDS, target_name="t", target=TARGET, training={})
    assert names_head("mine")
    opened = open_head("mine", TARGET)
    assert (opened.name, opened.config) == ("mine", config)
    assert not names_head("../mine")


def test_a_head_of_the_zoo_by_its_config_only(tmp_path, monkeypatch):
    config = head("eagle", fc_bias=True)
    folder = tmp_path / "mine.config-only"
    write_head(folder, config, weights(config), IDS, target_name="t", target=TARGET, training={})
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(zoo, "zoo_root", lambda: tmp_path)
    assert names_head("mine")
    opened = open_head("mine", TARGET)
    assert opened.config == config
    with pytest.raises(WeightsError, match="by its config only, without weights"):
        opened.tensors()


@pytest.mark.parametrize("name", sorted(HEADS))
def test_published_heads_are_known_by_their_configs(name):
    target, parameters = HEADS[name]
    assert names_head(name)
    opened = open_head(name, zoo.zoo_config(target))
    sizes = opened.config.tensor_shapes().values()
    assert round(sum(math.prod(shape) for shape in sizes) / 1e9, 2) == parameters
    with pytest.raises(WeightsError, match=r"specmemo convert yuhuili/.* --out DIR --target"):
        opened.tensors()
    assert f"`{name}`" in (zoo.zoo_root() / "README.md").read_text(encoding="utf-8")


def test_heads_of_the_hub(tmp_path, monkeypatch):
    published(tmp_path, EAGLE3, DEEP | TABLES, "pytorch_model.bin")
    asked = []

    def snapshot(hub_id, **options):
        asked.append((options["local_files_only"], options["allow_patterns"]))
        if hub_id == "org/absent":
            raise LocalEntryNotFoundError("not there")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert names_head("org/head")
    assert not names_head("org/absent")
    assert all(local for local, _ in asked)
    asked.clear()
    assert names_head("org/head", download=True)
    assert asked == [(False, ["config.json"])]
    asked.clear()
    assert open_head("org/head", TARGET).config.draft_vocab_size == Vd
    first, second = asked
    assert not any(name.endswith((".bin", ".pt", "*")) for name in first[1])
    assert not first[0]
    assert "pytorch_model.bin" in second[1]
    with pytest.raises(DownloadError):
        open_head("org/absent", TARGET)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(WeightsError, match="has no file of a draft head"):
        open_head("org/head", TARGET)


@pytest.mark.parametrize("read", [partial(open_head, target=TARGET), names_head])
def test_a_folder_wins_over_the_hub(tmp_path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    published(tmp_path / "org" / "head", EAGLE3, DEEP | TABLES)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert read("org/head")
