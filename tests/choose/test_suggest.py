"""`suggest` and `compare`: what fits, how near it comes, what is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import superlora as sl

SHAPES = {f"{layer}.{part}": (16, 12) for layer in range(2) for part in "qv"}
RNG = np.random.default_rng(0)
DELTAS = {
    name: RNG.normal(size=(shape[0], 12)) * 0.5 ** np.arange(12) * (1 + 3 * (name == "1.v"))
    for name, shape in SHAPES.items()
}


def test_each_family_has_the_largest_rank_of_the_budget():
    found = sl.suggest(SHAPES, budget=400)
    assert [row.family for row in found][:3] == ["lora", "lokr", "loha"]
    assert len(found) == 13
    assert not found.left_out
    for row in found:
        plan = sl.Plan(row.spec, SHAPES)
        assert row.num_parameters == plan.num_parameters <= 400
        assert row.nbytes == 4 * row.num_parameters
        assert (row.error, row.factors) == (None, None)
    assert str(found).splitlines()[-1].split() == ["waveft", "size", "100", "400", "1,600"]
    rank = found[0].spec.rank
    assert sl.Plan(sl.lora(rank + 1), SHAPES).num_parameters > 400


@pytest.mark.parametrize("dtype", ["float16", np.float64, np.dtype("float32")])
def test_a_budget_of_bytes(dtype):
    width = np.dtype(dtype).itemsize
    found = sl.suggest(SHAPES, budget_bytes=401 * width - 1, dtype=dtype)
    assert [row.spec for row in found] == [row.spec for row in sl.suggest(SHAPES, budget=400)]
    assert found[0].nbytes == width * found[0].num_parameters


def test_dtypes_of_torch():
    torch = pytest.importorskip("torch")
    assert sl.suggest(SHAPES, budget=400, dtype=torch.bfloat16)[0].nbytes == 2 * 336


def test_sizes_by_weight_are_said():
    scores = dict(zip(SHAPES, (1.0, 1.0, 4.0, 8.0), strict=True))
    found = sl.suggest(SHAPES, budget=120, families=["waveft"], sensitivity=scores)
    sizes = [dict(fields)["size"] for _, fields in found[0].spec.overrides]
    sizes += [found[0].spec.size]
    assert sum(found[0].spec.of(name).size for name in SHAPES) <= 120
    assert f"size {min(sizes)} to {max(sizes)}" in str(found)


def test_families_that_do_not_fit_say_why():
    shapes = {**SHAPES, "2.up": (64, 12)}
    found = sl.suggest(shapes, budget=100)
    assert found.left_out["lora"] == "takes 188 parameters at rank 1"
    assert "whole weights of one shape" in found.left_out["lotr"]
    assert "left out: lora, takes 188 parameters at rank 1" in str(found)
    assert {row.family for row in found}.isdisjoint(found.left_out)


def test_families_of_ones_own():
    def mine(rank):
        return sl.Spec(rank=rank, order=3, groups=1, fold="balanced", core="identity")

    found = sl.suggest(SHAPES, budget=300, families=[mine, "fourierft", sl.glora])
    assert [row.family for row in found] == ["mine", "fourierft"]
    assert found[1].num_parameters == 300
    assert "parameters at rank 1" in found.left_out["glora"]
    named = sl.suggest(SHAPES, budget=300, families={"a": mine, "b": "lotr"})
    assert [row.family for row in named] == ["a", "b"]


def test_updates_rank_the_candidates():
    found = sl.suggest(DELTAS, budget=400, families=["lora", "lokr", "lotr", "lorta"])
    errors = [row.error for row in found]
    assert errors == sorted(errors)
    for row in found:
        plan = sl.Plan(row.spec, SHAPES)
        rest = total = 0.0
        for name, delta in plan.deltas(row.factors).items():
            rest += ((DELTAS[name] - delta) ** 2).sum()
            total += (DELTAS[name] ** 2).sum()
        assert row.error == pytest.approx(np.sqrt(rest / total), rel=1e-9)
        assert row.seconds >= 0


def test_ranks_by_weight_are_those_of_the_largest_singular_values():
    found = sl.suggest(DELTAS, budget=10 * 28, families=["lora"])
    best, uniform = found
    assert best.family == "lora, ranks by weight"
    assert best.num_parameters == 280
    assert best.error < uniform.error
    values = {name: np.linalg.svd(delta, compute_uv=False) for name, delta in DELTAS.items()}
    least = np.sort(np.concatenate([*values.values()]))[-10]
    for name, own in values.items():
        assert best.spec.of(name).rank == (own >= least).sum()
    lost = sum((own[own < least] ** 2).sum() for own in values.values())
    total = sum((own**2).sum() for own in values.values())
    assert best.error == pytest.approx(np.sqrt(lost / total), rel=1e-9)


def test_weights_without_a_rank_are_lost():
    deltas = {**DELTAS, "0.q": np.zeros((16, 12))}
    best = sl.suggest(deltas, budget=2 * 28, families=["lora"])[0]
    assert [best.spec.of(name) for name in SHAPES] == [None, None, None, sl.lora(2)]
    total = sum((delta**2).sum() for delta in deltas.values())
    kept = (np.linalg.svd(deltas["1.v"], compute_uv=False)[:2] ** 2).sum()
    assert best.error == pytest.approx(np.sqrt(1 - kept / total), rel=1e-9)


def test_one_table_row_where_all_weights_get_one_rank():
    deltas = {name: DELTAS["0.q"] for name in SHAPES}
    assert [row.family for row in sl.suggest(deltas, budget=230, families=["lora"])] == ["lora"]


def test_ranks_follow_scores():
    scores = {"0.q": 0.0, "0.v": 1.0, "1.q": 2.0, "1.v": 4.0}
    found = sl.suggest(SHAPES, budget=7 * 28, sensitivity=scores)
    assert [found[0].spec.of(name) and found[0].spec.of(name).rank for name in SHAPES] == [
        None, 1, 2, 4,
    ]  # fmt: skip
    assert all(row.num_parameters <= 7 * 28 for row in found)
    assert "share blocks" in found.left_out["lorta"]
    assert {"lora", "loha", "tt_lora"} <= {row.family for row in found}
    assert "0 to 4" in str(found)


def test_convolutions_and_stacks():
    shapes = {"conv": (8, 4, 3, 3), "experts": sl.Axes(stack=3, out=8, in_=6)}
    plan = sl.Plan(sl.lora(2), shapes)
    factors = {name: RNG.normal(size=shape) for name, shape in plan.factor_shapes.items()}
    deltas = plan.deltas(factors)
    found = sl.suggest(deltas, budget=500, families=["lora"], shapes=shapes)
    assert found[0].error < 1e-12
    with pytest.raises(ValueError, match=r"Axes\(stack=3, out=8, in_=6\)"):
        sl.suggest(deltas, budget=500)
    with pytest.raises(ValueError, match=r"'conv' has \(8, 4\) and \(8, 4, 3, 3\)"):
        sl.suggest(deltas, budget=500, shapes={**shapes, "conv": (8, 4)})
    with pytest.raises(ValueError, match="'experts' has None and"):
        sl.suggest(deltas, budget=500, shapes={"conv": (8, 4, 3, 3)})


def test_any_library(xp):
    deltas = {name: xp.array(delta) for name, delta in DELTAS.items()}
    own = sl.suggest(deltas, budget=400, families=["lora", "lotr"])
    plain = sl.suggest(DELTAS, budget=400, families=["lora", "lotr"])
    assert [row.spec for row in own] == [row.spec for row in plain]
    assert all(xp.owns(block) for block in own[0].factors.values())


def with_value(value):
    changed = {name: delta.copy() for name, delta in DELTAS.items()}
    changed["0.v"][3, 2] = value
    return changed


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        (SHAPES, {}, TypeError, "one of budget and budget_bytes"),
        (SHAPES, {"budget": 9, "budget_bytes": 9}, TypeError, "one of budget and budget_bytes"),
        (SHAPES, {"budget": 0}, ValueError, "budget must be at least 1"),
        (SHAPES, {"budget": 1.5}, TypeError, "budget must be an integer"),
        (SHAPES, {"budget_bytes": 3}, ValueError, "budget_bytes must be at least 4"),
        (SHAPES, {"budget": 9, "dtype": "int8"}, ValueError, "dtype must be one of"),
        (SHAPES, {"budget": 3}, ValueError, "at least 4, what 'waveft' takes .*: got 3"),
        (SHAPES, {"budget_bytes": 8}, ValueError, "budget_bytes must be at least 16, .*got 8"),
        (SHAPES, {"budget": 9, "families": "lora"}, TypeError, "families must be a sequence"),
        (SHAPES, {"budget": 9, "families": []}, ValueError, "families must name one"),
        (SHAPES, {"budget": 9, "families": ["x"]}, ValueError, "name presets: got 'x'"),
        (SHAPES, {"budget": 9, "families": {"x": 3}}, TypeError, "must be a function of a rank"),
        (SHAPES, {"budget": 9, "families": ["bitfit"]}, TypeError, "'bitfit'.* a rank alone"),
        ({"q": (3, 4), "v": (4, 3)}, {"budget": 99, "families": ["lotr"]}, ValueError, "lotr: f"),
        (SHAPES, {"budget": 99, "restarts": 2}, TypeError, "restarts must come with updates"),
        (SHAPES, {"budget": 99, "shapes": SHAPES}, TypeError, "shapes must come with updates"),
        ({}, {"budget": 99}, ValueError, "at least one weight"),
        ([1], {"budget": 99}, TypeError, "must map names"),
        (DELTAS, {"budget": 99, "sensitivity": {}}, TypeError, "sensitivity must come with shapes"),
        (with_value(np.nan), {"budget": 99}, ValueError, r"deltas\['0.v'\].*nan at \(3, 2\)"),
        (with_value(-np.inf), {"budget": 99}, ValueError, r"deltas\['0.v'\].*-inf at \(3, 2\)"),
        ({"q": np.zeros((3, 2))}, {"budget": 99}, ValueError, "all of them are zero"),
        ({"q": np.ones((3, 2), int)}, {"budget": 99}, TypeError, "floating-point"),
        ({"q": np.ones((3, 2)), "v": (3, 2)}, {"budget": 99}, TypeError, r"\['v'\] must be an arr"),
        (DELTAS, {"budget": 400, "iterationz": 3}, TypeError, "iterationz"),
    ],
)  # fmt: skip
def test_what_is_refused(weights, options, error, message):
    with pytest.raises(error, match=message):
        sl.suggest(weights, **options)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"0.q": 1.0}, "alone of '0.v', '1.q', '1.v'"),
        (dict.fromkeys(SHAPES, 0.0), "a score above 0"),
        (dict.fromkeys(SHAPES, -1.0), "not below 0: got -1"),
        (dict.fromkeys(SHAPES, float("nan")), "must be finite"),
    ],
)
def test_scores_that_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        sl.suggest(SHAPES, budget=400, sensitivity=scores)


def test_a_comparison():
    specs = {"lora": [sl.lora(rank) for rank in (1, 4, 12)], "lotr": sl.lotr(3)}
    found = sl.compare(specs, DELTAS, dtype="float16", seed=3)
    assert [row.family for row in found] == ["lora", "lora", "lora", "lotr"]
    assert [row.spec for row in found] == [*specs["lora"], specs["lotr"]]
    errors = [row.error for row in found]
    assert errors[0] > errors[1] > errors[2] < 1e-12
    assert found[0].nbytes == 2 * found[0].num_parameters == 2 * 4 * 28
    lines = str(found).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1


def test_a_picture_has_a_curve_a_family(tmp_path):
    pytest.importorskip("matplotlib")
    specs = {"lora": [sl.lora(4), sl.lora(1), sl.lora(12)], "lotr": sl.lotr(3)}
    found = sl.compare(specs, DELTAS)
    figure = found.plot()
    figure.savefig(tmp_path / "errors.png")
    (place,) = figure.axes
    assert [line.get_label() for line in place.lines] == ["lora", "lotr"]
    counts, errors = place.lines[0].get_data()
    assert list(counts) == sorted(row.num_parameters for row in found if row.family == "lora")
    assert min(errors) > 0  # what is exact is drawn too
    with pytest.raises(ValueError, match="must be fitted"):
        sl.suggest(SHAPES, budget=400).plot()


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ({}, TypeError, "specs must map"),
        ([sl.lora(1)], TypeError, "specs must map"),
        ({"a": 3}, TypeError, r"specs\['a'\] must be a superlora.Spec"),
        ({"a": [sl.glora(2)]}, TypeError, r"specs\['a'\] must be a superlora.Spec"),
        ({"a": sl.Spec(order=3, groups=1, fold=(2, 2, 2))}, ValueError, r"specs\['a'\]: fold"),
    ],
)
def test_comparisons_that_are_refused(specs, error, message):
    with pytest.raises(error, match=message):
        sl.compare(specs, DELTAS)
    with pytest.raises(ValueError, match="all of them are zero"):
        sl.compare({"lora": sl.lora(1)}, {"q": np.zeros((3, 2))})


def test_candidates_are_a_tuple_that_survives_copies():
    found = sl.suggest(SHAPES, budget=100, families=["lorta", "lotr", "loha"])
    again = pickle.loads(pickle.dumps(found))
    assert again == found == tuple(found)
    assert again.left_out == found.left_out == {"loha": "takes 224 parameters at rank 1"}
    assert str(again) == str(found)
    assert found[:1] == (found[0],)
