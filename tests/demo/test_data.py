"""Digits: reading, splitting, preparing."""

from __future__ import annotations

import gzip

import numpy
import pytest

torch = pytest.importorskip("torch")

from superlora.demo.data import Images, prepare, read_digits, split  # noqa: E402


def numbered(each: int) -> Images:
    """Return images that can be told apart: the first pixels hold the image's number."""
    count = 10 * each
    pixels = torch.zeros(count, 28, 28, dtype=torch.uint8)
    pixels[:, 0, 0] = torch.arange(count) % 256
    pixels[:, 0, 1] = torch.arange(count) // 256
    return Images(pixels, torch.arange(count) % 10)


def numbers(images: Images) -> list[int]:
    return [int(image[0, 0]) + 256 * int(image[0, 1]) for image in images.pixels]


def test_parts_are_balanced_and_disjoint() -> None:
    parts = split(numbered(50), train=200, validation=100, test=150, seed=0)
    seen: list[int] = []
    for part, size in ((parts.train, 200), (parts.validation, 100), (parts.test, 150)):
        assert len(part) == size
        assert torch.bincount(part.labels).tolist() == [size // 10] * 10
        assert [number % 10 for number in numbers(part)] == part.labels.tolist()
        seen += numbers(part)
    assert len(set(seen)) == len(seen) == 450


def test_a_seed_decides_the_split() -> None:
    sizes = {"train": 100, "validation": 50, "test": 50}
    first, again, other = (split(numbered(30), **sizes, seed=seed) for seed in (0, 0, 1))
    assert numbers(first.train) == numbers(again.train)
    assert numbers(first.train) != numbers(other.train)
    assert first.train.labels.tolist() != sorted(first.train.labels.tolist())


@pytest.mark.parametrize("size", [0, 5, 101])
def test_a_part_that_cannot_be_balanced_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"train must be a positive multiple of 10: got {size}"):
        split(numbered(10), train=size, validation=10, test=10, seed=0)


def test_the_file_is_read() -> None:
    rows = numpy.arange(3 * 785).reshape(3, 785) % 256
    rows[:, -1] = (7, 0, 9)
    text = "\n".join(",".join(map(str, row)) for row in rows)
    images = read_digits(gzip.compress(text.encode()))
    assert images.labels.tolist() == [7, 0, 9]
    assert images.pixels.dtype == torch.uint8
    assert images.pixels[2].flatten().tolist() == rows[2, :-1].tolist()


def test_prepared_images_are_normalised() -> None:
    pixels = torch.stack([torch.zeros(28, 28), torch.full((28, 28), 255)]).to(torch.uint8)
    ready = prepare(pixels, 56)
    assert ready.shape == (2, 3, 56, 56)
    assert ready.dtype == torch.float32
    black = torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    white = torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225])
    torch.testing.assert_close(ready[0, :, 5, 5], black)
    torch.testing.assert_close(ready[1, :, 5, 5], white)
