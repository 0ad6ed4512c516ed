"""Fits: what is optimal, what was planted, every step against dense least squares, bad input."""

from __future__ import annotations

import threading
import warnings

import numpy
import pytest
import tensorly
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

import superlora as sl
from superlora.algebra import fit as fits
from superlora.algebra.least_squares import Problem
from superlora.random import normal
from tests.strategies import draw_factors, problems

SHAPES = {"a.0.q": (24, 18), "a.0.v": (24, 18), "a.1.q": (24, 18), "a.1.v": (24, 18)}
ONE = {"q": (24, 18)}
M = sl.maps
# What a fit finds again, from one of a few starts.
PLANTED = {
    "dense": (sl.dense(), SHAPES),
    "lora": (sl.lora(3, alpha=6), SHAPES),
    "lora above the sides": (sl.lora(20, dense_from="never"), ONE),
    "lokr": (sl.lokr(4, scale=-0.5), SHAPES),
    "lokr of two": (sl.lokr(2, decompose_both=True), SHAPES),
    "krona": (sl.krona(), SHAPES),
    "cdka": (sl.cdka(2, 6, 3), SHAPES),
    "lonkr": (sl.lonkr(2, splits=3), SHAPES),
    "loha": (sl.loha(1), SHAPES),
    "vera": (sl.vera(8), SHAPES),
    "tied lora": (sl.tied_lora(2), ONE),
    "share lora": (sl.share_lora(2), {"q": (24, 18), "v": (12, 9)}),
    "lora-fa": (sl.lora_fa(3), SHAPES),
    "tt lora": (sl.tt_lora(2), SHAPES),
    "gralora": (sl.gralora(4, 2), SHAPES),
    "monarch": (sl.monarch(2), SHAPES),
    "miss": (sl.miss(6), SHAPES),
    "lotr": (sl.lotr(4), SHAPES),
    "fact_tk": (sl.fact_tk(3), SHAPES),
    "metatt": (sl.metatt(3), SHAPES),
    "tenslora": (sl.tenslora(2, fold=(2, 2, 24, 18)), SHAPES),
    "lorta 3": (sl.lorta(3), SHAPES),
    "lorta 4": (sl.lorta(2, order=4), SHAPES),
    "cp": (sl.Spec(rank=3, order=3, groups=1, fold="balanced", core="identity"), SHAPES),
    "2-D, cut anywhere": (sl.Spec(rank=3, groups=3, fold="balanced"), SHAPES),
    "padded": (sl.Spec(rank=2, groups=5, fold="balanced", cut="pad"), SHAPES),
    "cropped": (sl.Spec(rank=2, groups=1, fold="balanced"), {"q": (13, 11), "v": (7, 5)}),
    "terms": (sl.Spec(rank=2, terms=2), SHAPES),
    "fastfood": (sl.lora(2, groups=1, fold="balanced", map=M.Fastfood(), ratio=0.3), SHAPES),
    "one-hot": (sl.lora(2, groups=1, fold="balanced", map=M.OneHot(), ratio=0.3), SHAPES),
    "separable": (sl.lora(2, groups=1, fold="balanced", map=M.Separable(), ratio=0.3), SHAPES),
    "fourierft": (sl.fourierft(30), SHAPES),
    "waveft": (sl.waveft(30), SHAPES),
    "c3a": (sl.c3a(6), SHAPES),
    "nola": (sl.nola(16), SHAPES),
    "unilora": (sl.unilora(40), SHAPES),
    "glora": (sl.glora(2), SHAPES),
    "repadapter": (sl.repadapter(2), SHAPES),
}


def shares(plan, deltas, factors):
    """Return what is left of all updates over the updates, from `Plan.deltas` alone."""
    blocks = {**plan.frozen(like=numpy.float64), **factors}
    made = plan.deltas(blocks)
    left = sum(((deltas[name] - made[name]) ** 2).sum() for name in deltas)
    return (left / sum((delta**2).sum() for delta in deltas.values())) ** 0.5


