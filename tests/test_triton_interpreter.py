"""The Triton kernels on CPU tensors: tests/triton_interpreted in a process of its own.

TRITON_INTERPRET is read when the kernels are decorated, so it cannot be set in this process, which
may have imported them already.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def _run(marker: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker]
    done = subprocess.run(
        [*command, "tests/triton_interpreted"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_interpreted_kernels() -> None:
    _run("not slow")


@pytest.mark.slow
def test_interpreted_kernels_in_every_regime() -> None:
    _run("slow")
