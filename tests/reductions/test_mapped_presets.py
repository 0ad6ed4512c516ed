"""How many numbers are trained with a fixed map, the realised ratio, and where they start."""

from __future__ import annotations

import numpy
import pytest

import superlora as sl
from superlora import maps

# Query and value of ViT-B, 14,155,776 entries.
VIT = {f"blocks.{layer}.{part}": (768, 768) for layer in range(12) for part in "qv"}
DENSE = {1.0: 14_155_776, 0.5: 7_077_888, 0.25: 3_538_944, 0.1: 1_415_578, 0.01: 141_558}


@pytest.mark.parametrize(("ratio", "expected"), DENSE.items())
def test_dense_times_rho(ratio, expected):
    plan = sl.Plan(sl.dense(groups=1, map=maps.Fastfood(), ratio=ratio), VIT)
    assert plan.num_parameters == expected
    realised = expected / 14_155_776
    assert f"realised ratio {realised:.6g}, asked {ratio:.6g}" in plan.describe()


@pytest.mark.parametrize("groups", [2, 4, 8, 12, 24, "weight", "layer"])
@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.1])
def test_dense_times_rho_of_many_groups_rounds_each_up(groups, ratio):
    plan = sl.Plan(sl.dense(groups=groups, map=maps.Fastfood(), ratio=ratio), VIT)
    count = {"weight": 24, "layer": 12}.get(groups, groups)
    each = -(-14_155_776 // count * round(100 * ratio) // 100)
    assert plan.num_parameters == count * each
    if ratio != 0.1:
        assert plan.num_parameters == DENSE[ratio]


def test_a_fold_before_the_map_is_a_cover_and_nothing_is_cropped():
    # 10 % are 1,415,578 entries, whose only exact fold is 2 x 707,789.
    spec = sl.lora(8, groups=1, fold="balanced", map=maps.Fastfood(), ratio=0.1)
    plan = sl.Plan(spec, VIT)
    (group,) = plan.layout.groups
    assert (group.fold, group.before) == ((1190, 1190), 1_416_100)
    assert plan.num_parameters == 8 * 2 * 1190
    assert "realised ratio 0.100037, asked 0.1" in plan.describe()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (sl.fourierft(), 24 * 1000),
        (sl.waveft(), 24 * 2592),
        (sl.c3a(), 24 * 768 * 3),
        (sl.did(), 1000),
        (sl.said(), 1000 + 24),
        (sl.unilora(), 256),
        (sl.nola(), 24 * 2 * 256),
        (sl.lora(8, map=maps.Separable(), ratio=0.25), 24 * 8 * (384 + 384)),
        (sl.dense(map=maps.Broadcast(along="inputs")), 24 * 768),
        (sl.dense(map=maps.Broadcast(along="outputs")), 24 * 768),
        (sl.dense(map=maps.Broadcast()), 24),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_counts_of_vit(spec, expected):
    plan = sl.Plan(spec, VIT)
    assert plan.num_parameters == expected
    assert f"{expected:,} trainable parameters" in plan.describe()


SMALL = {"0.q": (9, 6), "1.q": (5, 8)}
ZERO = {
    "fourierft": "0.0.core",
    "waveft": "0.0.core",
    "did": "0.0.core",
    "said": "0.0.factor0",
    "nola": "0.0.factor0_theta",
}


@pytest.mark.parametrize("name", ["fourierft", "waveft", "did", "said", "unilora", "nola"])
def test_where_a_preset_starts(name):
    plan = sl.Plan(getattr(sl, name)(size=5), SMALL)
    factors = plan.init(seed=1)
    zero = {block for block, values in factors.items() if not values.any()}
    deltas = plan.deltas(factors).values()
    if name == "unilora":  # at zero it would have no gradient, so it starts small
        assert not zero
        assert all(0 < abs(delta).max() < 1e-2 for delta in deltas)
        return
    assert ZERO[name] in zero
    assert not any(delta.any() for delta in deltas)
    assert (zero == factors.keys()) == (name in ("fourierft", "waveft", "did"))
    for block in zero:  # whose change alone changes an update
        moved = {**factors, block: numpy.ones_like(factors[block])}
        assert any(delta.any() for delta in plan.deltas(moved).values())


def test_every_factor_of_nola_has_its_own_matrices_with_overrides_too():
    equal = {f"{layer}.q": (6, 6) for layer in range(3)}
    spec = sl.nola(3, 2, overrides={"1.q": {"scale": 0.5}, "2.q": {"seed": 1}})
    plan = sl.Plan(spec, equal)
    matrices = [
        numpy.stack([inner.map.apply(unit, inner.size) for unit in numpy.eye(3)])
        for inner in plan.layout.inner.values()
    ]
    assert len(matrices) == 6
    for index, one in enumerate(matrices):
        for other in matrices[:index]:
            assert abs(one - other).min() > 0
