"""A pytest plugin for the tests on a GPU (``-p gpu_plugin``): it shows failures at once.

Each failure is printed when it happens. If a test has lost the CUDA context, the process exits,
since every later test would fail too; pytest-xdist starts another in its place. After
GPU_CHECK_UNTIL (seconds since 1970) the tests that are left are skipped. The slowest tests, with
"compiled" in their name, are last. GPU_CHECK_SLICE="2/8" runs the third eighth of the tests, in a
shuffled order.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

import pytest
import torch

LOST = 3  # exit status
#: Standard error as it is now: pytest captures it later.
_ERRORS = os.fdopen(os.dup(2), "w")


@pytest.fixture(autouse=True)
def _context() -> Iterator[None]:
    if time.time() > float(os.environ.get("GPU_CHECK_UNTIL", "inf")):
        pytest.skip("LEFT OUT: the time for the tests is up")
    yield
    if os.environ.get("GPU_CHECK_DEVICE") == "cpu":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        print(f"FAILED: the device's context is lost: {error}", file=_ERRORS, flush=True)
        os._exit(LOST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "compiled" in item.name)
    if wanted := os.environ.get("GPU_CHECK_SLICE"):
        index, count = map(int, wanted.split("/"))
        random.Random(0).shuffle(items)
        items[:] = items[index::count]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        text = f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}"
        print(text, file=_ERRORS, flush=True)
