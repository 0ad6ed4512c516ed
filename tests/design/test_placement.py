"""Where a weight lies, and pictures of it."""

import math

import numpy
import pytest
from hypothesis import given

import superlora as sl
from tests.strategies import plans


@given(plans())
def test_the_boxes_hold_the_weight(plan):
    for name, shape in plan.shapes.items():
        found = plan.where(name)
        assert sum(each.stop - each.start for each in found) == math.prod(shape)
        for each in found:
            if not plan.layout.in_place(each.group):
                assert each.boxes == ()
                continue
            cells = numpy.arange(math.prod(each.fold)).reshape(each.fold)
            parts = [cells[tuple(slice(*ends) for ends in box)].ravel() for box in each.boxes]
            assert numpy.concatenate(parts).tolist() == list(range(each.start, each.stop))


def test_an_operation_is_named():
    plan = sl.Plan(sl.glora(2), {"q": (6, 4)})
    (own,) = plan.where("q", operation="add_bias")
    assert own.stop - own.start == 6
    with pytest.raises(KeyError, match="no weight is named 'k'"):
        plan.where("k")


@pytest.mark.parametrize(
    "spec",
    [
        sl.lora(rank=2),
        sl.lorta(rank=2, fold="aligned"),
        sl.lokr(rank=2),
        sl.Spec(rank=2, groups=1, fold="balanced", map=sl.maps.Shuffle()),
        sl.Spec(rank=2, groups=1, fold="balanced", ratio=0.5, map=sl.maps.Fastfood()),
        sl.fourierft(size=5),
        sl.glora(2),
    ],
    ids=["lora", "lorta", "lokr", "shuffled", "mixed", "fourier", "glora"],
)
def test_pictures(spec, tmp_path):
    pytest.importorskip("matplotlib")
    plan = sl.Plan(spec, {f"{index}.q": (12, 8) for index in range(20)})
    plan.plot().savefig(tmp_path / "folds.png")
    operation = None if isinstance(plan.spec, sl.Spec) else "add_weight"
    plan.plot("3.q", operation).savefig(tmp_path / "network.png")
    assert (tmp_path / "folds.png").stat().st_size > 5000


def test_a_band_is_the_weight_it_says():
    pytest.importorskip("matplotlib")
    plan = sl.Plan(sl.Spec(rank=2, groups=1, fold="aligned"), {"q": (6, 4), "v": (3, 4)})
    (place,) = plan.plot().axes
    (image,) = place.images
    drawn = image.get_array()
    assert drawn.shape == (9, 4)
    assert (drawn[:6] == 0).all()
    assert (drawn[6:] == 1).all()


def test_every_shared_label_is_a_line():
    pytest.importorskip("matplotlib")
    plan = sl.Plan(sl.lora(rank=2), {"q": (6, 4)})
    (place,) = plan.plot("q").axes
    texts = [text.get_text() for text in place.texts]
    assert sorted(texts) == ["0.0.factor0", "0.0.factor1", "2", "4", "6"]
