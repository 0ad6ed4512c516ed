"""How many Python functions one layer's forward enters, and in how many files: counted."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import fill, seeded

HOME = str(Path(sl.__file__).parent)
WIDTH = 64


def calls_of(call):
    """Return name and file of every Python function of the library that a call enters."""
    found = []

    def watch(frame, event, argument):
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(HOME):
            found.append((frame.f_code.co_name, path.removeprefix(HOME)))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


def calls_of_a_layer(design, mode):
    """Return the calls of a layer in a pass, after one that made what both share."""
    with seeded(0):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    adapter = fill(slt.attach(model, design, ["0", "1"]))
    x = torch.randn(2, 3, WIDTH)
    for _ in range(2):
        model(x)
    with mode(), adapter.blocks.scope.opened():
        model[0](x)
        return calls_of(lambda: model[1](x))


MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)
# How many calls there may be.
MOST = {"lora": (sl.lora(4), 25), "lorta": (sl.lorta(4), 40), "glora": (sl.glora(4), 80)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key", MOST)
def test_a_layers_forward_enters_few_functions(key, mode):
    design, most = MOST[key]
    found = calls_of_a_layer(design, mode)
    assert 0 < len(found) <= most, found


@pytest.mark.parametrize("mode", MODES)
def test_loras_forward_goes_through_few_files(mode):
    found = {path for _, path in calls_of_a_layer(sl.lora(4), mode)}
    assert "/torch/site.py" in found
    assert len(found) <= 5, sorted(found)


def test_every_call_of_the_library_is_counted_and_no_other():
    plan = sl.Plan(sl.lora(2), {"q": (4, 4)})
    assert calls_of(lambda: plan.num_parameters)[0] == ("num_parameters", "/plan.py")
    assert len(calls_of(lambda: [plan.num_parameters for _ in range(9)])) == 9 * len(
        calls_of(lambda: plan.num_parameters)
    )
    assert calls_of(lambda: nn.functional.linear(torch.ones(1, 4), torch.ones(4, 4))) == []
