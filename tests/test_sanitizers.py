"""AddressSanitizer and UndefinedBehaviorSanitizer over the C++ kernels, alone and inside torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import native_build

pytestmark = pytest.mark.slow

# every file that calls the operators directly or walks over shapes and strides
SUITE = ["test_ops.py", "test_shapes.py", "test_inplace.py", "test_saved.py", "test_bounds.py"]
SUITE += ["test_product.py"]


def _libraries() -> list[str]:
    """What must be loaded before Python: without libstdc++ the first C++ exception aborts."""
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        command = [native_build.COMPILER, f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if path == name:
            pytest.skip(f"the compiler has no {name}")
        found.append(path)
    return found


def test_the_kernels_alone(tmp_path: Path) -> None:
    """Buffers of exact size: all instruction sets, AVX-512 emulated."""
    native_build.need_compiler()
    _libraries()
    if native_build.X86:
        native_build.need_avx2()
    tables = list(native_build.TABLES)
    kernels, rows, products = native_build.build(tmp_path, tables, sanitize=True)
    native_build.run(kernels)
    native_build.run(rows, *tables)
    native_build.run(products, *tables)


def test_the_extension_inside_torch(tmp_path: Path) -> None:
    """The suite's own tests of the operators, with the module built with the sanitizers."""
    native_build.need_compiler()
    libraries = _libraries()
    source = tmp_path / "source"
    for name in ("csrc", "fused_kd", "tests"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "*_not_built.txt")
        shutil.copytree(native_build.ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (native_build.ROOT / name).exists():
            shutil.copy(native_build.ROOT / name, source)
    build = {"FUSED_KD_SANITIZE": "1", "FUSED_KD_BUILD": "1", **os.environ}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=source, env=build, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        # Python and torch keep what they allocate until the process ends
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(source),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [f"tests/{name}" for name in SUITE]
    done = subprocess.run(
        command, cwd=source, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "AddressSanitizer" not in done.stderr, done.stderr[-4000:]