def planted(spec, shapes, seed=1):
    plan = sl.Plan(spec, shapes)
    drawn = {
        name: normal(seed, index, shape)
        for index, (name, shape) in enumerate(plan.factor_shapes.items())
    }
    return plan, plan.deltas({**plan.frozen(like=numpy.float64), **drawn})


@pytest.mark.parametrize(("spec", "shapes"), PLANTED.values(), ids=PLANTED)
def test_planted_factors_are_found(spec, shapes):
    plan, deltas = planted(spec, shapes)
    factors, report = plan.fit(deltas)
    assert list(factors) == list(plan.factor_shapes)
    # Slow where all but a few entries of a row are cropped.
    slow = getattr(spec, "cut", "") == "pad"
    bound = 1e-3 if slow else 1e-6
    assert shares(plan, deltas, factors) < bound
    assert report.error < bound
    assert report.converged is not slow
    assert set(report.errors) == set(plan.layout.shapes)


@pytest.mark.parametrize(("spec", "shapes"), PLANTED.values(), ids=PLANTED)
def test_fit_of_noise_never_gets_worse(spec, shapes):
    plan = sl.Plan(spec, shapes)
    axes = plan.layout.axes
    deltas = {name: normal(3, k, axes[name].shape) for k, name in enumerate(plan.layout.shapes)}
    factors, report = plan.fit(deltas, restarts=2, iterations=8)
    assert report.error <= 1 + 1e-12  # zero factors would do that
    assert_allclose(shares(plan, deltas, factors), report.error, rtol=1e-7, atol=1e-12)
    for errors in report.history.values():
        assert (numpy.diff(errors) <= 0).all()


@pytest.mark.parametrize(
    ("spec", "best"),
    [
        (sl.Spec(rank=2, groups=3, fold="balanced", cut="pad"), 0.42950),
        (sl.Spec(rank=3, order=3, groups=1, fold="balanced"), 0.52992),
    ],
    ids=["padded", "Tucker, cropped"],
)
def test_entries_that_are_not_compared_are_started_several_times(spec, best):
    plan = sl.Plan(spec, {"a": (6, 4), "b": (3, 8), "c": (5, 5)})
    drawn = numpy.random.default_rng(7)
    deltas = {name: drawn.standard_normal(shape) for name, shape in plan.shapes.items()}
    assert plan.fit(deltas)[1].error < 1.01 * best  # that of eight runs of L-BFGS


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_blocks_of_one_vector_end_where_no_step_lowers_the_error(size):
    plan = sl.Plan(sl.unilora(20, rank=1), {str(name): (6, 6) for name in range(4)})
    deltas = {name: size * normal(7, int(name), (6, 6)) for name in plan.shapes}
    errors = [plan.fit(deltas, seed=seed)[1].error for seed in range(3)]
    assert max(errors) < 0.9 * 1.0
    assert max(errors) - min(errors) < 1e-3


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_blocks_of_one_vector_end_at_the_best_from_each_seed(size):
    plan = sl.Plan(sl.unilora(20, rank=1), {str(name): (6, 6) for name in range(4)})
    deltas = {name: size * normal(7, int(name), (6, 6)) for name in plan.shapes}
    errors = [plan.fit(deltas, seed=seed)[1].error for seed in range(2)]
    assert_allclose(errors, 0.86509, rtol=1e-4)  # that of eight runs of L-BFGS


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        (sl.said(20), SHAPES),
        (sl.Spec(2, order=3, fold="balanced", core="identity", map=M.Gaussian(), ratio=0.2), ONE),
    ],
    ids=["tied", "cp"],
)
def test_several_starts_behind_a_map_that_makes_more_entries(spec, shapes):
    plan = sl.Plan(spec, shapes)
    axes = plan.layout.axes
    deltas = {name: normal(3, k, axes[name].shape) for k, name in enumerate(plan.layout.shapes)}
    _, report = plan.fit(deltas, iterations=3)
    assert report.error < 1


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (15, 15)])
def test_lora_leaves_the_tail_of_the_singular_values(shape, rank):
    delta = normal(2, 0, shape)
    _, report = sl.Plan(sl.lora(rank), {"q": shape}).fit({"q": delta})
    numbers = numpy.linalg.svd(delta, compute_uv=False)
    tail = (numbers[rank:] ** 2).sum() / (numbers**2).sum()
    assert_allclose(report.error**2, tail, rtol=1e-10)  # Eckart and Young


