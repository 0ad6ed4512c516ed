"""`spectrum`, against numpy's loops and what decompositions leave."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import superlora as sl

SHAPES = {f"{layer}.{part}": (12, 8) for layer in range(2) for part in "qv"}
RNG = np.random.default_rng(0)
DELTAS = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}


def planted(spec, shapes=SHAPES):
    plan = sl.Plan(spec, shapes)
    return plan.deltas({n: RNG.normal(size=own) for n, own in plan.factor_shapes.items()})


def test_weights(xp):
    found = sl.spectrum({name: xp.array(delta) for name, delta in DELTAS.items()})
    assert list(found.values) == list(SHAPES)
    for name, delta in DELTAS.items():
        own = np.linalg.svd(delta, compute_uv=False)
        np.testing.assert_allclose(found.values[name], own, rtol=1e-12)
        np.testing.assert_allclose(found.shares[name], (own**2).cumsum() / (own**2).sum())
        parts = own / own.sum()
        assert found.effective_ranks[name] == pytest.approx(np.exp(-(parts * np.log(parts)).sum()))
        assert found.values[name].dtype == np.float64


def test_half_precision_of_torch():
    torch = pytest.importorskip("torch")
    deltas = {"q": torch.eye(4, dtype=torch.bfloat16, requires_grad=True)}
    assert list(sl.spectrum(deltas).values["q"]) == [1, 1, 1, 1]


def test_ranks_for_a_share():
    deltas = {"q": np.diag([3.0, 2.0, 1.0, 0.0]), "v": np.zeros((4, 4)), "o": 1e-200 * np.eye(4)}
    found = sl.spectrum(deltas)
    assert found.rank_for(0.64) == {"q": 1, "v": 0, "o": 3}
    assert found.rank_for(1) == {"q": 3, "v": 0, "o": 4}
    assert found.effective_ranks["v"] == 0
    assert found.effective_ranks["o"] == pytest.approx(4)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
        found.rank_for(0)


def unfolding(tensor, modes):
    """The matrix of a tensor by loops: rows by some modes, columns by the others."""
    others = [mode for mode in range(tensor.ndim) if mode not in modes]
    rows = [tensor.shape[mode] for mode in modes]
    columns = [tensor.shape[mode] for mode in others]
    matrix = np.empty((np.prod(rows), np.prod(columns)))
    for index in itertools.product(*map(range, tensor.shape)):
        row = np.ravel_multi_index([index[mode] for mode in modes], rows)
        matrix[row, np.ravel_multi_index([index[mode] for mode in others], columns)] = tensor[index]
    return matrix


def test_unfoldings_of_a_fold_that_crops():
    deltas = {"q": RNG.normal(size=(7, 5)), "v": RNG.normal(size=(3, 5))}
    spec = sl.Spec(rank=2, order=3, groups=1, fold=(4, 4, 4))
    found = sl.spectrum(deltas, spec=spec)
    vector = np.zeros(64)
    vector[:50] = np.concatenate([delta.ravel() for delta in deltas.values()])
    tensor = vector.reshape(4, 4, 4)
    for mode in range(3):
        own = np.linalg.svd(unfolding(tensor, [mode]), compute_uv=False)
        np.testing.assert_allclose(found.values[f"group 0, mode {mode}"], own, atol=1e-12)


def test_groups_take_their_own_entries():
    found = sl.spectrum(DELTAS, spec=sl.Spec(groups="layer", fold="balanced"))
    assert list(found.values)[4:] == ["group 0, mode 0", "group 1, mode 0"]
    vector = np.concatenate([DELTAS["1.q"].ravel(), DELTAS["1.v"].ravel()])
    own = np.linalg.svd(vector.reshape(12, 16), compute_uv=False)
    np.testing.assert_allclose(found.values["group 1, mode 0"], own, atol=1e-12)


@pytest.mark.parametrize(
    ("spec", "ranks"),
    [
        (sl.lotr(3), {"mode 0": 4, "mode 1": 3, "mode 2": 3}),
        (sl.lorta(2), {"mode 0": 2, "mode 1": 2, "mode 2": 2}),
        (sl.metatt((2, 3)), {"modes to 0": 2, "modes to 1": 3}),
        (sl.Spec(rank="full", groups=1, splits=2, fold="balanced"), {"split 0": 1}),
        (
            sl.Spec(rank="full", groups=1, splits=2, fold="balanced", terms=3),
            {"split 0": 3},
        ),
        (
            sl.Spec(rank="full", groups=1, splits=3, fold="balanced"),
            {"split 0": 1, "split 1": 1, "split 2": 1},
        ),
    ],
    ids=["stack", "tucker", "train", "kronecker", "sum", "three"],
)
def test_ranks_of_the_unfoldings_are_those_of_the_spec(spec, ranks):
    found = sl.spectrum(planted(spec), spec=spec)
    names = [name for name in found.values if name.startswith("group")]
    assert names == [f"group 0, {own}" for own in ranks]
    for name, own in ranks.items():
        values = found.values[f"group 0, {name}"]
        assert (values > 1e-10 * values[0]).sum() == own


@pytest.mark.parametrize("spec", [sl.lotr(2), sl.fact_tk(3), sl.metatt(2), sl.lorta(3)])
def test_unfoldings_bound_the_error_of_a_fit(spec):
    (row,) = sl.compare({"one": spec}, DELTAS)
    found = sl.spectrum(DELTAS, spec=spec)
    split = sl.Plan(spec, SHAPES).layout.groups[0].splits[0]
    lost = [
        1 - found.shares[name][rank - 1]
        for name, rank in zip(list(found.values)[4:], split.ranks, strict=True)
    ]
    assert max(lost) - 1e-12 <= row.error**2 <= sum(lost) + 1e-12


def test_a_table_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = sl.spectrum(DELTAS, spec=sl.lotr(2))
    lines = str(found).splitlines()
    assert len(lines) == 8
    assert len({len(line) for line in lines}) == 1
    figure = found.plot()
    figure.savefig(tmp_path / "few.png")
    assert len(figure.axes[0].lines) == 7
    assert len(figure.legends) == 1
    many = sl.spectrum({str(i): np.diag([1.0, 0.0, i]) for i in range(30)}).plot()
    many.savefig(tmp_path / "many.png")
    assert not many.legends


@pytest.mark.parametrize(
    ("deltas", "spec", "error", "message"),
    [
        ({"q": np.full((3, 2), np.nan)}, None, ValueError, r"deltas\['q'\] must be finite"),
        ({"q": np.zeros((3, 2))}, None, ValueError, "all of them are zero"),
        ({}, None, ValueError, "at least one weight"),
        (3, None, TypeError, "deltas must map"),
        (DELTAS, sl.glora(2), TypeError, "spec must be a superlora.Spec"),
        (DELTAS, sl.fourierft(7), ValueError, "Fourier moves those of group 0"),
        ({"q": np.ones((3, 2)), "v": np.ones((2, 2))}, sl.lotr(2), ValueError, "one shape"),
    ],
)
def test_what_is_refused(deltas, spec, error, message):
    with pytest.raises(error, match=message):
        sl.spectrum(deltas, spec=spec)
