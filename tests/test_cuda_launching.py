"""How the host launches CUDA kernels, on a runtime that writes down what it is asked."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support import native_build


def test_what_a_kernel_may_use_is_set_once_for_each_device(tmp_path: Path) -> None:
    """A limit set for one launch would be lowered by another thread before it."""
    native_build.need_compiler()
    program = tmp_path / "check_launching"
    sources = native_build.ROOT / "tests" / "native"
    command = [native_build.COMPILER, *native_build.FLAGS, f"-I{sources / 'fake_runtime'}"]
    command += [str(sources / "check_launching.cpp"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