def test_randomised_decomposition_ends_at_the_optimum():
    vectors = [numpy.linalg.qr(normal(4, k, (300, 300)))[0] for k in range(2)]
    numbers = 0.9 ** numpy.arange(300)
    delta = (vectors[0] * numbers) @ vectors[1]
    _, report = sl.Plan(sl.lora(4), {"q": (300, 300)}).fit({"q": delta})
    assert fits.is_randomised((300, 300), 4)
    tail = (numbers[4:] ** 2).sum() / (numbers**2).sum()
    assert_allclose(report.error, tail**0.5, rtol=1e-5)


@pytest.mark.parametrize("terms", [1, 2])
def test_two_kronecker_factors_leave_the_tail_of_the_rearranged_matrix(terms):
    spec = sl.Spec(rank="full", splits=2, fold=((3, 4), (2, 5)), terms=terms)
    delta = normal(5, 0, (6, 20))
    _, report = sl.Plan(spec, {"q": (6, 20)}).fit({"q": delta})
    arranged = numpy.empty((12, 10))  # block (i, j) of the matrix is a row (Van Loan)
    for i in range(3):
        for j in range(4):
            arranged[4 * i + j] = delta[2 * i : 2 * i + 2, 5 * j : 5 * j + 5].ravel()
    numbers = numpy.linalg.svd(arranged, compute_uv=False)
    tail = (numbers[terms:] ** 2).sum() / (numbers**2).sum()
    assert_allclose(report.error**2, tail, rtol=1e-10)


def test_library_dtype_and_device_are_those_of_the_updates(xp):
    plan, deltas = planted(sl.lorta(3), SHAPES)
    factors, report = plan.fit(xp.arrays(deltas))
    assert report.error < 1e-6
    assert all(xp.owns(own) and "float64" in str(own.dtype) for own in factors.values())
    left = plan.deltas(factors)
    assert_allclose(xp.to_numpy(left["a.0.q"]), deltas["a.0.q"], atol=1e-8)
    held = xp.arrays({name: values.astype(numpy.float32) for name, values in deltas.items()})
    assert all("float32" in str(own.dtype) for own in plan.fit(held)[0].values())


def test_half_precision_gives_factors_of_single():
    plan, deltas = planted(sl.lora(2), ONE)
    factors, _ = plan.fit({"q": deltas["q"].astype(numpy.float16)})
    assert {own.dtype for own in factors.values()} == {numpy.dtype(numpy.float32)}


@pytest.mark.parametrize("spec", [sl.lora(1), sl.lonkr(2, splits=3)], ids=["lora", "lonkr"])
def test_largest_seed_serves_randomised_starts(spec):
    delta = {"q": normal(1, 0, (64, 64))}
    plan = sl.Plan(spec, {"q": (64, 64)})
    assert plan.fit(delta, seed=2**64 - 1, iterations=2)[1].error < 1


@pytest.mark.parametrize(
    "spec",
    [
        sl.dense(groups=1, fold="balanced", map=M.Gaussian(), ratio=0.9),
        sl.lora_fa(4, groups=1, fold="balanced", map=M.Gaussian(), ratio=0.8),
        sl.lora_fa(3, groups=1, fold="balanced"),
    ],
    ids=["dense", "mapped", "cropped"],
)
def test_one_trained_block_ends_at_the_optimum(spec):
    plan = sl.Plan(spec, {"a": (12, 12), "b": (6, 8)})
    deltas = {name: normal(3, k, shape) for k, (name, shape) in enumerate(plan.shapes.items())}
    (name,), frozen = plan.factor_shapes, plan.frozen(like=numpy.float64)
    units = numpy.eye(plan.num_parameters).reshape(-1, *plan.factor_shapes[name])
    made = (plan.deltas({**frozen, name: unit}).values() for unit in units)
    columns = numpy.stack([numpy.concatenate([own.ravel() for own in one]) for one in made], axis=1)
    wanted = numpy.concatenate([own.ravel() for own in deltas.values()])
    left = wanted - columns @ numpy.linalg.lstsq(columns, wanted, rcond=None)[0]
    best = numpy.linalg.norm(left) / numpy.linalg.norm(wanted)
    assert_allclose(plan.fit(deltas)[1].error, best, rtol=1e-5)


