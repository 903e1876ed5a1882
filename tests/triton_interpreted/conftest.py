"""Tests of the Triton kernels through Triton's interpreter, in a separate pytest process.

tests/test_triton_interpreter.py starts that process; by hand:
``TRITON_INTERPRET=1 pytest tests/triton_interpreted``.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read when a kernel is decorated
if not INTERPRETED:
    collect_ignore_glob = ["test_*.py"]
else:
    import torch
    import triton
    import triton.runtime.interpreter as interpreter

    torch.set_num_threads(1)
    # int32 arithmetic that overflows is an error
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)

    # The interpreter patches triton.language again at every call of one @triton.jit function by
    # another, which takes half of the time. (Before 3.9 it can't do without.)
    _patch = interpreter._patch_lang

    def _patch_once(fn: Any) -> Any:
        patched = triton.language.load.__module__ == interpreter.__name__
        return None if patched else _patch(fn)

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) == (3, 9):
        interpreter._patch_lang = _patch_once


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """Ignore warnings about entries that the kernel drops afterwards."""
    warnings.filterwarnings("ignore", category=RuntimeWarning)
