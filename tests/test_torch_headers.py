"""The bindings compile against the headers of the oldest torch that a GPU machine may have.

Of a wheel only the headers are unpacked, and the compiler checks the syntax alone: torch itself is
not installed. An older torch may spell what is used differently, though its version is supported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from kernel_sources import TORCH_TARGET
from support.native_build import COMPILER, need_compiler

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
BINDINGS = sorted(path.name for path in (ROOT / "csrc" / "bindings").glob("*.cpp"))
VERSION = "2.11.0"


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder include/ of a wheel of torch, which pip fetches without its dependencies."""
    need_compiler()
    folder = tmp_path_factory.mktemp("torch_headers")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir"]
    done = subprocess.run([*command, "-d", str(folder), f"torch=={VERSION}"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"pip cannot get torch {VERSION}: {done.stderr[-300:]}")
    (wheel,) = folder.glob("torch-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("torch/include/")]
        archive.extractall(folder, names)
    wheel.unlink()
    return folder / "torch" / "include"


def _check(source: Path, headers: Path) -> subprocess.CompletedProcess[str]:
    pybind11 = pytest.importorskip("pybind11")
    folders = [pybind11.get_include(), str(headers), str(headers / "torch/csrc/api/include"),
               sysconfig.get_paths()["include"]]  # fmt: skip
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror",
               "-Wno-unused-parameter", "-Wno-psabi", TORCH_TARGET, "-DUSE_CUDA", "-DFUSED_KD_X86",
               *(f"-isystem{folder}" for folder in folders), str(source)]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "LC_ALL": "C"},
                          capture_output=True, text=True, check=False)  # fmt: skip


@pytest.mark.parametrize("name", BINDINGS)
def test_bindings(name: str, headers: Path) -> None:
    done = _check(ROOT / "csrc" / "bindings" / name, headers)
    assert done.returncode == 0, done.stderr[-3000:]


def test_they_are_the_older_headers(headers: Path, tmp_path: Path) -> None:
    """What a later torch added is not there: else the check above would see nothing."""
    source = tmp_path / "version.cpp"
    major, minor, _ = VERSION.split(".")
    source.write_text(
        "#include <torch/headeronly/version.h>\n"
        f"static_assert(TORCH_VERSION_MAJOR == {major} && TORCH_VERSION_MINOR == {minor});\n"
    )
    done = _check(source, headers)
    assert done.returncode == 0, done.stderr[-3000:]
