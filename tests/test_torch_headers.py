"""The bindings compile against the headers of the oldest torch that a GPU machine may have.

Of a wheel only the headers are unpacked, and the compiler checks the syntax alone: torch itself is
not installed. An older torch may name differently what the bindings use, even if it is supported.
"""

from __future__ import annotations

import subprocess
import sysconfig
import zipfile
from pathlib import Path

import pytest
from kernel_sources import TORCH_TARGET
from support.native_build import COMPILER, need_compiler
from support.processes import ROOT, passes, run, run_python

pytestmark = pytest.mark.slow

BINDINGS = sorted(path.name for path in (ROOT / "csrc" / "bindings").glob("*.cpp"))
VERSION = "2.11.0"


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return include/ of the wheel of torch VERSION, which pip fetches; skip if it cannot."""
    need_compiler()
    folder = tmp_path_factory.mktemp("torch_headers")
    command = ["-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "-d", folder]
    done = run_python(*command, f"torch=={VERSION}")
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
    folders = [pybind11.get_include(), headers, headers / "torch/csrc/api/include"]
    folders.append(sysconfig.get_paths()["include"])
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    flags += ["-Wno-unused-parameter", TORCH_TARGET, "-DUSE_CUDA", "-DFUSED_KD_X86"]
    return run(COMPILER, *flags, *(f"-isystem{f}" for f in folders), source, LC_ALL="C")


@pytest.mark.parametrize("name", BINDINGS)
def test_bindings(name: str, headers: Path) -> None:
    done = _check(ROOT / "csrc" / "bindings" / name, headers)
    passes(done)


def test_they_are_the_older_headers(headers: Path, tmp_path: Path) -> None:
    # Otherwise the check above would accept what a later torch added.
    source = tmp_path / "version.cpp"
    major, minor, _ = VERSION.split(".")
    source.write_text(
        "#include <torch/headeronly/version.h>\n"
        f"static_assert(TORCH_VERSION_MAJOR == {major} && TORCH_VERSION_MINOR == {minor});\n"
    )
    done = _check(source, headers)
    passes(done)
