"""Kernels compiled beforehand: what a folder of objects must hold to be linked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cuda_objects
import pytest
from support.native_build import copy_source
from support.processes import ROOT, passes, run_python

FLAGS = ["-O3", "-fmad=false"]


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Copy csrc/ to tmp_path; return the copied files that are compiled."""
    target = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", target, ignore=shutil.ignore_patterns("__pycache__"))
    return sorted(str(path) for path in (target / "cuda").glob("*.cu"))


@pytest.fixture
def folder(tmp_path: Path, sources: list[str]) -> Path:
    # Files that stand for objects (only their names are checked), and their stamp.
    target = tmp_path / "objects"
    target.mkdir()
    for source in sources:
        (target / f"{Path(source).stem}.o").write_bytes(b"object")
    cuda_objects.write_stamp(target, sources, FLAGS, "13.0", "9.0", {})
    return target


def test_objects_of_these_sources(folder: Path, sources: list[str]) -> None:
    for architectures in ("", "9.0"):
        objects = cuda_objects.find(folder, sources, FLAGS, "13.1", architectures)
        assert objects.files == [str(folder / f"{Path(source).stem}.o") for source in sources]
        assert objects.architectures == "9.0"


def _why(folder: Path, sources: list[str], cuda: str = "13.0", architectures: str = "") -> str:
    with pytest.raises(cuda_objects.Unusable) as caught:
        cuda_objects.find(folder, sources, FLAGS, cuda, architectures)
    return str(caught.value)


@pytest.mark.parametrize("changed", ["cuda/rows_bf16.cu", "cuda/sums.cuh", "kd_math.h"])
def test_one_that_is_stale_is_named(
    changed: str, folder: Path, sources: list[str], tmp_path: Path
) -> None:
    with (tmp_path / "csrc" / changed).open("a") as file:
        file.write("\n")
    name = "rows_bf16" if changed.endswith(".cu") else "launch"  # a header is in all of them
    assert _why(folder, sources).startswith(f"FUSED_KD_CUDA_OBJECTS: {folder / name}.o is stale")


def test_other_flags_are_other_sources(folder: Path, sources: list[str]) -> None:
    with pytest.raises(cuda_objects.Unusable, match=r"launch\.o is stale"):
        cuda_objects.find(folder, sources, [*FLAGS, "-fmad=true"], "13.0", "")


def test_what_has_nothing_to_do_with_the_kernels_may_change(
    folder: Path, sources: list[str], tmp_path: Path
) -> None:
    for path in ("cpu/rows.h", "bindings/operators.h", "bindings/cuda_ops.cpp"):
        (tmp_path / "csrc" / path).write_text("")
    assert cuda_objects.find(folder, sources, FLAGS, "13.0", "")


def test_one_that_is_missing_is_named(folder: Path, sources: list[str]) -> None:
    (folder / "rows_f32.o").unlink()
    assert f"{folder / 'rows_f32.o'} is missing" in _why(folder, sources)
    (folder / cuda_objects.STAMP).unlink()
    assert f"{folder / 'objects.json'} is missing" in _why(folder, sources)


def test_another_compiler_and_other_architectures(folder: Path, sources: list[str]) -> None:
    assert "by nvcc 13.0; torch is built for CUDA 12.8" in _why(folder, sources, "12.8")
    why = _why(folder, sources, architectures="8.0;9.0")
    assert "compiled for 9.0; TORCH_CUDA_ARCH_LIST is 8.0;9.0" in why


NVCC = """#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0;; esac
echo "$*" >> {folder}/calls
while [ $# -gt 1 ]; do shift; done
echo object > "$1"
"""


@pytest.mark.parametrize(("architectures", "threads"), [("9.0", False), ("8.0;9.0+PTX", True)])
def test_the_command_that_compiles_them(architectures: str, threads: bool, tmp_path: Path) -> None:
    # One call of nvcc for each file, its architectures at the same time; then the stamp.
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC.replace("{folder}", str(tmp_path)))
    nvcc.chmod(0o755)
    notes = {path: path.read_text() for path in (ROOT / "fused_kd").glob("*_not_built.txt")}
    environment = {"CUDA_HOME": str(tmp_path), "TORCH_CUDA_ARCH_LIST": architectures}
    output = tmp_path / "objects"  # the caller's directory, not that of setup.py
    command = [ROOT / "setup.py", "cuda_objects", "--output", "objects"]
    passes(run_python(*command, cwd=tmp_path, MAX_JOBS="3", **environment))
    calls = (tmp_path / "calls").read_text().splitlines()
    files = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    assert sorted(call.split()[-3].rpartition("/")[2] for call in calls) == files
    assert all(("--threads=3" in call) == threads for call in calls)
    stamp = json.loads((output / "objects.json").read_text())
    assert (stamp["nvcc"], stamp["architectures"]) == ("13.0", architectures)
    assert sorted(stamp["seconds"]) == files
    # it builds no module: what the last build left is as it was
    assert {path: path.read_text() for path in notes} == notes


def test_any_version_of_setuptools_compiles_in_place(tmp_path: Path) -> None:
    # Older ones refuse pyproject.toml; only commands that need metadata require another.
    code = "import runpy, setuptools; setuptools.__version__ = '68.0.0'; "
    code += "runpy.run_path('setup.py', run_name='__main__')"
    source = copy_source(tmp_path / "source")
    (source / "pyproject.toml").write_text("[project]\nthis is what they would not read\n")
    build = {"FUSED_KD_BUILD": "0", "FUSED_KD_CUDA": "0"}
    for command, works in (("build_ext", True), ("bdist_wheel", False)):
        done = run_python("-c", code, command, cwd=source, **build)
        assert (done.returncode == 0) == works, done.stderr
        assert works or "needs setuptools>=77; got 68.0.0" in done.stderr
