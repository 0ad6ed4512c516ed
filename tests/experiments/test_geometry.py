"""Spectra and overlaps of updates that are made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from experiments import geometry  # noqa: E402
from torch import Tensor  # noqa: E402


def along(size: int, *places: int, scale: float = 1.0) -> Tensor:
    """Return a matrix of rank len(places), with unit vectors on both sides."""
    own = torch.zeros(size, size, dtype=torch.float64)
    for order, place in enumerate(places):
        own[place, place] = scale / (1 + order)
    return own


def test_spectrum_and_stable_rank() -> None:
    updates = geometry.decomposed({"0.q": along(6, 0, 1), "1.q": along(6, 2, 3, scale=7.0)})
    # Of 1 and 1/2: shares of 4/5 and 1/5, and a stable rank of 5/4.
    assert geometry.spectrum(updates, 3) == pytest.approx([0.8, 0.2, 0.0])
    assert geometry.stable_rank(updates) == pytest.approx(1.25)


def test_overlap_is_one_for_a_subspace_and_a_share_by_chance() -> None:
    basis = torch.linalg.qr(torch.randn(200, 4, dtype=torch.float64))[0]
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    other = torch.linalg.qr(torch.randn(200, 4, dtype=torch.float64))[0]
    assert geometry.overlap(basis, basis @ rotation) == pytest.approx(1.0)
    assert geometry.overlap(basis, other) == pytest.approx(4 / 200, abs=0.03)


def test_what_seeds_families_and_layers_share() -> None:
    one = geometry.decomposed({"0.q": along(8, 0, 1, 2, 3), "1.q": along(8, 0, 1, 2, 3)})
    two = geometry.decomposed({"0.q": along(8, 4, 5, 6, 7), "1.q": along(8, 0, 1, 6, 7)})
    found = geometry.compared({("A", 0): one, ("A", 1): one, ("B", 0): two, ("B", 1): two})
    assert found["overlap"]["A"]["A"] == pytest.approx(1.0)
    assert found["overlap"]["A"]["B"] == pytest.approx((0 + 0.5) / 2)
    assert found["overlap"]["B"]["A"] == found["overlap"]["A"]["B"]
    assert found["layers"]["A"] == pytest.approx([1.0, 1.0])
    assert found["layers"]["B"] == pytest.approx([0.5, 0.5])
    assert found["by_chance"] == 0.5


def test_the_table_and_the_figure_are_of_what_was_written(tmp_path: Path) -> None:
    one = geometry.decomposed({"0.q": along(8, 0, 1, 2, 3), "1.q": along(8, 4, 1, 2, 3)})
    made = geometry.compared({("A", 0): one, ("A", 1): one, ("B", 0): one, ("B", 1): one})
    geometry.write(made, tmp_path)
    again = geometry.read(tmp_path)
    assert again == json.loads(json.dumps(made))
    assert geometry.table(again).splitlines()[2] == "| A | 1.4 | 0.75 | 0.75 |"
    assert geometry.overlaps(again).splitlines()[0] == "| overlap with | 1 | 2 |"
    assert geometry.overlaps(again).splitlines()[3] == "| 2. B | 1.00 | 1.00 |"
    pytest.importorskip("matplotlib")
    geometry.draw(again, tmp_path / "own.svg")
    first = (tmp_path / "own.svg").read_bytes()
    geometry.draw(again, tmp_path / "own.svg")
    assert (tmp_path / "own.svg").read_bytes() == first
