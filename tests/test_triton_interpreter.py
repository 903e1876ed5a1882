"""The Triton kernels on CPU tensors: tests/triton_interpreted in a process of its own.

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


def _run(marker: str) -> None:
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker]
    passes(run_python(*command, "tests/triton_interpreted", TRITON_INTERPRET="1"))


def test_interpreted_kernels() -> None:
    _run("not slow")


@pytest.mark.slow
def test_interpreted_kernels_in_every_regime() -> None:
    _run("slow")
