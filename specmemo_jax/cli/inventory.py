"""The models that there are: the zoo's, and those in the hub's cache."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from specmemo_jax.checkpoints import ZooEntry, open_checkpoint, zoo_names
from specmemo_jax.errors import ConfigError, SpecMemoError

State = Literal["here", "not pulled", "config only", "unusable"]


@dataclasses.dataclass(frozen=True)
class Model:
    """One line of ``specmemo list``; sizes in bytes, None where they are not known."""

    name: str
    source: Literal["zoo", "hub"]
    state: State
    parameters: int | None
    disk_bytes: int | None = None
    download_bytes: int | None = None
    license: str | None = None
    summary: str | None = None
    hub_id: str | None = None
    path: str | None = None


def inventory() -> list[Model]:
    """The zoo first, then the Llamas in the hub's cache, by name."""
    return [*map(_zoo_model, zoo_names()), *_hub_models()]


def hub_folders() -> list[tuple[str, Path]]:
    """Hub ids whose safetensors lie in the hub's cache, with their folders, by name."""
    return sorted((repo.repo_id, revision.snapshot_path) for repo, revision in _cached())


def _zoo_model(entry: ZooEntry) -> Model:
    path = entry.cached_path if entry.is_cached else None
    return Model(
        name=entry.name,
        source="zoo",
        state="config only" if entry.config_only else "here" if path else "not pulled",
        parameters=entry.config.num_params,
        disk_bytes=path.stat().st_size if path else None,
        download_bytes=entry.weights.size if entry.weights and not path else None,
        license=entry.license,
        summary=entry.summary,
        hub_id=entry.hub_id,
        path=str(path) if path else None,
    )


def _hub_models() -> Iterator[Model]:
    for repo, revision in sorted(_cached(), key=lambda found: found[0].repo_id):
        state, parameters = "here", None
        try:
            parameters = open_checkpoint(revision.snapshot_path).config.num_params
        except ConfigError:
            continue  # no Llama
        except SpecMemoError:
            state = "unusable"  # a shard is missing, or quantised: generate says which
        yield Model(
            name=repo.repo_id,
            source="hub",
            state=state,
            parameters=parameters,
            disk_bytes=revision.size_on_disk,
            hub_id=repo.repo_id,
            path=str(revision.snapshot_path),
        )


def _cached() -> Iterator[tuple[Any, Any]]:
    """Repositories of the hub's cache that hold safetensors, with the revision that their id means."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):  # no cache, or none that can be read
        return
    for repo in repos:
        revision = next((found for found in repo.revisions if "main" in found.refs), None)
        files = revision.files if revision is not None and repo.repo_type == "model" else ()
        if any(file.file_name.endswith(".safetensors") for file in files):
            yield repo, revision
