"""The Triton kernels on CPU tensors: tests/triton_interpreted in another process.

TRITON_INTERPRET is read when the kernels are decorated, so it cannot be set in this process, which
may have imported them already.
"""

from __future__ import annotations

import importlib.util

import pytest
from support.processes import passes, run_python

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def _run(marker: str, *files: str) -> None:
    # all in the folder, and of the other tests those whose backend is triton
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker, "-k", "triton"]
    files = tuple(f"tests/triton_interpreted/{name}" for name in files)
    passes(run_python(*command, *files, TRITON_INTERPRET="1"))


# processes for as many workers
@pytest.mark.parametrize(
    "files",
    [
        "test_edges.py",
        "test_parity.py test_references.py",
        "test_classes.py",
        "test_moments.py ../test_metrics.py",
    ],
)
def test_interpreted_kernels(files: str) -> None:
    _run("not slow", *files.split())


@pytest.mark.slow
def test_interpreted_kernels_in_every_regime() -> None:
    _run("slow", "test_parity.py")
