"""Every method on every architecture: the adapted model is right, or the method is refused."""

from __future__ import annotations

import importlib.util

import pytest

from tests.conformance import checks
from tests.conformance.models import MODELS


def cases():
    for name, entry in MODELS.items():
        for preset in checks.PRESETS:
            marks = [] if entry.quick else [pytest.mark.slow]
            yield pytest.param(name, preset, marks=marks, id=f"{name}-{preset}")


@pytest.mark.parametrize(("name", "preset"), cases())
def test_method_on_architecture(name, preset, tmp_path):
    entry = MODELS[name]
    if importlib.util.find_spec(entry.library) is None:
        pytest.skip(f"{entry.library} is not installed")
    with checks.quietly():
        tried = checks.attach(entry, preset)
        if isinstance(tried, str):
            return  # a refusal that says why; the table lists it
        for check in checks.CHECKS.values():
            fresh = checks.attach(entry, preset)
            assert not isinstance(fresh, str)
            check(fresh)
        checks.is_saved(tried, tmp_path)
        checks.runs_in_half_precision(entry, preset)
