"""One thread: these models are tiny, and threads that wait for each other take most of the time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.backends import one_thread
from torch import distributed as dist


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(params=[False, True], ids=["logits", "heads"])
def heads(request: pytest.FixtureRequest) -> bool:
    """Return whether both sides are heads (else logits); a test runs with both."""
    return bool(request.param)


@pytest.fixture
def one_process() -> Iterator[None]:
    """Start a process group of this process alone, for one test."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
