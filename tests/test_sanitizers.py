"""AddressSanitizer and UndefinedBehaviorSanitizer over the C++ kernels, alone and inside torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from kernel_sources import INSTRUCTION_SETS
from support import native_build
from support.processes import passes, run, run_python

pytestmark = pytest.mark.slow

# every file that calls the operators directly or walks over shapes and strides
SUITE = ["test_ops.py", "test_shapes.py", "test_inplace.py", "test_bounds.py", "test_product.py"]
SUITE += ["test_topk_kernels.py", "test_metrics_ops.py"]


def _libraries() -> list[str]:
    """Return paths to preload (without libstdc++ an exception aborts); skip if one is absent."""
    paths = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        path = passes(run(native_build.COMPILER, f"-print-file-name={name}")).strip()
        if path == name:
            pytest.skip(f"the compiler has no {name}")
        paths.append(path)
    return paths


def test_the_kernels_alone(tmp_path: Path) -> None:
    # Buffers of exact size: all instruction sets, AVX-512 and AMX emulated.
    native_build.need_compiler()
    _libraries()
    if native_build.X86:
        native_build.need_avx2()
    tables = list(native_build.TABLES)
    kernels, rows, products = native_build.build(tmp_path, tables, sanitize=True)
    native_build.run(kernels)
    native_build.run(rows, *(name for name in tables if name in INSTRUCTION_SETS))
    native_build.run(products, *tables)


def test_the_extension_inside_torch(tmp_path: Path) -> None:
    # The suite's own tests of the operators, with the module built with the sanitizers.
    native_build.need_compiler()
    libraries = _libraries()
    source = native_build.copy_source(tmp_path / "source", "tests", "examples")
    build = {"FUSED_KD_SANITIZE": "1", "FUSED_KD_BUILD": "1", **os.environ}
    passes(run_python("setup.py", "-q", "build_ext", "--inplace", cwd=source, **build))
    environment = {
        "LD_PRELOAD": ":".join(libraries),
        # Python and torch keep what they allocate until the process ends
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(source),
    }
    suite = [f"tests/{name}" for name in SUITE]
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *suite]
    done = run_python(*command, cwd=source, **environment)
    passes(done)
    assert "AddressSanitizer" not in done.stderr, done.stderr[-4000:]
