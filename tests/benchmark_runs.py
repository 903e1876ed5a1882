"""What the tests of the benchmarks share: tiny sizes, quick losses, one thread."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fast import one_thread

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import floors  # noqa: E402
from fused_kd.backends import why_not  # noqa: E402

NEEDS_CPU = pytest.mark.skipif(
    why_not("cpu", "cpu") is not None, reason=f"backend cpu: {why_not('cpu', 'cpu')}"
)
#: Who is quick enough for a test.
QUICK = ["--peers", "kdloss", "kdloss-inplace", "kdloss-heads", "eager", "checkpoint"]
TINY = ["--n", "4", "--v", "60", "--hidden", "8", "12", "--repeats", "2", "--in-process", *QUICK]


@contextmanager
def quickly() -> Iterator[None]:
    """Floors are measured once, and no measurement searches all that other tests have left."""
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr(floors, "SHORT", 0.0)
        gc.freeze()
        yield
        gc.unfreeze()
