"""What is contained in what, with the factors that show it, and what is not."""

from __future__ import annotations

import functools
from unittest import mock

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lycoris.modules.lokr import LokrModule
from torch import nn

import superlora as sl
from superlora import maps
from superlora.design.cost_rule import application
from tests.oracles import jacobian_rank
from tests.reductions.cases import fill
from tests.strategies import draw_factors

sizes = st.integers(2, 9)
seeds = st.integers(0, 9)


def stack(layers: int, rows: int, columns: int) -> dict[str, tuple[int, int]]:
    return {f"{layer}.q": (rows, columns) for layer in range(layers)}


def assert_contained(inner: sl.Plan, factors, outer: sl.Plan, others) -> None:
    expected = inner.deltas(factors)
    for name, delta in outer.deltas(others).items():
        numpy.testing.assert_allclose(delta, expected[name], atol=1e-11 * abs(expected[name]).max())


def generator(seed: int) -> numpy.random.Generator:
    return numpy.random.default_rng(seed)


@given(st.integers(1, 4), sizes, sizes, seeds)
def test_fact_is_a_lora_of_each_layer_whose_factors_are_tied(layers, rows, columns, seed):
    shapes = stack(layers, rows, columns)
    plan = sl.Plan(sl.fact_tt(2, scale=0.7), shapes)
    factors = draw_factors(plan, seed)
    lora = sl.Plan(sl.lora(2, scale=0.7), shapes)
    others = {}
    for layer, core in enumerate(factors["0.0.core"]):
        others[f"{layer}.0.factor0"] = factors["0.0.factor1"] @ core
        others[f"{layer}.0.factor1"] = factors["0.0.factor2"]
    assert_contained(plan, factors, lora, others)
    # Containment only: FacT's layers differ by 4 numbers each.
    assert plan.num_parameters == 4 * layers + 2 * (rows + columns)
    assert lora.num_parameters == 2 * layers * (rows + columns)


