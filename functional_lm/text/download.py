"""Files from `http(s)` addresses: downloaded once into a cache, checked, and gone on with after a break.

    https://host/path/data.jsonl.gz#sha256=<64 hex digits>

The fragment, never sent, is the checksum that the file must have. In the cache a file lies under its own name in a
folder named by the address, beside `record.json` (address, sha256, size). What lies there is used without asking the
server again, as long as its length is what it was (and its checksum, where one was given); remove the folder to get a
newer version.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote, urldefrag, urlsplit

from tqdm import tqdm

from functional_lm import files, seal, unfinished
from functional_lm.errors import DataError, UsageError
from functional_lm.unfinished import Journal

ADDRESS = re.compile(r"https?://", re.IGNORECASE)
CHECKSUM = re.compile(r"sha256=([0-9a-fA-F]{64})")
SAFE = "%/:=&?~+!$,;'@()*[]"  # in an address, beside letters and digits
CHUNK, COMMIT = 1 << 16, 16 << 20  # bytes read at once; bytes after which a kill loses nothing
ATTEMPTS, WAIT, TIMEOUT = 4, 1.0, 60.0  # attempts without progress; seconds before the second one, and of silence


@dataclass(frozen=True)
class Downloads:
    """How sources with an address are got."""

    limit: int = 4_000_000_000  # most bytes of one file
    folder: Path | None = None  # of the cache; None: ~/.cache/functional_lm/downloads
    progress: bool = True


USUAL = Downloads()


class _Broken(Exception):
    """The connection ended early, or the server asks to come back later."""


def is_address(item: str) -> bool:
    """Whether a source is an `http(s)` address, and no path."""
    return ADDRESS.match(item) is not None


def fetch(address: str, downloads: Downloads = USUAL) -> Path:
    """The file of an address, from the cache or the net. Raises UsageError for an address that is none.

    Raises DataError for what the server refuses, a file over the limit, another checksum, and for a connection that
    breaks again and again; what came until then is kept, and the next call goes on from there.
    """
    address, checksum = _parsed(address)
    folder = _cache(downloads.folder) / hashlib.sha256(address.encode()).hexdigest()[:16]
    path, record = folder / _name(address), folder / "record.json"
    if _is_cached(path, record, checksum):
        return path
    with unfinished.journal(path, address) as journal:
        body = journal.open("body")
        _receive(address, journal, body, downloads)
        found = _sha256(body)
        if checksum not in (None, found):
            journal.discard()
            raise DataError(f"{address} has the sha256 {found}, not {checksum}; check the address and the checksum")
        size = body.tell()
        if not size:
            journal.discard()
            raise DataError(f"{address} is empty; a data file must hold text")
        journal.finish("body", path)
        files.write_json(record, {"address": address, "sha256": found, "size": size})
    return path


def _parsed(address: str) -> tuple[str, str | None]:
    """The address without its fragment, and the checksum in it."""
    plain, fragment = urldefrag(address)
    match = CHECKSUM.fullmatch(fragment)
    if fragment and not match:
        raise UsageError(f"{address}: after # only sha256= and 64 hexadecimal digits have a meaning")
    try:
        host, _ = urlsplit(plain).hostname, urlsplit(plain).port
    except ValueError:
        host = None
    if not host:
        raise UsageError(f"{address!r} is no address; write it as https://host/path")
    return quote(plain, safe=SAFE, errors="surrogateescape"), match[1].lower() if match else None


def _cache(folder: Path | None) -> Path:
    if folder is not None:
        return folder.expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "functional_lm" / "downloads"


def _name(address: str) -> str:
    """The file's name in the cache: the last part of the path, whose suffixes tell the format."""
    last = unquote(urlsplit(address).path).rsplit("/", 1)[-1]
    return re.sub(r"[^\w.+-]", "_", last, flags=re.ASCII)[-100:].lstrip(".") or "download"


def _is_cached(path: Path, record: Path, checksum: str | None) -> bool:
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = files.read_json(record)
        whole = bool(path.stat().st_size == known["size"])
        return whole and checksum in (None, known["sha256"]) and checksum in (None, seal.sha256(path))
    return False


