import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_checkpoints import random_tensors, raw_config, write_folder

from specmemo_jax.checkpoints import open_checkpoint, resolve
from specmemo_jax.checkpoints.hub import fetch_hub_model, is_hub_id
from specmemo_jax.errors import DownloadError, ModelNotFoundError, WeightsError


def hub_error(kind):
    """An error of the hub's library, whatever its constructor asks for."""
    error = kind.__new__(kind)
    Exception.__init__(error, "first line\nsecond line")
    return error


@pytest.fixture
def fake_hub(monkeypatch):
    asked = {}

    def install(answer):
        def snapshot(hub_id, **options):
            asked.update(options, hub_id=hub_id)
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        return asked

    return install


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", True),
        ("a/b.c-d_e", True),
        ("name", False),
        ("a/b/c", False),
        ("./b", False),
        ("../b", False),
    ],
)
def test_form_of_an_id(name, expected):
    assert is_hub_id(name) is expected


def test_only_weights_configs_and_tokenizers_are_asked_for(fake_hub, tmp_path, config):
    asked = fake_hub(write_folder(tmp_path / "m", random_tensors(config), raw_config()))
    found = resolve("org/tiny", progress=False)
    assert open_checkpoint(found.path).config == config
    assert asked["hub_id"] == "org/tiny"
    assert not asked["local_files_only"]
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["allow_patterns"])
    resolve("org/tiny", download=False)
    assert asked["local_files_only"]


def test_hub_without_safetensors(fake_hub, tmp_path):
    fake_hub(tmp_path)
    with pytest.raises(WeightsError, match=r"no model.*safetensors"):
        fetch_hub_model("org/pickled")


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (huggingface_hub.errors.GatedRepoError, DownloadError, "org/m is gated"),
        (huggingface_hub.errors.RepositoryNotFoundError, ModelNotFoundError, "no model 'org/m'"),
        (LocalEntryNotFoundError, DownloadError, "hub cannot be reached"),
        (huggingface_hub.errors.HfHubHTTPError, DownloadError, r"\(first line\)"),
        (OSError, DownloadError, r"\(first line"),
    ],
)
def test_every_failure_is_one_line(fake_hub, error, raised, message):
    fake_hub(hub_error(error))
    with pytest.raises(raised, match=message) as caught:
        fetch_hub_model("org/m")
    assert "\n" not in str(caught.value)