def test_held_blocks_stay():
    plan, deltas = planted(sl.lora(3), {"q": (24, 18)})
    held = normal(9, 0, (18, 3))
    factors, report = plan.fit(deltas, frozen={"0.0.factor1": held})
    assert factors["0.0.factor1"] is held
    best = numpy.linalg.lstsq(held, deltas["q"].T, rcond=None)[0]
    left = numpy.linalg.norm(deltas["q"] - (held @ best).T) / numpy.linalg.norm(deltas["q"])
    assert_allclose(report.error, left, rtol=1e-10)
    every = {"0.0.factor0": normal(9, 1, (24, 3)), "0.0.factor1": held}
    _, report = plan.fit(deltas, frozen=every)
    assert report.history == {0: (report.error,)}
    assert report.error == pytest.approx(shares(plan, deltas, every))


def test_singular_vectors_of_the_weights_are_held():
    weights = {"q": normal(1, 7, (12, 9))}
    plan = sl.Plan(sl.lora_xs(3), {"q": (12, 9)})
    frozen = plan.frozen(weights, like=numpy.float64)
    planted_core = {"0.0.core": normal(1, 8, (3, 3))}
    deltas = plan.deltas({**frozen, **planted_core})
    factors, report = plan.fit(deltas, frozen=frozen)
    assert report.error < 1e-12
    assert_allclose(factors["0.0.core"], planted_core["0.0.core"], atol=1e-12)
    with pytest.raises(ValueError, match="'q'"):
        plan.fit(deltas)


def test_what_is_not_changed_can_be_trained():
    plan = sl.Plan(sl.lora(2), {"q": (6, 4), "v": (6, 4)})
    factors, report = plan.fit({"q": normal(0, 0, (6, 4)), "v": numpy.zeros((6, 4))})
    assert report.errors["v"] == 0
    assert not plan.delta(factors, "v").any()
    assert factors["1.0.factor1"].any() != factors["1.0.factor0"].any()  # one block is zero


def test_surplus_terms_can_be_trained():
    delta = numpy.outer(numpy.arange(1.0, 9), numpy.ones(6))
    spec = sl.Spec(rank="full", splits=2, fold=((2, 2), (4, 3)), terms=6)
    factors, report = sl.Plan(spec, {"q": (8, 6)}).fit({"q": delta})
    assert report.error < 1e-14
    norms = [
        [numpy.linalg.norm(factors[f"0.{2 * term + split}.core"]) for split in (0, 1)]
        for term in range(6)
    ]
    assert all(max(pair) > 0.01 for pair in norms)


@pytest.mark.parametrize("ranks", [(3, 2, 8), (1, 2, 5), (2, 3, 7)])
def test_surplus_ranks_of_a_core_warn_of_nothing_and_can_be_trained(ranks):
    spec = sl.Spec(rank=ranks, order=3, groups=1, fold=(3, 4, 8), core="full")
    plan = sl.Plan(spec, {"q": (8, 12)})
    factors, report = plan.fit({"q": normal(0, 0, (8, 12))})  # warnings are errors here
    assert report.error < 1
    for mode, rank in enumerate(ranks):
        columns = numpy.linalg.norm(factors[f"0.0.factor{mode}"], axis=0)
        assert columns.shape == (rank,)
        assert (columns > 0.01).all()


def test_held_factors_of_another_library_are_refused(xp):
    plan, deltas = planted(sl.lora(2), ONE)
    other = numpy.asarray if xp.name != "numpy" else pytest.importorskip("torch").tensor
    held = {"0.0.factor0": other(numpy.ones((24, 2)))}
    with pytest.raises(TypeError, match="one library"):
        plan.fit(xp.arrays(deltas), frozen=held)


