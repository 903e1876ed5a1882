"""A pytest plugin for the tests on a device: nothing that one of them shows is lost by the next.

Loaded by name (``-p gpu_plugin``). A failure is printed when it happens. A process whose context a
test has lost ends, and so does one whose test does not return in GPU_CHECK_TEST_SECONDS; where
pytest-xdist runs the tests, another process takes its place.
"""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.gpu_guard import HUNG, LOST, lost

SECONDS = float(os.environ.get("GPU_CHECK_TEST_SECONDS", "inf"))
DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda")
#: Standard error as it is now: pytest captures it later.
_ERRORS = os.fdopen(os.dup(2), "w")
_is_worker = _hands_out = False  # of pytest-xdist: runs tests for another process, or has them run


def pytest_configure(config: pytest.Config) -> None:
    global _is_worker, _hands_out
    _is_worker = hasattr(config, "workerinput")
    _hands_out = not _is_worker and bool(getattr(config.option, "numprocesses", None))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what compiles the longest last."""
    items.sort(key=lambda item: "compiled" in item.name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End the process if the test does not return, and show where it was."""
    if math.isinf(SECONDS):
        return (yield)
    watch = threading.Timer(SECONDS, _hung, [item.nodeid])
    watch.daemon = True
    watch.start()
    faulthandler.dump_traceback_later(SECONDS + 3, exit=True, file=_ERRORS)  # needs no lock
    try:
        return (yield)
    finally:
        watch.cancel()
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(trylast=True)  # after pytest-xdist has sent it
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print a failure now; end the process if nothing can follow it."""
    if not report.failed:
        return
    if not _is_worker:
        text = f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}"
        print(text, file=_ERRORS, flush=True)
    why = None if _hands_out else lost(DEVICE)
    if why is not None:
        print(f"FAILED {report.nodeid}: the device's context is lost: {why}", file=_ERRORS,
              flush=True)  # fmt: skip
        os._exit(LOST)


def _hung(test: str) -> None:
    print(f"FAILED {test}: no end within {SECONDS:g} s", file=_ERRORS, flush=True)
    faulthandler.dump_traceback(_ERRORS)
    _ERRORS.flush()
    os._exit(HUNG)