def _sha256(body: IO[bytes]) -> str:
    digest = hashlib.sha256()
    body.seek(0)
    while chunk := body.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


# Receiving ------------------------------------------------------------------------------------------------------------


def _receive(address: str, journal: Journal, body: IO[bytes], downloads: Downloads) -> None:
    """The whole body, in as many requests as it takes; each goes on where the one before ended."""
    failures, held = 0, -1
    hidden = None if downloads.progress else True
    with tqdm(unit="B", unit_scale=True, desc=_name(address), leave=False, disable=hidden) as bar:
        while True:
            try:
                return _request(address, journal, body, downloads.limit, bar)
            except (OSError, http.client.HTTPException, _Broken) as error:
                failures = 1 if body.tell() > held else failures + 1
                held = body.tell()
                hopeless = isinstance(error, urllib.error.URLError) and not held  # nobody there, or not who it says
                if failures == ATTEMPTS or hopeless:
                    kept = f"; {held} bytes are kept, the same command goes on from there" if journal.memory else ""
                    raise DataError(f"{address} cannot be downloaded: {_reason(error)}{kept}") from error
                time.sleep(WAIT * 2 ** (failures - 1))


def _request(address: str, journal: Journal, body: IO[bytes], limit: int, bar: tqdm[Any]) -> None:
    """One request; returns when the body is whole. Raises _Broken, or what urllib raises, when it broke off."""
    headers = {"User-Agent": "functional_lm", "Accept-Encoding": "identity"}
    if journal.memory and body.tell():
        headers |= {"Range": f"bytes={body.tell()}-", "If-Range": journal.memory}
    try:
        response = urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            raise _afresh(journal, body) from None
        if error.code in (408, 429) or error.code >= 500:
            raise _Broken(f"HTTP {error.code} {error.reason}") from None
        raise DataError(f"{address} cannot be downloaded: HTTP {error.code} {error.reason}") from None
    with response:
        if response.status == 206 and not _goes_on(response, body.tell()):
            raise _afresh(journal, body)
        if response.status != 206:
            body.seek(0)
            body.truncate()
        total = _total(response, body.tell())
        if (total or 0) <= limit:
            bar.total, bar.n = total, body.tell()
            _copy(response, body, limit, journal, bar)
        if max(total or 0, body.tell()) > limit:
            journal.discard()
            size = f"has {total} bytes" if total else f"has more than {limit} bytes"
            raise DataError(f"{address} {size}; the limit is {limit} (--max_download)")
        if total is not None and body.tell() != total:
            raise _Broken(f"the connection ended after {body.tell()} of {total} bytes")


def _copy(response: Any, body: IO[bytes], limit: int, journal: Journal, bar: tqdm[Any]) -> None:
    """What comes, until its end or the limit; committed now and then if a later request can go on from it."""
    version, committed = _version(response), body.tell()
    try:
        while body.tell() <= limit and (chunk := response.read(CHUNK)):
            body.write(chunk)
            bar.update(len(chunk))
            if version and body.tell() - committed >= COMMIT:
                journal.commit(version)
                committed = body.tell()
    finally:
        if version:
            journal.commit(version)


def _afresh(journal: Journal, body: IO[bytes]) -> _Broken:
    """What is held is no beginning of what the server has."""
    journal.discard()
    body.seek(0)
    body.truncate()
    return _Broken("the server does not go on from what is there already")


def _goes_on(response: Any, place: int) -> bool:
    return bool(re.match(rf"bytes {place}-", response.headers.get("Content-Range", "")))


def _total(response: Any, place: int) -> int | None:
    """Bytes of the whole file, None if the server does not say."""
    length = response.headers.get("Content-Length", "")
    return place + int(length) if length.isdecimal() else None


def _version(response: Any) -> str | None:
    """What tells that a later request reads the same version of the file: only then a part can be gone on with."""
    tag = response.headers.get("ETag", "")
    return (tag if tag and not tag.startswith("W/") else None) or response.headers.get("Last-Modified")


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return str(reason) or type(error).__name__
