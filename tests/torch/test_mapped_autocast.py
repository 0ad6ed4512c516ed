"""Mixed precision leaves what a map makes in its own precision."""

import pytest
import torch

import superlora as sl
import superlora.torch as slt
from superlora import maps
from tests.torch.helpers import (
    SPECS,
    attach_filled,
    fill,
    make_net,
)

MAPPED = [key for key, spec in SPECS.items() if spec.factor_map or spec.map != maps.Identity()]
# Some of its groups hold a part of one weight alone, others parts of two.
ALONE = sl.Spec(rank=2, groups=7, fold="balanced", map=maps.Fastfood(), ratio=0.5)


def attach_mapped(key):
    model = make_net()
    return (
        fill(slt.attach(model, ALONE, ["q"])) if key == "cut-alone" else attach_filled(model, key)
    )


@pytest.mark.parametrize("key", [*MAPPED, "cut-alone"])
def test_autocast_does_not_round_what_is_formed(key):
    adapter = attach_mapped(key)
    expected = adapter.deltas()
    with torch.autocast("cpu", torch.bfloat16):
        for name, delta in expected.items():
            assert torch.equal(adapter.delta(name), delta)
