"""One thread: these models are tiny, and threads that wait for each other take most of the time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.backends import one_thread


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield
