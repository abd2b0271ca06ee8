"""A download is the server's file or an error; a connection that breaks costs no byte that has come already.

The server is on 127.0.0.1; nothing here leaves this machine.
"""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from functional_lm.errors import DataError, UsageError
from functional_lm.text import corpus, document, download
from functional_lm.text.download import Downloads, fetch

BODY = bytes(range(256)) * 40
SHA256 = hashlib.sha256(BODY).hexdigest()


@dataclass
class Site:
    """What the server does, and what it was asked for."""

    url: str = ""
    body: bytes = BODY
    version: str | None = '"v1"'
    breaks: list[int] = field(default_factory=list)  # after so many bytes of the next answers
    codes: list[int] = field(default_factory=list)  # of the next answers
    ranges: bool = True
    shift: int = 0  # what it lies about the place of a part
    length: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    made = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            made.asked.append((self.path, asked))
            code = made.codes.pop(0) if made.codes else 200
            if code >= 300:
                self.send_response(code)
                self.send_header("Location", f"{made.url}/moved.txt")
                self.end_headers()
                return
            start = 0
            if asked and made.ranges and self.headers.get("If-Range") == made.version:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                code = 416 if start >= len(made.body) else 206
            self.send_response(code)
            if code == 206:
                first = start + made.shift
                self.send_header("Content-Range", f"bytes {first}-{len(made.body) - 1}/{len(made.body)}")
            if made.length:
                self.send_header("Content-Length", str(len(made.body) - start))
            if made.version:
                self.send_header("ETag", made.version)
            self.end_headers()
            part = made.body[start:]
            self.wfile.write(part[: made.breaks.pop(0)] if made.breaks else part)

        def log_message(self, *args: object) -> None:
            pass

    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "WAIT", 0.0)
    monkeypatch.setattr(download, "CHUNK", 100)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        server.shutdown()


@pytest.fixture
def cache(tmp_path: Path) -> Downloads:
    return Downloads(limit=1_000_000, folder=tmp_path / "cache", progress=False)


def leftovers(cache: Downloads) -> list[Path]:
    assert cache.folder
    return [path for path in cache.folder.rglob(".*") if path.is_dir()]


# What comes -------------------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once(site: Site, cache: Downloads) -> None:
    path = fetch(f"{site.url}/a%20b/data.jsonl.gz?x=1", cache)
    assert (path.name, path.read_bytes()) == ("data.jsonl.gz", BODY)
    assert fetch(f"{site.url}/a%20b/data.jsonl.gz?x=1", cache) == path
    assert site.asked == [("/a%20b/data.jsonl.gz?x=1", None)]
    assert fetch(f"{site.url}/other", cache) != path
    assert not leftovers(cache)


def test_its_documents_are_read_by_its_suffix(site: Site, cache: Downloads) -> None:
    site.body = gzip.compress(b'{"text": "a"}\n{"text": "b"}\n')
    found = corpus.find(f"{site.url}/x/data.jsonl.gz?download=true=2", cache)
    assert [weight for _, weight in found.parts] == [2.0]
    assert list(document.text_of(corpus.documents(found))) == ["a", "b"]


@pytest.mark.parametrize("address", ["/", "/.hidden", "/%2e%2e%2f%2e%2e%2fetc", "/ä ö.txt", "/" + "x" * 300 + ".txt"])
def test_a_name_stays_in_its_folder(site: Site, cache: Downloads, address: str) -> None:
    path = fetch(site.url + address, cache)
    assert path.read_bytes() == BODY
    assert cache.folder in path.parents
    assert path.parent.parent == cache.folder
    assert not path.name.startswith(".")


def test_a_checksum_is_checked(site: Site, cache: Downloads) -> None:
    assert fetch(f"{site.url}/a.txt#sha256={SHA256.upper()}", cache).read_bytes() == BODY
    assert site.asked == [("/a.txt", None)]
    with pytest.raises(DataError, match=f"has the sha256 {SHA256}, not {'0' * 64}"):
        fetch(f"{site.url}/a.txt#sha256={'0' * 64}", cache)
    assert fetch(f"{site.url}/a.txt", cache).read_bytes() == BODY  # the older one is still there
    assert not leftovers(cache)


def test_a_checksum_is_that_of_the_bytes_and_not_of_what_was_noted(site: Site, cache: Downloads) -> None:
    address = f"{site.url}/a.txt#sha256={SHA256}"
    path = fetch(address, cache)
    path.write_bytes(BODY[:-1] + b"x")
    assert fetch(address, cache).read_bytes() == BODY
    assert fetch(address, cache).read_bytes() == BODY
    assert len(site.asked) == 2


