"""The torch tests run on one thread: tiny products on two contended cores are 1000 times slower."""

from collections.abc import Iterator

import pytest

from tests.conftest import is_installed, on_one_thread

if not is_installed("torch"):
    collect_ignore_glob = ["*.py"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    with on_one_thread():
        yield