def test_equations_of_hadamard_products_take_no_more_memory_than_the_updates():
    plan = sl.Plan(sl.loha(24), {"q": (64, 64)})
    deltas = {"q": normal(0, 0, (64, 64))}
    problem = problem_of(plan, plan.init(like=numpy.float64), deltas)
    assert not any(map(problem._is_closed, problem.trained))
    small = sl.Plan(sl.loha(4), {"q": (64, 64)})
    problem = problem_of(small, small.init(like=numpy.float64), deltas)
    assert all(map(problem._is_closed, problem.trained))


def test_surplus_rank_can_be_trained():
    delta = numpy.outer(numpy.arange(1.0, 7), numpy.ones(4))
    factors, report = sl.Plan(sl.lora(3), {"q": (6, 4)}).fit({"q": delta})
    assert report.error < 1e-15
    left, right = (numpy.linalg.norm(factors[f"0.0.factor{mode}"], axis=0) for mode in (0, 1))
    assert (left > 0.1).all()
    assert (right[1:] == 0).all()


def test_blocks_of_a_product_have_equal_norms():
    plan, deltas = planted(sl.lorta(3), SHAPES)
    factors, _ = plan.fit(deltas)
    norms = [numpy.linalg.norm(own) for own in factors.values()]
    assert_allclose(norms, norms[0])


# --- every step, against dense least squares


def problem_of(plan, factors, deltas):
    layout = plan.layout
    (groups, *_) = fits.parts(layout, plan.frozen_shapes)
    names = [name for name in fits._inputs(layout, groups) if name not in plan.frozen_shapes]
    targets, floor = fits._targets(layout, groups, deltas)
    return Problem(layout, targets, names, dict(factors), floor)


def jacobian(problem, name):
    """Return the derivative of the compared entries for one block, column by column."""
    old = problem.values[name]
    columns = []
    for index in range(old.size):
        unit = numpy.zeros(old.size)
        unit[index] = 1.0
        blocks = {**problem.values, name: unit.reshape(old.shape)}
        zero = {**problem.values, name: numpy.zeros(old.shape)}
        parts = zip(problem.residuals(zero), problem.residuals(blocks), strict=True)
        columns.append(numpy.concatenate([one - other for one, other in parts]))
    return numpy.stack(columns, axis=1)


@pytest.mark.parametrize("kind", ["plain", "mapped", "extended"])
def test_a_step_solves_for_its_block(kind):
    @settings(max_examples=60)
    @given(problems(kind), st.integers(0, 99))
    def check(drawn, seed):
        plan, factors = drawn
        assume(plan.num_dense <= 300 and plan.layout.num_parameters)
        deltas = {
            name: normal(seed, index, axes.shape)
            for index, (name, axes) in enumerate(plan.layout.axes.items())
        }
        problem = problem_of(plan, factors, deltas)
        name = problem.trained[seed % len(problem.trained)]
        before = problem.error()
        columns = jacobian(problem, name)
        # The step of a sweep, and that of products with the derivative, which ends at the best.
        problem.values[name] = numpy.zeros(problem.values[name].shape)
        right = numpy.concatenate(problem.residuals())
        problem.values[name] = factors[name]
        best = numpy.linalg.lstsq(columns, right, rcond=None)[0]
        least = numpy.hypot(numpy.linalg.norm(right - columns @ best), problem.floor**0.5)
        simple = all(target.seen is None and target.map is None for target in problem.targets)
        problem.trained = [name]
        problem.sweep()
        after = problem.error()
        assert after <= before * (1 + 1e-9) + 1e-9
        if simple:
            # LSQR ends after some steps, and goes on in the next sweep.
            near = 1e-6 if problem._is_closed(name) else 1e-2
            assert_allclose(after, least, rtol=near, atol=near * before)
        operator = problem._derivative(name)
        x, y = normal(seed, 1, (columns.shape[1],)), normal(seed, 2, (columns.shape[0],))
        assert_allclose(operator @ x, columns @ x, rtol=1e-8, atol=1e-8 * abs(columns).sum())
        assert_allclose(operator.H @ y, columns.T @ y, rtol=1e-8, atol=1e-8 * abs(columns).sum())

    check()


