"""What the transform imports, compiles and says in a new process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from superlora.maps import walsh_hadamard
from tests.conftest import is_installed

needs_numba = pytest.mark.skipif(not is_installed("numba"), reason="numba is not installed")


def run_python(code, **environment):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("environment", [{}, {"NUMBA_DISABLE_JIT": "1"}])
def test_what_is_imported_and_when(environment):
    code = """
import sys, numpy
from superlora.maps import walsh_hadamard
assert not {"torch", "jax", "numba", "llvmlite"} & set(sys.modules)
y = walsh_hadamard.fwht(numpy.ones(16))
assert not {"torch", "jax", "numba"} & set(sys.modules)
y = walsh_hadamard.fwht(numpy.ones(512))
assert not {"torch", "jax"} & set(sys.modules)
assert y[0] == 512 and not y[1:].any()
print("superlora.maps._native_transform" in sys.modules)
"""
    used = is_installed("numba") and not environment
    assert run_python(code, **environment) == [str(used)]


def test_without_numba_nothing_is_said():
    code = """
import sys
sys.modules["numba"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
import numpy
from superlora.maps import walsh_hadamard
assert walsh_hadamard.fwht(numpy.ones(512))[0] == 512
print(*map(type, walsh_hadamard._failures))
"""
    assert run_python(code) == ["<class", "'ModuleNotFoundError'>"]


def test_a_broken_numba_is_told_of():
    code = """
import importlib.machinery, sys, types, warnings
sys.modules["numba"] = types.ModuleType("numba")
sys.modules["numba"].__spec__ = importlib.machinery.ModuleSpec("numba", None)
import numpy
from superlora.maps import walsh_hadamard
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert walsh_hadamard.fwht(numpy.ones(512))[0] == 512
    assert walsh_hadamard.fwht(numpy.ones(512))[0] == 512
print(len(caught), "kernels" in str(caught[0].message))
"""
    assert run_python(code) == ["1", "True"]


@needs_numba
def test_a_read_only_package_is_no_error(tmp_path):
    """The first call in a process whose caches cannot be written to."""
    package = Path(walsh_hadamard.__file__).parent
    copy = tmp_path / "superlora"
    (copy / "maps").mkdir(parents=True)
    for name in ("maps/_native_transform.py", "maps/walsh_hadamard.py", "_backend.py"):
        shutil.copy(package.parent / name, copy / name)
    for name in ("__init__.py", "maps/__init__.py"):
        (copy / name).touch()
    blocked = tmp_path / "blocked"
    blocked.touch()  # a file where a folder would be made: also for those who may do all
    (copy / "maps" / "__pycache__").touch()
    code = """
import numpy
from superlora.maps import walsh_hadamard
assert walsh_hadamard.fwht(numpy.ones(512, numpy.float32))[0] == 512
print(walsh_hadamard._failures)
"""
    environment = {
        "PYTHONPATH": str(tmp_path),
        "HOME": str(blocked),
        "XDG_CACHE_HOME": str(blocked),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    assert run_python(code, **environment) == ["[]"]
