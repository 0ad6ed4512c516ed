"""Points: their keys, and a cache that an interrupted run goes on from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from superlora import Plan
from superlora.demo.points import (
    FULL,
    HEAD,
    LORA,
    QUICK,
    Cache,
    Point,
    Result,
    key_of,
    measure_all,
    suite,
)

SURROUNDINGS = {"model_sha256": "ab", "threads": 2}


@dataclasses.dataclass
class Trainer:
    """Stands in for training: counts, and fails at a method if told to."""

    make_result: Callable[..., Any]
    fails_at: str = ""
    trained: list[str] = dataclasses.field(default_factory=list)

    def __call__(self, point: Point, key: str, folder: Path) -> Result:
        (folder / "adapter.safetensors").write_bytes(b"factors")
        if point.method == self.fails_at:
            raise KeyboardInterrupt
        self.trained.append(point.method)
        result: Result = self.make_result(point.family, point.rank, 10, 0.5)
        return dataclasses.replace(result, key=key)


def keys(points: list[Point]) -> list[str]:
    return [key_of(point, QUICK, SURROUNDINGS) for point in points]


def test_a_second_run_trains_nothing(make_result: Callable[..., Any], tmp_path: Path) -> None:
    points = suite(quick=True)
    train = Trainer(make_result)
    cache = Cache(tmp_path / "points")
    first = list(measure_all(points, keys(points), cache, train))
    assert train.trained == [point.method for point in points]
    second = list(measure_all(points, keys(points), cache, train))
    assert train.trained == [point.method for point in points]
    assert not any(result.cached for result in first)
    assert second == [dataclasses.replace(result, cached=True) for result in first]
    list(measure_all(points, keys(points), cache, train, fresh=True))
    assert len(train.trained) == 2 * len(points)


def test_an_interrupted_run_goes_on(make_result: Callable[..., Any], tmp_path: Path) -> None:
    points = suite(quick=True)
    train = Trainer(make_result, fails_at=points[2].method)
    cache = Cache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        list(measure_all(points, keys(points), cache, train))
    assert [cache.find(key) is not None for key in keys(points[:4])] == [True, True, False, False]
    train.fails_at = ""
    list(measure_all(points, keys(points), cache, train))
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted(keys(points))
    assert train.trained == [point.method for point in points]
    assert (cache.folder(keys(points)[2]) / "adapter.safetensors").read_bytes() == b"factors"


def test_a_point_that_cannot_be_read_is_measured_again(
    make_result: Callable[..., Any], tmp_path: Path
) -> None:
    (point, *_) = suite(quick=True)
    (key,) = keys([point])
    cache = Cache(tmp_path)
    for content in ("", "[]", json.dumps({"method": "another format"})):
        cache.folder(key).mkdir(exist_ok=True)
        (cache.folder(key) / "point.json").write_text(content)
        assert cache.find(key) is None
    cache.measure(point, key, Trainer(make_result))
    assert cache.find(key) is not None


def test_whatever_determines_a_point_changes_its_key() -> None:
    point = next(item for item in suite(quick=True) if item.family == LORA)
    assert point.spec is not None
    key = key_of(point, QUICK, SURROUNDINGS)
    assert key == key_of(point, QUICK, SURROUNDINGS)
    others = [
        key_of(dataclasses.replace(point, rate=0.5), QUICK, SURROUNDINGS),
        key_of(dataclasses.replace(point, spec=point.spec.replace(rank=7)), QUICK, SURROUNDINGS),
        key_of(point, dataclasses.replace(QUICK, seed=1), SURROUNDINGS),
        key_of(point, dataclasses.replace(QUICK, epochs=9), SURROUNDINGS),
        key_of(point, dataclasses.replace(QUICK, train=10), SURROUNDINGS),
        key_of(point, QUICK, {**SURROUNDINGS, "threads": 1}),
    ]
    assert len({key, *others}) == len(others) + 1


@pytest.mark.parametrize("quick", [False, True])
def test_the_suite_has_each_method_once_and_a_head_alone(quick: bool) -> None:
    points = suite(quick=quick)
    assert points[0].method == HEAD
    assert points[0].spec is None
    methods = [point.method for point in points]
    assert len(set(methods)) == len(methods)
    assert len(set(keys(points))) == len(points)


def test_the_sizes_are_those_of_the_formulas() -> None:
    shapes = {f"blocks.{block}.{name}": (384, 384) for block in range(12) for name in "qv"}
    sizes = {
        point.method: Plan(point.spec, shapes).num_parameters
        for point in suite(quick=False)
        if point.spec is not None
    }
    for rank in (1, 4):
        assert sizes[f"LoRA r{rank}"] == 24 * 2 * 384 * rank
    for rank in (1, 4, 8):
        assert sizes[f"SuperLoRA 2-D, one group r{rank}"] == (1728 + 2048) * rank
    for kind in ("fastfood", "one-hot"):  # 595 is the root of a tenth of all entries, rounded up
        assert sizes[f"2-D + {kind}, one group r8"] == 2 * 595 * 8
    for rank in (5, 8, 16):
        assert sizes[f"LoRTA 3-D, one group r{rank}"] == rank**3 + (128 + 144 + 192) * rank
    assert sizes["dense"] == 24 * 384**2


def test_the_full_run_has_the_sizes_of_the_text() -> None:
    assert (FULL.train, FULL.validation, FULL.test, FULL.resolution) == (1000, 500, 1500, 84)
