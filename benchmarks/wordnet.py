"""WordNet 3.0 from Debian's package: fetched once, then read from a folder.

`apt-get` downloads the package and its digest is checked. It is read, never installed.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from smollm import cache_folder, made_folder

from superlora.demo.fetch import FetchError

DATA = "usr/share/wordnet/"
# The only place that has the names of the lexicographers' files, which nltk's reader asks for.
LEXNAMES = "usr/share/man/man5/lexnames.5WN.gz"
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")


@dataclass(frozen=True)
class Package:
    """A package of Debian for all architectures."""

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """File name of the package, as `apt-get download` and the cache have it."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


# 82,115 noun synsets among others; 6 MB, the licence of WordNet, which is permissive.
WORDNET = Package(
    name="wordnet-base",
    version="1:3.0-37",
    sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
)


def wordnet_folder(package: Package = WORDNET) -> Path:
    """Return the folder of WordNet's files, as nltk's reader takes it."""
    return made_folder("wordnet-3.0", lambda made: unpack(fetched(package, cache_folder()), made))


def fetched(package: Package, cache: Path) -> Path:
    """Return where a package lies, which is downloaded where the cache lacks it."""
    kept = cache / package.filename
    if not kept.exists() or _sha256(kept) != package.sha256:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            found = Path(folder) / package.filename
            _download(package, found)
            if _sha256(found) != package.sha256:
                raise FetchError(
                    f"can't fetch {package}: sha256 must be {package.sha256}, got {_sha256(found)}"
                )
            found.replace(kept)  # it has its name only once its digest is right
    return kept


def _download(package: Package, file: Path) -> None:
    asked = (
        f"can't fetch {package}: apt-get must download {package.filename}, or it must lie in the "
        "cache folder"
    )
    if shutil.which("apt-get") is None:
        raise FetchError(f"{asked}; there is no apt-get")
    command = ["apt-get", "download", "--quiet=2", f"{package.name}={package.version}"]
    done = subprocess.run(command, cwd=file.parent, check=False)
    if done.returncode or not file.exists():
        raise FetchError(f"{asked}; apt-get ended with exit status {done.returncode}")


def unpack(file: Path, folder: Path) -> None:
    """Write WordNet's files of a package into a folder that does not exist."""
    folder.mkdir()
    with tarfile.open(fileobj=io.BytesIO(_data(file)), mode="r:*") as archive:
        for member in archive.getmembers():
            path = member.name.removeprefix("./")
            content = archive.extractfile(member)
            if content is None:
                continue
            if path.startswith(DATA):
                (folder / Path(path).name).write_bytes(content.read())
            elif path == LEXNAMES:
                page = gzip.decompress(content.read()).decode("utf-8")
                (folder / "lexnames").write_text(_lexnames(page), "utf-8")


def _data(file: Path) -> bytes:
    """Return the archive of a package's files, which is a member of an `ar` archive."""
    content = file.read_bytes()
    start = 8
    while start < len(content):
        header = content[start : start + 60]
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            return content[start + 60 : start + 60 + size]
        start += 60 + size + size % 2
    raise ValueError(f"file must be a Debian package with a member data.tar: got {file.name}")


def _lexnames(page: str) -> str:
    """Return the table of a manual page as the file that it describes."""
    rows = re.findall(r"^(\d\d)\t((\w+)\.\w+)", page, re.MULTILINE)
    numbers = {part: place + 1 for place, part in enumerate(PARTS_OF_SPEECH)}
    return "".join(f"{number}\t{name}\t{numbers[part]}\n" for number, name, part in rows)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
