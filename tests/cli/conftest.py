"""What commands meet: a damaged model, a hub cache."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest


@pytest.fixture
def broken_model(tiny_model, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "broken"))


@pytest.fixture
def hub_cache(tiny_model, tmp_path, monkeypatch) -> Callable[[str], Path]:
    """An empty hub cache instead of the user's; called with a hub id, it puts the tiny model there."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", partial(huggingface_hub.scan_cache_dir, cache))

    def add(hub_id: str) -> Path:
        repo = cache / f"models--{hub_id.replace('/', '--')}"
        snapshot = repo / "snapshots" / "1234"
        if not snapshot.exists():
            (repo / "refs").mkdir(parents=True)
            (repo / "refs" / "main").write_text("1234")
            (repo / "blobs").mkdir()
            shutil.copytree(tiny_model, snapshot)
        return snapshot

    return add


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPECMEMO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
