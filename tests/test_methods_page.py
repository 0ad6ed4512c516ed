"""The page of methods says what the presets are."""

import importlib.util
import sys
from pathlib import Path

import numpy
import pytest

import superlora as sl

DOCS = Path(__file__).parent.parent / "docs"


def load():
    spec = importlib.util.spec_from_file_location("methods", DOCS / "methods.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["methods"] = module
    spec.loader.exec_module(module)
    return module


methods = load()
rows = pytest.mark.parametrize("method", methods.METHODS, ids=lambda method: method.code)


@pytest.mark.parametrize(("name", "table"), methods.tables().items(), ids=methods.tables())
def test_the_page_is_up_to_date(name, table):
    page = (DOCS / "methods.md").read_text("utf-8")
    assert methods.between(page, name) == table, "run `python docs/methods.py`"


def test_every_preset_has_a_row():
    assert {method.preset for method in methods.METHODS} == set(sl.presets.__all__)


@rows
@pytest.mark.parametrize("sizes", [{}, {"L": 6, "do": 36, "di": 24}, {"do": 48, "di": 60, "r": 3}])
def test_the_count_is_that_of_the_plan(method, sizes, monkeypatch):
    for name, value in sizes.items():
        monkeypatch.setitem(methods.EXAMPLE, name, value)
    assert method.counted() == method.plan().num_parameters


@pytest.mark.parametrize("method", methods.ADDED, ids=lambda method: method.code)
def test_the_presets_that_the_page_says_are_written_exactly_have_two_thin_factors(
    method, monkeypatch
):
    for name, value in {"do": 48, "di": 60, "u": 3}.items():
        monkeypatch.setitem(methods.EXAMPLE, name, value)
    page = (DOCS / "methods.md").read_text("utf-8")
    named = page[page.index("has two thin factors (") :].partition(")")[0]
    plan = method.plan()
    shapes = plan.factor_shapes | plan.frozen_shapes
    blocks = {name: numpy.ones(shape) for name, shape in shapes.items()}
    thin = plan.low_rank(blocks, "0.weight")
    if f"`{method.preset}`" in named:
        assert thin is not None
    if method.preset in ("dense", "fourierft", "waveft", "c3a", "did", "said"):
        assert thin is None
        assert method.preset not in named
