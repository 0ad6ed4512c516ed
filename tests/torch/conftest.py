"""The torch tests run on one thread: tiny products on two contended cores are 1000 times slower."""

from collections.abc import Iterator

import pytest

from tests.conftest import is_installed

if is_installed("torch"):
    import torch
else:
    collect_ignore_glob = ["*.py"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
