import json

from typer.testing import CliRunner

from specmemo_jax.checkpoints import zoo_entry
from specmemo_jax.cli.main import app

DEFAULT = "smollm2-135m-instruct"


def table() -> list[str]:
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 0, result.stderr
    return result.stdout.splitlines()


def listed() -> dict[str, dict]:
    result = CliRunner().invoke(app, ["list", "--json"])
    assert result.exit_code == 0, result.stderr
    return {model["name"]: model for model in json.loads(result.stdout)}


def test_the_zoo_with_sizes_and_licences(hub_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECMEMO_CACHE", str(tmp_path))
    first, second, *rest = table()
    assert first.split() == ["name", "parameters", "weights", "on", "disk", "to", "fetch", "licence"]
    assert second.split() == [DEFAULT, "135M", "not", "pulled", "-", "98", "MB", "Apache-2.0"]
    assert any(line.startswith("llama-2-70b-chat") and "config only" in line for line in rest)
    *rest, blank, heads = rest
    assert (blank, heads) == ("", "draft heads (--drafter): smollm2-135m-eagle for smollm2-135m-instruct")
    models = listed()
    assert len(models) == len(rest) + 1
    assert (models[DEFAULT]["state"], models[DEFAULT]["path"]) == ("not pulled", None)
    assert models["llama-2-7b-chat"]["parameters"] == 6_738_415_616
    assert models["llama-2-7b-chat"]["hub_id"] == "meta-llama/Llama-2-7b-chat-hf"


def test_what_is_pulled_tells_its_size_on_disk(hub_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECMEMO_CACHE", str(tmp_path))
    entry = zoo_entry(DEFAULT)
    assert entry is not None
    assert entry.weights is not None
    assert entry.cached_path is not None
    entry.cached_path.parent.mkdir(parents=True)
    with entry.cached_path.open("wb") as file:
        file.truncate(entry.weights.size)
    assert table()[1].split() == [DEFAULT, "135M", "here", "98", "MB", "-", "Apache-2.0"]
    model = listed()[DEFAULT]
    assert (model["disk_bytes"], model["download_bytes"]) == (entry.weights.size, None)
    assert model["path"] == str(entry.cached_path)


def test_the_hubs_llamas_are_listed_too(hub_cache):
    tiny = hub_cache("org/tiny")
    broken = hub_cache("org/half")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    config = json.loads((hub_cache("org/bert") / "config.json").read_text())
    (hub_cache("org/bert") / "config.json").write_text(
        json.dumps({**config, "model_type": "bert", "architectures": ["BertModel"]})
    )
    (hub_cache("org/pickled") / "model.safetensors").unlink()
    found = {name: model for name, model in listed().items() if model["source"] == "hub"}
    assert {name: model["state"] for name, model in found.items()} == {
        "org/half": "unusable",
        "org/tiny": "here",
    }
    assert found["org/tiny"]["path"] == str(tiny)
    assert found["org/tiny"]["parameters"] > 0
    assert found["org/tiny"]["disk_bytes"] >= (tiny / "model.safetensors").stat().st_size
    assert found["org/half"]["parameters"] is None


def test_no_hub_cache_is_no_matter(hub_cache):
    assert all(model["source"] == "zoo" for model in listed().values())