def test_another_checksum_asks_the_server_again(site: Site, cache: Downloads) -> None:
    fetch(f"{site.url}/a.txt", cache)
    site.body = BODY[::-1]
    found = fetch(f"{site.url}/a.txt#sha256={hashlib.sha256(site.body).hexdigest()}", cache)
    assert found.read_bytes() == site.body
    assert len(site.asked) == 2


@pytest.mark.parametrize("code", [301, 302, 307])
def test_redirections_are_followed(site: Site, cache: Downloads, code: int) -> None:
    site.codes = [code]
    assert fetch(f"{site.url}/a.txt", cache).read_bytes() == BODY
    assert [path for path, _ in site.asked] == ["/a.txt", "/moved.txt"]


# Broken connections -------------------------------------------------------------------------------------------------


def test_a_broken_connection_is_gone_on_with(site: Site, cache: Downloads) -> None:
    site.breaks = [1000, 0, 0, 1, 5000]
    assert fetch(f"{site.url}/a.txt", cache).read_bytes() == BODY
    starts = [1000, 1000, 1000, 1001, 6001]
    assert [asked for _, asked in site.asked] == [None, *(f"bytes={start}-" for start in starts)]


def test_a_later_call_goes_on(site: Site, cache: Downloads) -> None:
    site.breaks = [1000] + [0] * 20
    with pytest.raises(DataError, match=r"ended after 1000 of 10240 bytes; 1000 bytes are kept"):
        fetch(f"{site.url}/a.txt", cache)
    asked = len(site.asked)
    assert asked == download.ATTEMPTS
    site.breaks = []
    assert fetch(f"{site.url}/a.txt", cache).read_bytes() == BODY
    assert site.asked[asked:] == [("/a.txt", "bytes=1000-")]
    assert not leftovers(cache)


@pytest.mark.parametrize("how", ["no version", "another version", "no ranges", "lies", "shorter"])
def test_what_cannot_be_gone_on_with_starts_again(site: Site, cache: Downloads, how: str) -> None:
    site.breaks = [1000] + [0] * 3
    site.version = None if how == "no version" else site.version
    with pytest.raises(DataError, match="cannot be downloaded"):
        fetch(f"{site.url}/a.txt", cache)
    site.version = '"v2"' if how == "another version" else site.version
    site.ranges = how != "no ranges"
    site.shift = 7 * (how == "lies")
    site.body = BODY[:500] if how == "shorter" else BODY[::-1]
    site.asked = []
    assert fetch(f"{site.url}/a.txt", cache).read_bytes() == site.body
    assert len(site.asked) == 1 + (how in ("lies", "shorter"))


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_server_is_asked_again(site: Site, cache: Downloads, code: int) -> None:
    site.codes = [code, code]
    assert fetch(f"{site.url}/a.txt", cache).read_bytes() == BODY
    site.codes = [code] * download.ATTEMPTS
    with pytest.raises(DataError, match=f"HTTP {code}"):
        fetch(f"{site.url}/b.txt", cache)


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_what_the_server_refuses_is_refused_at_once(site: Site, cache: Downloads, code: int) -> None:
    site.codes = [code]
    with pytest.raises(DataError, match=rf"a\.txt cannot be downloaded: HTTP {code}"):
        fetch(f"{site.url}/a.txt", cache)
    assert len(site.asked) == 1
    assert not leftovers(cache)


@pytest.mark.parametrize("length", [True, False])
def test_a_file_over_the_limit_is_refused(site: Site, cache: Downloads, length: bool) -> None:
    site.length = length
    with pytest.raises(DataError, match=r"has (10240|more than 10239) bytes; the limit is 10239 \(--max_download\)"):
        fetch(f"{site.url}/a.txt", Downloads(10_239, cache.folder, False))
    assert not leftovers(cache)
    assert fetch(f"{site.url}/a.txt", Downloads(10_240, cache.folder, False)).read_bytes() == BODY


def test_an_empty_file_is_refused(site: Site, cache: Downloads) -> None:
    site.body = b""
    with pytest.raises(DataError, match="is empty"):
        fetch(f"{site.url}/a.txt", cache)


def test_nobody_there_is_told_at_once(site: Site, cache: Downloads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WAIT", 1000.0)
    with pytest.raises(DataError, match="cannot be downloaded"):
        fetch("http://127.0.0.1:1/a.txt", cache)


@pytest.mark.parametrize("address", ["http://", "https:///a.txt", "http://[::1/a", "http://h:port/a"])
def test_what_is_no_address_is_a_wrong_usage(cache: Downloads, address: str) -> None:
    with pytest.raises(UsageError, match="is no address"):
        fetch(address, cache)
    with pytest.raises(UsageError, match="after # only sha256="):
        fetch("http://127.0.0.1/a.txt#md5=1", cache)


def test_the_cache_is_in_the_usual_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert download._cache(None) == tmp_path / "functional_lm" / "downloads"
