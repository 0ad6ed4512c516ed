"""Folders of images, small ones that are written here."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("optuna")
pytest.importorskip("PIL")

from PIL import Image  # noqa: E402

from superlora.demo.folders import read_folder  # noqa: E402
from superlora.demo.supernet import digest  # noqa: E402
from tests.demo.search_cases import make_vtab  # noqa: E402


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return make_vtab(tmp_path / "dsprites_loc")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Return a folder with ten images of cats and seven of dogs, told apart by their colours."""
    for label, (name, count) in enumerate({"cats": 10, "dogs": 7}.items()):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(count):
            image = Image.new("RGB", (9, 30), (200 * label, number, 0))
            image.save(tmp_path / "pets" / name / f"{number}.png")
    return tmp_path / "pets"


def test_the_parts_are_those_of_the_lists(task: Path) -> None:
    images = read_folder(task, 8, seed=0)
    assert (images.name, images.classes) == ("dsprites_loc", 16)
    assert [len(part) for part in (images.train, images.validation, images.test)] == [32, 16, 16]
    assert images.train.labels.tolist() == [number % 16 for number in range(32)]
    drawn = images.test[torch.tensor([5, 2])]
    assert drawn.labels.tolist() == [5, 2]
    assert drawn.pixels.shape == (2, 3, 8, 8)
    assert drawn.pixels.dtype == torch.uint8
    assert drawn.pixels[0, :, 3, 3].tolist() == [75, 180, 40]
    assert drawn.pixels[1, :, 7, 0].tolist() == [30, 225, 40]


def test_the_digest_is_of_what_is_read(task: Path) -> None:
    before = digest(read_folder(task, 8, seed=0))
    assert digest(read_folder(task, 8, seed=1)) == before  # lists leave nothing to a seed
    Image.new("RGB", (5, 5), (1, 2, 3)).save(task / "images/val200/000001.png")
    assert digest(read_folder(task, 8, seed=0)) != before


def test_class_folders_are_drawn_in_three_parts(classes: Path) -> None:
    images = read_folder(classes, 4, seed=0)
    assert (images.name, images.classes) == ("pets", 2)
    parts = [images.train, images.validation, images.test[torch.arange(len(images.test))]]
    assert [torch.bincount(part.labels).tolist() for part in parts] == [[6, 5], [2, 1], [2, 1]]
    seen = []
    for part in parts:
        red, green = part.pixels[:, 0, 0, 0], part.pixels[:, 1, 0, 0]
        assert torch.equal(red == 200, part.labels == 1)
        seen += list(zip(part.labels.tolist(), green.tolist(), strict=True))
    assert len(set(seen)) == 17
    again, other = (read_folder(classes, 4, seed=seed) for seed in (0, 1))
    assert digest(again) == digest(images) != digest(other)


def test_images_of_any_kind_become_squares_in_colour(classes: Path) -> None:
    Image.linear_gradient("L").save(classes / "cats" / "0.png")
    images = read_folder(classes, 16, seed=0)
    assert images.train.pixels.shape == (11, 3, 16, 16)


def test_paths_may_have_spaces(task: Path) -> None:
    (task / "images/test/000003.png").rename(task / "images/test/an image.png")
    text = (task / "test.txt").read_text().replace("000003.png", "an image.png")
    (task / "test.txt").write_text(text)
    assert read_folder(task, 8, seed=0).test.paths[3].name == "an image.png"


@pytest.mark.parametrize(
    "line",
    [
        "images/test/000000.png",
        "images/test/000000.png x",
        "images/test/000000.png -1",
        "images/test/000000.png 1_0",
        "images/test/999999.png 1",
        "../dsprites_loc/images/test/000000.png 1",
        "",
    ],
)
def test_a_bad_line_is_named(task: Path, line: str) -> None:
    lines = (task / "test.txt").read_text().splitlines()
    (task / "test.txt").write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(ValueError, match=r"test\.txt, line 2, must be the path of an image"):
        read_folder(task, 8, seed=0)


@pytest.mark.parametrize("name", ["val200", "test"])
def test_an_image_in_two_parts_is_named(task: Path, name: str) -> None:
    with (task / f"{name}.txt").open("a") as file:
        file.write("images/train800/000000.png 0\n")
    with pytest.raises(ValueError, match=r"in one part: got .*train800/000000\.png in two"):
        read_folder(task, 8, seed=0)


def test_an_empty_part_is_named(task: Path) -> None:
    (task / "val200.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"images in all parts: got \[32, 0, 16\]"):
        read_folder(task, 8, seed=0)


def test_what_is_no_folder_of_images_is_named(classes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data must be a folder of images: got .*none"):
        read_folder(tmp_path / "none", 8, seed=0)
    with pytest.raises(ValueError, match=r"cats must have images in all parts: got"):
        read_folder(classes / "cats", 8, seed=0)
    for path in (classes / "dogs").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"\.png must be an image"):
        read_folder(classes, 8, seed=0)
