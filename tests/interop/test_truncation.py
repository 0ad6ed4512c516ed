"""Export by truncated singular value decomposition, and its reported errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import superlora as sl
import superlora.torch as slt
from superlora.torch.interop.formats import low_rank_layer, product
from tests.interop.models import assert_outputs, attach_random, load_with_peft, make_x, quiet

# Formed (balanced), and by thin factors (aligned, stack, Hadamard).
SPECS = {
    "balanced": sl.Spec(rank=3, groups=1, fold="balanced", scale=0.7),
    "lorta": sl.lorta(3, scale=0.7),
    "lorta-aligned": sl.lorta(3, fold="aligned", scale=0.7),
    "loha": sl.loha(2, scale=0.7),
    "dense": sl.dense(scale=0.7),
    "terms": sl.Spec(rank=2, terms=2, scale=0.7),
    "lonkr": sl.lonkr(1, splits=3, scale=0.7, fold="balanced", groups=1),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def best(delta: torch.Tensor, rank: int) -> float:
    """Return the least relative error of any matrix of this rank (Eckart and Young)."""
    numbers = torch.linalg.svdvals(delta.double())
    return float(numbers[rank:].norm() / numbers.norm())


@every_spec
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_truncation_is_the_best_of_its_rank_and_says_its_error(spec, rank):
    _, adapter = attach_random(spec)
    for name in adapter.plan.shapes:
        layer, error = low_rank_layer(adapter.blocks, name, rank, None)
        delta = adapter.delta(name).detach().double()
        missing = float((delta - product(layer.parts[0])).norm() / delta.norm())
        assert layer.rank <= rank
        assert missing == pytest.approx(error, abs=1e-6)
        assert missing == pytest.approx(best(delta, rank), abs=1e-6)


@every_spec
@settings(max_examples=10)
@given(energy=st.floats(0.05, 1.0))
def test_energy_keeps_the_least_rank_that_reaches_it(spec, energy):
    _, adapter = attach_random(spec)
    for name in adapter.plan.shapes:
        layer, _ = low_rank_layer(adapter.blocks, name, None, energy)
        squares = torch.linalg.svdvals(adapter.delta(name).detach().double()).square()
        parts = squares.cumsum(0) / squares.sum()
        assert parts[layer.rank - 1] >= energy - 1e-6
        assert layer.rank == 1 or parts[layer.rank - 2] < energy + 1e-6


@every_spec
def test_rank_above_that_of_the_update_is_exact(spec, tmp_path):
    model, adapter = attach_random(spec)
    export = adapter.to_peft(tmp_path, rank=24)
    assert max(export.errors.values()) < 1e-6
    assert_outputs(load_with_peft(tmp_path)(make_x()), model(make_x()), 2e-6)


test_rank_above_that_of_the_update_is_exact = quiet(test_rank_above_that_of_the_update_is_exact)


@quiet
def test_ranks_chosen_by_energy_differ_between_layers(tmp_path):
    _, adapter = attach_random(SPECS["lorta"])
    export = adapter.to_peft(tmp_path, energy=0.8)
    assert all(0 < error <= math.sqrt(0.2) + 1e-6 for error in export.errors.values())
    theirs = load_with_peft(tmp_path)
    for name, error in export.errors.items():
        delta = adapter.delta(name).detach()
        found = theirs.base_model.model.get_submodule(name).get_delta_weight("default")
        assert float((found - delta).norm() / delta.norm()) == pytest.approx(error, abs=1e-5)


def test_the_update_is_not_formed_where_the_fold_is_aligned(monkeypatch, tmp_path):
    _, adapter = attach_random(SPECS["lorta-aligned"])

    def forbidden(*_):
        raise AssertionError("an update was formed")

    monkeypatch.setattr("superlora.plan.weight_delta", forbidden)
    monkeypatch.setattr(slt.Adapter, "delta", forbidden)
    adapter.to_peft(tmp_path, rank=2)


def test_untrained_adapter_is_exported_as_zero(tmp_path):
    _, adapter = attach_random(SPECS["lorta"])
    adapter.reset()
    export = adapter.to_peft(tmp_path, energy=0.9)
    assert set(export.errors.values()) == {0.0}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, r"rank or energy must be given: the update of 'blocks\.0\.q'"),
        ({"rank": 0}, ValueError, "rank must be at least 1: got 0"),
        ({"rank": 1.5}, TypeError, "rank must be an integer"),
        ({"energy": 0}, ValueError, r"energy must be in \(0, 1\]: got 0"),
        ({"energy": 1.1}, ValueError, r"energy must be in \(0, 1\]: got 1\.1"),
        ({"energy": math.nan}, ValueError, "energy must be in"),
        ({"energy": True}, ValueError, "energy must be in"),
    ],
)
@pytest.mark.parametrize("write", ["to_peft", "to_lycoris"])
def test_truncation_that_says_nothing_is_refused(options, error, message, write, tmp_path):
    _, adapter = attach_random(SPECS["lorta"])
    with pytest.raises(error, match=message):
        getattr(adapter, write)(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", ["to_peft", "to_lycoris"])
def test_detached_adapter_is_refused(write, tmp_path):
    _, adapter = attach_random(sl.lora(2))
    adapter.detach()
    with pytest.raises(sl.AdapterError, match="must be attached"):
        getattr(adapter, write)(tmp_path / "out")


def test_a_file_in_the_folder_s_place_is_left_alone(tmp_path):
    _, adapter = attach_random(sl.lora(2))
    (tmp_path / "a").write_text("mine")
    with pytest.raises(NotADirectoryError):
        adapter.to_peft(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"
