"""The one folder this package writes to on its own."""

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Where fetched weights and compiled programs are kept: ``$SPECMEMO_CACHE``, else the user's cache."""
    override = os.environ.get("SPECMEMO_CACHE")
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("specmemo"))