@given(st.integers(1, 3), sizes, sizes, seeds)
def test_metatt_in_its_papers_order_is_a_lotr_whose_matrices_are_products(
    layers, rows, columns, seed
):
    """ΔW = G_1 G_2[layer] G_3[matrix] G_4, inputs first: the factors are tied further."""
    first, second, third, last = (
        generator(seed + place).standard_normal(shape)
        for place, shape in enumerate([(columns, 2), (2, layers, 2), (2, 2, 2), (2, rows)])
    )
    plan = sl.Plan(sl.lotr(2), stack(2 * layers, rows, columns))
    cores = [(second[:, n // 2] @ third[:, n % 2]).T for n in range(2 * layers)]
    factors = {"0.0.core": numpy.array(cores), "0.0.factor1": last.T, "0.0.factor2": first}
    whole = numpy.einsum("ia,alb,bmc,co->lmoi", first, second, third, last)
    deltas = numpy.array([*plan.deltas(factors).values()]).reshape(whole.shape)
    numpy.testing.assert_allclose(deltas, whole, atol=1e-11 * abs(whole).max())


@given(st.integers(2, 4), sizes, sizes, seeds)
def test_lotr_is_the_looser_row_of_table_1_and_the_layer_factor_is_redundant(
    layers, rows, columns, seed
):
    shapes = stack(layers, rows, columns)
    lotr = sl.Plan(sl.lotr(2), shapes)
    loose = sl.Plan(sl.fact_tk((layers, 2, 2)), shapes)
    factors = draw_factors(lotr, seed)
    # Any invertible layer factor is absorbed by the core, and back.
    change = numpy.eye(layers) + 0.5 * generator(seed).random((layers, layers)) / layers
    core = numpy.tensordot(numpy.linalg.inv(change), factors["0.0.core"], axes=1)
    assert_contained(lotr, factors, loose, {**factors, "0.0.factor0": change, "0.0.core": core})
    others = draw_factors(loose, seed + 1)
    back = {block: others[block] for block in factors}
    back["0.0.core"] = numpy.tensordot(others["0.0.factor0"], others["0.0.core"], axes=1)
    assert_contained(loose, others, lotr, back)
    assert loose.num_parameters == lotr.num_parameters + layers**2


@given(st.integers(2, 4), st.integers(10, 14), st.integers(10, 14), st.integers(1, 3), seeds)
def test_loha_is_a_lora_of_squared_rank(layers, rows, columns, rank, seed):
    shapes = stack(layers, rows, columns)
    loha = sl.Plan(sl.loha(rank, scale=0.7), shapes)
    lora = sl.Plan(sl.lora(rank**2, scale=0.7), shapes)
    factors = draw_factors(loha, seed)
    others = {}
    for layer, name in enumerate(shapes):
        b1, a1, b2, a2 = (factors[block] for block in loha.blocks_of(name))
        # Row by row the Kronecker product: the transposed Khatri-Rao product.
        left = numpy.stack([numpy.kron(*pair) for pair in zip(b1, b2, strict=True)])
        right = numpy.stack([numpy.kron(*pair) for pair in zip(a1, a2, strict=True)])
        thin = loha.low_rank(factors, name)
        assert thin is not None
        numpy.testing.assert_allclose(thin[0], 0.7 * left)
        numpy.testing.assert_allclose(thin[1], right)
        others |= {f"{layer}.0.factor0": left, f"{layer}.0.factor1": right}
    assert_contained(loha, factors, lora, others)


@given(sizes, sizes, seeds)
def test_fact_tk_of_fewer_layers_than_its_rank_is_un_factored_there(rows, columns, seed):
    shapes = stack(2, max(rows, 3), max(columns, 3))
    plan = sl.Plan(sl.fact_tk(3), shapes)
    assert plan.factor_shapes.keys() == {"0.0.core", "0.0.factor1", "0.0.factor2"}
    draws = generator(seed)
    core, layers = draws.standard_normal((3, 3, 3)), draws.standard_normal((2, 3))
    factors = {block: array for block, array in draw_factors(plan, seed).items() if "f" in block}
    factors["0.0.core"] = numpy.tensordot(layers, core, axes=1)
    for layer, delta in enumerate(plan.deltas(factors).values()):
        middle = numpy.tensordot(layers[layer], core, axes=1)
        expected = factors["0.0.factor1"] @ middle @ factors["0.0.factor2"].T
        numpy.testing.assert_allclose(delta, expected, atol=1e-11 * abs(expected).max())
    assert plan.num_parameters < 27 + 3 * (2 + sum(shapes["0.q"]))


def freedom(plan: sl.Plan) -> int:
    names = list(plan.factor_shapes)
    factors = draw_factors(plan, 3)
    return jacobian_rank(
        lambda blocks: plan.delta(dict(zip(names, blocks, strict=True)), "q"),
        [factors[name] for name in names],
    )


def test_loha_is_not_all_of_that_lora():
    loha, lora = (sl.Plan(spec, {"q": (9, 9)}) for spec in (sl.loha(2), sl.lora(4)))
    assert loha.num_parameters == lora.num_parameters == 72
    assert (freedom(loha), freedom(lora)) == (47, 56)


def test_lokr_of_table_1_is_decompose_both_and_not_the_default():
    # A dense first split of 5 x 5 has rank 5; Table 1's row, M = 2 and C = I, has rank 1 there.
    layer = nn.Linear(40, 40, bias=False).double()
    ranks = {}
    for both in (False, True):
        module = LokrModule("peer", layer, 1.0, 1, 1, decompose_both=both, factor=5).double()
        fill(module.parameters(), 0)
        delta = module.get_weight((40, 40)).detach().numpy()
        ranks[both] = numpy.linalg.matrix_rank(delta)
    assert ranks == {False: 5, True: 1}
    shapes = {"q": (40, 40)}
    default, table = (sl.Plan(sl.lokr(1, both, factor=5), shapes) for both in (False, True))
    factors = draw_factors(table)
    first = factors["0.0.factor0"] @ factors["0.0.factor1"].T
    others = {block: factors[block] for block in ("0.1.factor0", "0.1.factor1")}
    assert_contained(table, factors, default, {**others, "0.0.core": first})


@given(st.sampled_from([8, 12, 18, 27]), st.sampled_from([8, 12, 30]), st.integers(1, 2), seeds)
def test_lonkr_has_the_product_of_the_ranks(rows, columns, rank, seed):
    plan = sl.Plan(sl.lonkr(rank), {"q": (rows, columns)})
    factors = draw_factors(plan, seed)
    delta = plan.delta(factors, "q")
    left, right = (
        functools.reduce(numpy.kron, [factors[f"0.{k}.factor{mode}"] for k in range(3)])
        for mode in range(2)
    )
    numpy.testing.assert_allclose(delta, left @ right.T, atol=1e-11 * abs(delta).max())
    assert numpy.linalg.matrix_rank(delta, tol=1e-9 * abs(delta).max()) == rank**3


@given(st.sampled_from([8, 12, 18]), st.sampled_from([8, 12, 30]), seeds)
def test_krona_is_the_lokr_of_a_large_rank(rows, columns, seed):
    krona, lokr = (sl.Plan(spec, {"q": (rows, columns)}) for spec in (sl.krona(), sl.lokr(99)))
    assert krona.factor_shapes == lokr.factor_shapes
    factors = draw_factors(krona, seed)
    assert_contained(krona, factors, lokr, factors)


@given(st.integers(2, 3), sizes, sizes, seeds)
def test_vera_is_a_lora_of_the_same_rank(layers, rows, columns, seed):
    shapes = {f"{layer}.q": (rows + layer, columns + layer) for layer in range(layers)}
    vera, lora = sl.Plan(sl.vera(2), shapes), sl.Plan(sl.lora(2), shapes)
    blocks = {**draw_factors(vera, seed), **vera.frozen(like=numpy.float64)}
    wide, deep, others = blocks["0.0.factor0"], blocks["0.0.factor1"], {}
    for layer, (do, di) in enumerate(shapes.values()):
        others[f"{layer}.0.factor0"] = blocks[f"{layer}.1.factor0"] * wide[:do]
        others[f"{layer}.0.factor1"] = deep[:di] * blocks[f"{layer}.0.core"]
    assert_contained(vera, blocks, lora, others)


@settings(max_examples=10)
@given(st.integers(1, 3), seeds)
def test_lorta_of_hounie_is_a_tucker_with_a_superdiagonal_core(rank, seed):
    shapes = {f"{layer}.{part}": (6, 4) for layer in range(3) for part in "qv"}
    fold = (3, 2, 3, 2, 4)
    cp = sl.Plan(sl.lorta_cp(rank, fold=fold), shapes)
    tucker = sl.Plan(sl.Spec(rank=rank, order=5, groups=1, fold=fold, core="full"), shapes)
    factors = draw_factors(cp, seed)
    core = numpy.zeros((rank,) * 5)
    core[(range(rank),) * 5] = 1
    others = dict(factors)
    for mode, size in enumerate(fold):
        if rank > size:  # un-factored there: the core holds the factor
            factor = others.pop(f"0.0.factor{mode}")
            core = numpy.moveaxis(numpy.tensordot(factor, core, axes=([1], [mode])), 0, mode)
    assert_contained(cp, factors, tucker, {**others, "0.0.core": core})


@pytest.mark.parametrize(("rank", "blocks"), [(3, 1), (4, 2), (8, 3)])
def test_fact_tks_official_reshape_of_the_mlps_is_not_the_papers_tucker(rank, blocks):
    # Each MLP has four slices. The released code reshapes (r, r, 4) to (r, 4 r) with the layer
    # fastest, and takes r columns after the other: these are not the four slices.
    draws = generator(0)
    core = draws.standard_normal((rank, rank, rank))
    layers = draws.standard_normal((rank, 4 * blocks))
    slices, official = [], []
    for first in range(0, 4 * blocks, 4):
        four = core @ layers[:, first : first + 4]
        wide = four.reshape(rank, 4 * rank)
        slices += [four[:, :, q] for q in range(4)]
        official += [wide[:, q * rank : (q + 1) * rank] for q in range(4)]
    assert not any(map(numpy.allclose, slices, official))
    # No other factors of that rank give them: the layer mode of a Tucker tensor has rank r.
    ours, theirs = (
        numpy.linalg.matrix_rank(numpy.reshape(found, (4 * blocks, -1)))
        for found in (slices, official)
    )
    assert ours <= rank < theirs
    plan = sl.Plan(sl.fact_tk(rank), stack(4 * blocks, 9, 8))
    factors = draw_factors(plan)
    factors |= {"0.0.core": core.transpose(2, 1, 0), "0.0.factor0": layers.T}
    for index, delta in enumerate(plan.deltas(factors).values()):
        expected = factors["0.0.factor1"] @ slices[index].T @ factors["0.0.factor2"].T
        numpy.testing.assert_allclose(delta, expected, atol=1e-11 * abs(expected).max())


@given(st.integers(2, 5), st.integers(2, 5), st.integers(1, 2), seeds)
def test_loha_is_a_selection_of_a_kronecker_product(rows, columns, rank, seed):
    shapes = stack(2, rows, columns)
    positions = [
        i * (rows + 1) * columns**2 + j * (columns + 1) for i in range(rows) for j in range(columns)
    ]
    fold = ((rows, columns), (rows, columns))
    fields = {"rank": (rank, rank), "splits": 2, "fold": fold, "scale": 0.7}
    selected = sl.Plan(sl.Spec(map=maps.Selection(positions=positions), **fields), shapes)
    loha = sl.Plan(sl.loha(rank, scale=0.7), shapes)
    assert selected.factor_shapes == loha.factor_shapes
    factors = draw_factors(loha, seed)
    assert_contained(loha, factors, selected, factors)
    # The fold has the squared size, which combine="hadamard" never forms.
    assert "realised ratio" in selected.describe()
    assert selected.layout.groups[0].before == (rows * columns) ** 2


@given(sizes, sizes, st.integers(1, 9), seeds)
def test_did_is_said_with_ones(rows, columns, size, seed):
    shapes = stack(3, rows, columns)
    did, said = (sl.Plan(make(size, seed, scale=0.7), shapes) for make in (sl.did, sl.said))
    (theta,) = draw_factors(did, seed).values()
    numbers = {f"{group}.0.factor0": numpy.ones((1, 1)) for group in range(3)}
    others = {"0.0.factor1": theta[:, None], **numbers}
    assert_contained(did, {"0.0.core": theta}, said, others)
    assert (did.num_parameters, said.num_parameters) == (size, size + 3)


@given(sizes, sizes, st.integers(1, 2), st.integers(1, 8), seeds)
def test_unilora_and_nola_are_loras_and_no_map_of_an_update(rows, columns, rank, size, seed):
    shapes = {"0.q": (rows, columns), "1.q": (columns, rows)}
    lora = sl.Plan(sl.lora(rank, scale=0.7), shapes)
    for spec in (sl.unilora(min(size, 4), rank, seed), sl.nola(size, rank, seed)):
        plan = sl.Plan(spec.replace(scale=0.7), shapes)
        thetas = {
            name: generator(seed).standard_normal(shape)
            for name, shape in plan.factor_shapes.items()
        }
        blocks = {
            block: inner.map.apply(thetas[inner.name], inner.size)[inner.start : inner.stop]
            for block, inner in plan.layout.inner.items()
        }
        factors = {b: x.reshape(lora.factor_shapes[b]) for b, x in blocks.items()}
        assert_contained(plan, thetas, lora, factors)
        # Quadratic: twice the numbers are four times the update, which no linear F gives.
        for name, delta in plan.deltas({b: 2 * x for b, x in thetas.items()}).items():
            numpy.testing.assert_allclose(
                delta, 4 * plan.delta(thetas, name), rtol=1e-9, atol=1e-12
            )


def test_all_frequencies_are_about_half_of_dense():
    # (u, v) and (-u, -v) are one column: 12 x 10 has 4 that are their own partners.
    plan = sl.Plan(sl.fourierft(120), {"q": (12, 10)})
    assert plan.num_parameters == plan.num_dense == 120
    assert freedom(plan) == (120 + 4) // 2
    matrix = plan.layout.maps[0]
    columns = numpy.stack([matrix.apply(unit, 120) for unit in numpy.eye(120)])
    assert numpy.linalg.matrix_rank(columns) == 62


@given(st.sampled_from(["paper", "le"]), st.integers(1, 2), seeds)
def test_the_papers_fastfood_is_the_transpose_of_le_and_others(order, rank, seed):
    # With one B, G and Π; other sizes of the same seed have the same leading B and G.
    fixed = maps.Fastfood(seed=seed, order=order, values="sign")
    back = maps.Fastfood(seed=seed, order="le" if order == "paper" else "paper", values="sign")
    wide = numpy.stack([fixed.apply(unit, 16) for unit in numpy.eye(16)], axis=1)
    narrow = numpy.stack([back.apply(unit, 16) for unit in numpy.eye(16)], axis=1)
    numpy.testing.assert_allclose(wide, narrow.T, atol=1e-12)
    numpy.testing.assert_allclose(wide.T @ wide, numpy.eye(16), atol=1e-12)


WIDE = {f"{layer}.q": (48, 32) for layer in range(2)}
SEPARATE = {
    "lora": sl.lora(2, map=maps.Separable(), ratio=0.25, scale=0.7),
    "aligned of order 3": sl.lorta(
        2, map=maps.Separable(), fold="aligned", ratio=0.25, core="identity", scale=0.7
    ),
    "two splits": sl.lonkr(1, 2, map=maps.Separable(inner=maps.Gaussian()), ratio=0.5),
}


@pytest.mark.parametrize("spec", SEPARATE.values(), ids=SEPARATE)
def test_a_map_for_each_mode_is_applied_without_an_update(spec):
    plan = sl.Plan(spec, WIDE)
    factors, x = draw_factors(plan), generator(1).standard_normal((3, 32))
    expected = plan.deltas(factors)
    thin = {name: plan.low_rank(factors, name) for name in WIDE}
    for name, delta in expected.items():
        assert application(plan.layout, name).factored is not None
        left, right = thin[name]
        assert left.shape[1] == right.shape[1] < min(delta.shape)
        numpy.testing.assert_allclose(left @ right.T, delta, atol=1e-11 * abs(delta).max())
        with mock.patch("superlora.plan.weight_delta", side_effect=AssertionError):
            y = plan.apply(factors, name, x)
            again = plan.low_rank(factors, name)
        numpy.testing.assert_allclose(y, x @ delta.T, atol=1e-11 * abs(y).max())
        assert again is not None
    # A fold before of a quarter of the entries has less to train than one without a map.
    assert (
        plan.num_parameters
        < sl.Plan(spec.replace(map=maps.Identity(), ratio=1), WIDE).num_parameters
    )


def test_any_other_map_has_its_update_formed():
    spec = sl.lora(2, map=maps.Fastfood(), fold="balanced", ratio=0.25)
    plan = sl.Plan(spec, WIDE)
    assert plan.low_rank(draw_factors(plan), "0.q") is None
    assert application(plan.layout, "0.q").factored is None
