"""WordNet from Debian's package: the cache, the digest, what is read of it."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("torch")

import wordnet

from superlora.demo.fetch import FetchError


def package(folder: Path) -> Path:
    """Write a Debian package of two files, as `dpkg-deb` lays one out."""
    content = io.BytesIO()
    page = gzip.compress(b".TH LEXNAMES\n00\tadj.all\tall adjective\n01\tnoun.act\tacts\n")
    with tarfile.open(fileobj=content, mode="w:xz") as archive:
        for name, own in (
            (f"./{wordnet.DATA}data.noun", b"nouns"),
            (f"./{wordnet.LEXNAMES}", page),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(own)
            archive.addfile(member, io.BytesIO(own))
    file = folder / "wordnet-base_1%3a0_all.deb"
    parts = (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"odd"),
        ("data.tar.xz", content.getvalue()),
    )
    with file.open("wb") as out:
        out.write(b"!<arch>\n")
        for name, own in parts:
            out.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(own):<10}`\n".encode())
            out.write(own + b"\n" * (len(own) % 2))
    return file


def test_the_package_is_read_from_the_cache_and_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPERLORA_CACHE", str(tmp_path))
    digest = hashlib.sha256(package(tmp_path).read_bytes()).hexdigest()
    own = wordnet.Package("wordnet-base", "1:0", digest)
    folder = wordnet.wordnet_folder(own)
    assert (folder / "data.noun").read_bytes() == b"nouns"
    assert (folder / "lexnames").read_text() == "00\tadj.all\t3\n01\tnoun.act\t1\n"
    package(tmp_path).unlink()
    assert wordnet.wordnet_folder(own) == folder


def test_a_package_that_cannot_be_had_is_one_line_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = wordnet.Package("wordnet-base", "1:0", "0" * 64)
    monkeypatch.setattr(wordnet.shutil, "which", lambda name: None)
    with pytest.raises(FetchError, match=r"can't fetch wordnet-base 1:0: .* no apt-get") as raised:
        wordnet.fetched(own, tmp_path)
    assert "\n" not in str(raised.value)

    monkeypatch.setattr(wordnet, "_download", lambda own, file: package(file.parent))
    with pytest.raises(FetchError, match=r"wordnet-base 1:0: sha256 must be 0000.*, got "):
        wordnet.fetched(own, tmp_path)
    assert not list(tmp_path.iterdir())
