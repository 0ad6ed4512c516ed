"""What the package imports, exports and documents."""

from __future__ import annotations

import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import superlora

HEAVY = ("torch", "jax", "tensorflow", "cupy", "paddle")
ROOT = Path(superlora.__file__).parent.parent
BOUND_TO_TORCH = (
    "superlora.torch",
    "superlora.demo",
    "superlora.search.supernet",
    "superlora.cli",
    "superlora.maps._torch_transform",
)


def run_python(code):
    """Run code in a process of its own and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def heavy_after(code):
    """Return which heavy packages a process has imported after some code."""
    return run_python(f"import sys; {code}; print(*[n for n in {HEAVY} if n in sys.modules])")


def test_import_leaves_the_heavy_libraries_out():
    assert heavy_after("import superlora") == ""


def test_use_with_numpy_leaves_the_heavy_libraries_out():
    code = (
        "import numpy, superlora as sl; plan = sl.Plan(sl.lora(rank=1), {'q': (3, 2)}); "
        "factors = plan.init(); plan.deltas(factors); plan.describe(); "
        "plan.apply(factors, 'q', numpy.ones((4, 2)))"
    )
    assert heavy_after(code) == ""


def test_the_check_can_fail():
    imported = "; ".join(f"sys.modules[{name!r}] = sys" for name in HEAVY)
    assert heavy_after(imported).split() == list(HEAVY)


def test_numpy_arrays_beside_torch_switch_nothing():
    pytest.importorskip("torch")
    code = """
import sys, threading, torch, numpy, tensorly, superlora
seen = [tensorly.get_backend()]
result = superlora.kronecker([numpy.ones((2, 2))] * 2)
assert type(result) is numpy.ndarray
assert type(superlora.kronecker([torch.ones(2, 2)] * 2)) is torch.Tensor
seen.append(tensorly.get_backend())
thread = threading.Thread(target=lambda: seen.append(tensorly.get_backend()))
thread.start(); thread.join()
print(*seen)
"""
    assert run_python(code) == "numpy numpy numpy"


def modules():
    """List every module of the package."""
    return sorted(
        module.name for module in pkgutil.walk_packages(superlora.__path__, "superlora.")
        if not module.name.endswith("__main__")
    )  # fmt: skip


def test_every_module_but_the_bindings_imports_without_torch_and_jax():
    free = [name for name in modules() if not name.startswith(BOUND_TO_TORCH)]
    assert {"superlora.plan", "superlora.design.layout", "superlora.algebra.form"} <= set(free)
    code = f"""
import importlib, sys
for name in {HEAVY}:
    sys.modules[name] = None  # makes an import of it raise
for name in {free}:
    importlib.import_module(name)
print("all")
"""
    assert run_python(code) == "all"


def test_a_module_that_needs_torch_would_be_noticed():
    code = """
import sys
sys.modules["torch"] = None
try:
    import superlora.torch
except ImportError:
    print("refused")
"""
    assert run_python(code) == "refused"


def test_every_exported_name_exists():
    assert len(set(superlora.__all__)) == len(superlora.__all__)
    for name in superlora.__all__:
        assert getattr(superlora, name) is not None
    public = {
        name
        for name, value in vars(superlora).items()
        if not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value))
    }
    assert public <= set(superlora.__all__)


def test_every_preset_is_exported_flat():
    presets = {
        name
        for name, value in vars(superlora.presets).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    assert presets
    for name in presets:
        assert getattr(superlora, name) is getattr(superlora.presets, name)
        assert name in superlora.__all__


def test_there_is_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", superlora.__version__)


def public_objects():
    """Yield every function, class and method that a user may call, with its name."""
    namespaces = [superlora, superlora.maps, superlora.presets]
    seen = {}
    for namespace in namespaces:
        for name, value in vars(namespace).items():
            module = getattr(value, "__module__", "")
            own = module.startswith("superlora.") and "._" not in module
            if name.startswith("_") or not own or value in seen.values():
                continue
            if inspect.isfunction(value) or inspect.isclass(value):
                seen[f"{value.__module__}.{name}"] = value
    for name, value in list(seen.items()):
        if inspect.isclass(value):
            for method, function in vars(value).items():
                function = getattr(function, "__func__", function)
                # What overrides a method is documented by that one.
                known = any(method in vars(base) for base in value.__mro__[1:-1])
                if inspect.isfunction(function) and not method.startswith("_") and not known:
                    seen[f"{name}.{method}"] = function
    return seen


PUBLIC = public_objects()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_object_has_a_numpydoc_docstring(name):
    value = PUBLIC[name]
    text = inspect.getdoc(value)
    assert text, "there is no docstring"
    assert text.splitlines()[0].endswith("."), "the summary is not one sentence of one line"
    if inspect.isclass(value) and issubclass(value, Exception):
        return
    sections = set(re.findall(r"^(\w[\w ]*)\n-{3,}$", text, flags=re.MULTILINE))
    parameters = [
        parameter
        for parameter in inspect.signature(value).parameters.values()
        if parameter.name not in ("self", "cls")
    ]
    if not inspect.isclass(value) and parameters:
        assert "Parameters" in sections
        nothing = inspect.signature(value).return_annotation in (None, "None")
        assert nothing or "Returns" in sections
    assert sections & {"Parameters", "Returns", "Examples"} or inspect.isabstract(value)
    if "Parameters" in sections:
        section = re.split(r"\n\w[\w ]*\n-{3,}\n", text.split("Parameters\n----------\n")[1])[0]
        for parameter in parameters:
            stars = {parameter.VAR_KEYWORD: r"\*\*", parameter.VAR_POSITIONAL: r"\*"}
            pattern = rf"^(\w+, )*{stars.get(parameter.kind, '')}{parameter.name}(, \w+)* : "
            assert re.search(pattern, section, flags=re.MULTILINE), parameter.name


EXAMPLES = [
    name
    for name in superlora.__all__
    if inspect.isfunction(getattr(superlora, name)) or name in ("Plan", "Spec", "Supports")
]


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"fact_tt"}))  # fact_tt is lotr
def test_every_exported_function_shows_how_to_call_it(name):
    text = inspect.getdoc(getattr(superlora, name))
    assert "\nExamples\n--------\n" in text
    assert ">>> " in text
