"""Settings of all tests: hypothesis sets no deadline, because the first call of a kind imports, caches or compiles."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # the commands that tests start share the machine with the other worker's
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("functional_lm", deadline=None)
settings.load_profile("functional_lm")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Products as small as these take longer to share out than to do, and on a busy machine far longer."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
