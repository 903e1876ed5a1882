"""The CUDA module built and imported with a CUDA build of torch, on a machine that needs no GPU.

A fresh environment is made with pip (5.5 GB; a minute from a local index); FUSED_KD_CUDA_PYTHON
names a Python that has torch for CUDA, setuptools, wheel and pybind11 already.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.native_build import copy_source
from support.processes import passes, run

from fused_kd import ops

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["torch==2.14.1", "numpy", "setuptools>=77", "wheel", "pybind11>=2.12"]
#: Libraries that the module may need. Not libcuda: a driver brings it, and torch opens it late.
ALLOWED = {"libtorch_cpu", "libtorch_cuda", "libc10", "libc10_cuda", "libcudart"}
ALLOWED |= {"libstdc++", "libgcc_s", "libm", "libc", "libpthread"}
OPERATORS = ["forward", "forward_backward", "forward_backward_", "forward_backward_into"]
OPERATORS += ["backward", "backward_", "rescale_", "scale_", "measure", "measure_support"]


@pytest.fixture(scope="module")
def cuda_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    if shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
        pytest.skip("no nvcc")
    if python := os.environ.get("FUSED_KD_CUDA_PYTHON"):
        return python
    folder = tmp_path_factory.mktemp("cuda_torch")
    if shutil.disk_usage(folder).free < 12e9:
        pytest.skip("a CUDA build of torch needs 6 GB, and pip as much to unpack it")
    done = run(sys.executable, "-m", "venv", "venv", cwd=folder)
    assert done.returncode == 0, done.stderr
    python = str(folder / "venv" / "bin" / "python")
    done = run(python, "-m", "pip", "install", "-q", "--no-cache-dir", *PACKAGES, cwd=folder)
    if done.returncode != 0:
        pytest.skip(f"pip cannot get a CUDA build of torch: {done.stderr[-300:]}")
    if run(python, "-c", "import torch; assert torch.version.cuda", cwd=folder).returncode != 0:
        pytest.skip("pip's torch is not a CUDA build here")
    return python


def _install(
    python: str, folder: Path, **environment: str
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    # Installs a copy of the source; returns the folder, empty if that failed, and pip's outcome.
    source, target = copy_source(folder / "source"), folder / "installed"
    command = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    done = run(*command, "--target", str(target), ".", cwd=source, MAX_JOBS="2", **environment)
    return target, done


@pytest.fixture(scope="module")
def package(cuda_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an installation with both modules."""
    build = {"FUSED_KD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    target, done = _install(cuda_python, tmp_path_factory.mktemp("package"), **build)
    passes(done)
    return target


def _ask(python: str, package: Path, code: str, *arguments: str) -> str:
    return passes(run(python, "-c", code, *arguments, cwd=package))


def _module(package: Path) -> Path:
    (module,) = package.glob("fused_kd/_cuda*.so")
    return module


def test_it_is_imported_without_a_driver(cuda_python: str, package: Path) -> None:
    assert len(list(package.glob("fused_kd/_C*.so"))) == 1
    code = (
        "import json, sys, torch, fused_kd._cuda as module\n"
        "from fused_kd import extension\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(json.dumps({\n"
        "    'info': module.build_info(), 'why_not': extension.cuda.why_not(),\n"
        "    'torch': torch.__version__, 'cuda': torch.version.cuda,\n"
        "    'missing': [x for x in sys.argv[1:] if not has('fused_kd::' + x, 'CUDA')]}))"
    )
    report = json.loads(_ask(cuda_python, package, code, *OPERATORS))
    assert report["missing"] == []
    assert report["why_not"] is None
    info = report["info"]
    assert info["architectures"] == "9.0"
    assert info["built_with_torch"] == report["torch"]
    assert info["row_statistics"] == ops.STATS
    assert str(info["cuda_toolkit"] // 1000) == report["cuda"].split(".")[0]


def test_what_it_loads(package: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    listing = run("readelf", "-d", str(_module(package)), cwd=package).stdout
    names = {name.partition(".so")[0] for name in re.findall(r"NEEDED.*\[(.*)\]", listing)}
    assert {"libtorch_cpu", "libcudart"} <= names
    assert {name for name in names if not name.startswith("ld-linux")} <= ALLOWED


def test_it_uses_only_the_stable_interface_of_torch(package: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    symbols = run("nm", "-D", "--undefined-only", str(_module(package)), cwd=package).stdout.split()
    assert [s for s in symbols if s.startswith("aoti_torch_")]
    assert [s for s in symbols if re.match(r"_Z\w*N(K?)(2at|3c10|5torch)\d", s)] == []


def test_calling_it_without_a_device_is_an_error_that_says_so(
    cuda_python: str, package: Path
) -> None:
    code = (
        "import torch, fused_kd._cuda as module\n"
        "from fused_kd import env, kd_loss\n"
        "print(torch.cuda.is_available())\n"
        "x = torch.randn(2, 5)\n"
        "calls = (lambda: module.device(0),\n"
        "         lambda: kd_loss(x, x, hard_weight=0, backend='cuda'))\n"
        "for call in calls:\n"
        "    try: call()\n"
        "    except RuntimeError as error: print(error)\n"
        "    else: print('no error')\n"
        "env.main([])"
    )
    available, device, loss, *report = _ask(cuda_python, package, code).splitlines()
    if available == "True":
        pytest.skip("this machine has a CUDA device")
    # the runtime's own words, without a driver and with one
    words = ("driver version is insufficient", "no CUDA-capable device")
    assert device.startswith("CUDA device: ")
    assert any(text in device for text in words), device
    assert loss == "backend='cuda' cannot run: the cuda backend runs on CUDA tensors, not on cpu"
    why = next(line for line in report if line.split()[:1] == ["cuda"] and "CUDA device" in line)
    assert why.split(maxsplit=1)[1] == "there is no CUDA device, or no driver for it"
    assert any(line.split() == ["architectures", "9.0"] for line in report)


def test_a_compiler_that_fails_leaves_the_cpu_module(cuda_python: str, tmp_path: Path) -> None:
    tools = tmp_path / "toolkit" / "bin"
    tools.mkdir(parents=True)
    code = "from torch.utils import cpp_extension; print(cpp_extension.CUDA_HOME)"
    real = Path(_ask(cuda_python, tmp_path, code).strip()) / "bin" / "nvcc"
    nvcc = tools / "nvcc"  # prints its version, compiles nothing
    nvcc.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) exit 1;; esac\nexec {real} "$@"\n')
    nvcc.chmod(0o755)
    build = {"CUDA_HOME": str(tools.parent), "DEBUG": "1"}
    target, done = _install(cuda_python, tmp_path / "tolerated", **build)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(target.glob("fused_kd/_C*.so"))) == 1
    assert list(target.glob("fused_kd/_cuda*.so")) == []
    code = "from fused_kd.extension import cpu, cuda; print(cuda.why_not(), cpu.why_not())"
    reasons = _ask(cuda_python, target, code)
    assert re.search(r"compiling it failed: command '\S*nvcc' failed", reasons), reasons
    assert reasons.endswith(" None\n")
    build |= {"FUSED_KD_CUDA": "1"}
    _, done = _install(cuda_python, tmp_path / "demanded", **build)
    assert done.returncode != 0
    assert "nvcc' failed" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of compiled kernels, made by a command that needs no torch."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    folder = tmp_path_factory.mktemp("objects")
    command = [sys.executable, "setup.py", "-q", "cuda_objects", "--output", str(folder / "o")]
    build = {"TORCH_CUDA_ARCH_LIST": "9.0", "MAX_JOBS": "2"}
    done = run(*command, cwd=copy_source(folder / "source"), **build)
    passes(done)
    return folder / "o"


def test_the_module_alone_from_objects_without_a_compiler_of_cuda(
    cuda_python: str, objects: Path, tmp_path: Path
) -> None:
    source = copy_source(tmp_path / "source")
    # relative to the caller's directory, not to that of setup.py
    build = {"FUSED_KD_BUILD": "0", "FUSED_KD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ""}
    build |= {"FUSED_KD_CUDA_OBJECTS": objects.name, "CUDA_HOME": str(tmp_path / "none")}
    command = [cuda_python, str(source / "setup.py"), "build_ext", "--inplace"]
    done = run(*command, cwd=objects.parent, **build)
    passes(done)
    assert "nvcc" not in done.stdout
    code = (
        "import torch, fused_kd._cuda as module; from fused_kd import extension\n"
        "print(module.build_info()['architectures'], extension.cuda.why_not())\n"
        "print(extension.cpu.why_not())"
    )
    cuda, cpu = _ask(cuda_python, source, code).splitlines()
    assert cuda == "9.0 None"
    assert cpu.endswith("FUSED_KD_BUILD=0 when it was built")
    # an object whose source has changed since is refused, by name
    with (source / "csrc" / "cuda" / "rows_f16.cu").open("a") as file:
        file.write("// changed\n")
    done = run(*command, cwd=objects.parent, **build)
    assert done.returncode != 0
    assert f"{objects / 'rows_f16.o'} is stale" in done.stderr.splitlines()[-1]


# -------------------------------------------------------------------- with a CPU build of torch

needs_cpu_torch = pytest.mark.skipif(
    torch.version.cuda is not None, reason="this torch is a CUDA build"
)


# with the other module, and alone
@needs_cpu_torch
@pytest.mark.parametrize("build", ["", "0"])
def test_it_cannot_be_demanded_of_a_cpu_torch(build: str, tmp_path: Path) -> None:
    asked = {"FUSED_KD_CUDA": "1", "FUSED_KD_BUILD": build}
    done = run(sys.executable, "setup.py", "build", cwd=copy_source(tmp_path / "s"), **asked)
    assert done.returncode != 0
    assert "torch is not a CUDA build" in done.stderr.splitlines()[-1]


@needs_cpu_torch
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "torch is not a CUDA build when it was built"),
        ({"FUSED_KD_CUDA": "0"}, "FUSED_KD_CUDA=0 when it was built"),
    ],
)
def test_the_cpu_module_does_not_need_it(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    # Only what is decided: test_build.py compiles the module for the CPU.
    environment = {"FUSED_KD_CUDA": "", **environment}
    source = copy_source(tmp_path / "s")
    command = [sys.executable, "setup.py", "build_py", "-d", str(tmp_path / "built")]
    done = run(*command, cwd=source, **environment)
    assert done.returncode == 0, done.stderr
    notes = {file.name: file for file in tmp_path.rglob("*_not_built.txt")}
    assert list(notes) == ["_cuda_not_built.txt"], "the CPU's module is left to be built"
    assert notes["_cuda_not_built.txt"].read_text() == f"{reason}\n"
