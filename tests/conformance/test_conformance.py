"""Every method on every architecture: the adapted model is right, or the method is refused."""

from __future__ import annotations

import importlib.util

import pytest

from tests.conformance import checks
from tests.conformance.models import MODELS

# What the suite tries of the quick architectures; the slow tests try all.
QUICK = ("lora", "one group", "glora")
CASES = [
    pytest.param(
        name,
        preset,
        marks=[] if entry.quick and preset in QUICK else [pytest.mark.slow],
        id=f"{name}-{preset}",
    )
    for name, entry in MODELS.items()
    for preset in checks.PRESETS
]


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_method_on_architecture(name, preset, tmp_path):
    entry = MODELS[name]
    if importlib.util.find_spec(entry.library) is None:
        pytest.skip(f"{entry.library} is not installed")
    with checks.quietly():
        tried = checks.attach(entry, preset)
        if isinstance(tried, str):
            return  # a refusal that says why; the table lists it
        checks.every(entry, preset, tmp_path)