# --- nothing global changes


def test_backend_of_the_process_is_not_read(monkeypatch):
    plan, deltas = planted(sl.lorta(3), SHAPES)
    pytest.importorskip("torch")
    seen = []
    before = tensorly.get_backend()
    try:
        tensorly.set_backend("pytorch")
        thread = threading.Thread(target=lambda: seen.append(plan.fit(deltas)[1].error))
        thread.start()
        thread.join()
        seen.append(plan.fit(deltas)[1].error)
        assert tensorly.get_backend() == "pytorch"
    finally:
        tensorly.set_backend(before)
    assert max(seen) < 1e-10


def test_fits_at_once_leave_the_filters_of_warnings():
    plan, deltas = planted(sl.lora(2), ONE)
    before = list(warnings.filters)
    threads = [
        threading.Thread(target=lambda: [plan.fit(deltas) for _ in range(30)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


# --- bad input


def test_bad_input_is_refused():
    plan, deltas = planted(sl.lora(2), {"q": (6, 4), "v": (6, 4)})
    wrong = numpy.full((6, 4), numpy.nan)
    rows = [
        ({"q": deltas["q"]}, "lacks 'v'"),
        ({**deltas, "k": deltas["q"]}, "has also 'k'"),
        ({**deltas, "v": deltas["v"].T}, r"deltas\['v'\] must have shape \(6, 4\): got \(4, 6\)"),
        ({**deltas, "v": wrong}, r"deltas\['v'\] must be finite"),
        ({**deltas, "v": numpy.ones((6, 4), int)}, "floating-point"),
        ({name: 0 * own for name, own in deltas.items()}, "all of them are zero"),
        ({name: 1e-200 * own for name, own in deltas.items()}, "squares that are numbers"),
        ([deltas["q"]], "must map names"),
    ]
    for given_deltas, message in rows:
        with pytest.raises((TypeError, ValueError), match=message):
            plan.fit(given_deltas)
    held = {"0.0.factor0": numpy.ones((6, 2))}
    for frozen, message in (
        ({"0.0.nothing": numpy.ones(1)}, "blocks of the plan"),
        ({"0.0.factor0": numpy.ones((6, 3))}, r"must have shape \(6, 2\)"),
        ({"0.0.factor0": held["0.0.factor0"] * numpy.inf}, "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            plan.fit(deltas, frozen=frozen)
    with pytest.raises(ValueError, match="scale must not be 0"):
        sl.Plan(sl.lora(2, scale=0), {"q": (6, 4), "v": (6, 4)}).fit(deltas)
    for name, value in (("restarts", 0), ("iterations", 0), ("tolerance", -1.0), ("seed", -1)):
        with pytest.raises(ValueError, match=name):
            plan.fit(deltas, **{name: value})
    stored = sl.Plan(sl.lora(2, frozen={"0.factor0": "stored"}), plan.shapes)
    with pytest.raises(ValueError, match="which the spec freezes"):
        stored.fit(deltas)
    vera = sl.Plan(sl.vera(2), plan.shapes)
    with pytest.raises(ValueError, match=r"0\.0\.factor0.* Plan\.frozen makes"):
        vera.fit(deltas, frozen={"0.0.core": numpy.ones(2)})


def test_report_prints_a_table():
    plan, deltas = planted(sl.lora(2), {"q": (6, 4), "v": (6, 4)})
    _, report = plan.fit({**deltas, "v": normal(0, 0, (6, 4))})
    text = str(report)
    assert text.splitlines()[0] == "relative error of each update"
    assert f"{report.errors['v']:.4g}" in text
    assert "sweeps" in text


def test_drawn_factors_of_all_reconstruction_specs_fit_again():
    plan = sl.Plan(sl.lora(2), ONE)
    factors = draw_factors(plan)
    _, report = plan.fit(plan.deltas(factors))
    assert report.error < 1e-12
