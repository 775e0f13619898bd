"""Models by hub id (``org/name``), through huggingface_hub: weights, configs and tokenizers only."""

import re
from pathlib import Path

from specmemo_jax.errors import DownloadError, ModelNotFoundError, WeightsError

# No code, no pickles, nothing that is not read here.
ALLOWED = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# Of a trained draft head: the first names, and where there are none of them the others, whose reader
# rebuilds tensors and runs nothing (pickled_tensors.py).
HEAD_ALLOWED = ("config.json", "model.safetensors", "medusa_lm_head.safetensors")
PICKLED_HEAD_ALLOWED = ("config.json", "pytorch_model.bin", "medusa_lm_head.pt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form ``org/name``."""
    return _HUB_ID.fullmatch(name) is not None


def fetch_hub_model(hub_id: str, *, download: bool = True, progress: bool | None = None) -> Path:
    """The folder of a hub model in the hub's own cache, fetched first where ``download``.

    Raises ModelNotFoundError when the hub does not know the id, DownloadError when it is gated or
    the hub cannot be reached, WeightsError when it has no safetensors.
    """
    folder = _snapshot(hub_id, ALLOWED, download, progress)
    if not any(folder.glob("*.safetensors")):
        raise WeightsError(
            f"{hub_id} has no model*.safetensors on the hub (pickled or GGUF files are not fetched); "
            "its weights converted to safetensors in a local folder, or a local .gguf file, would work"
        )
    return folder


def fetch_hub_head(hub_id: str, *, download: bool = True, progress: bool | None = None) -> Path:
    """The folder of a hub's draft head, as `fetch_hub_model`: safetensors, else torch's files.

    Raises as that does, WeightsError when it has neither.
    """
    for names in (HEAD_ALLOWED, PICKLED_HEAD_ALLOWED):
        folder = _snapshot(hub_id, names, download, progress)
        if any((folder / name).is_file() for name in names[1:]):
            return folder
    raise WeightsError(
        f"{hub_id} has no file of a draft head; "
        f"one with {', '.join((*HEAD_ALLOWED[1:], *PICKLED_HEAD_ALLOWED[1:]))} would work"
    )


def fetch_hub_config(hub_id: str, *, download: bool = True) -> Path:
    """The folder with a hub repository's config.json, fetched alone where ``download``. Raises as
    `fetch_hub_model`.
    """
    return _snapshot(hub_id, ("config.json",), download, None)


def _snapshot(hub_id: str, names: tuple[str, ...], download: bool, progress: bool | None) -> Path:
    """What the hub has of ``names``."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        # local_files_only raises LocalEntryNotFoundError where nothing is cached.
        folder = snapshot_download(
            hub_id,
            allow_patterns=list(names),
            local_files_only=not download,
            tqdm_class=_silent_bar() if progress is False else None,
        )
    except GatedRepoError as error:
        raise DownloadError(
            f"{hub_id} is gated; access granted on the hub and `hf auth login`, or a local folder, would work"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"the hub has no model {hub_id!r} (or it is private); its exact id, `hf auth login`, "
            "or a local folder would work"
        ) from error
    except LocalEntryNotFoundError as error:
        where = (
            "is not in the local hub cache and the hub cannot be reached"
            if download
            else "is not in the cache"
        )
        raise DownloadError(
            f"{hub_id} {where}; a network, or a local folder instead of the id, would work"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DownloadError(
            f"cannot fetch {hub_id} from the hub ({first}); a network, or a local folder, would work"
        ) from error
    return Path(folder)


def _silent_bar() -> type:
    from tqdm import tqdm

    class Silent(tqdm):
        """A progress bar that never shows."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent
