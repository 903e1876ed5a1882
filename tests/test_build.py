"""What an installation contains, and that it works without the compiled module."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from support.native_build import copy_source
from support.processes import ROOT, passes, printed_by, run_python

from fused_kd import extension, ops
from fused_kd.divergences import DIVERGENCES

_module = extension.cpu.load()
compiled = pytest.mark.skipif(_module is None, reason=str(extension.cpu.why_not()))


def _tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@compiled
def test_the_module_needs_only_what_is_there_anyway() -> None:
    if sys.platform != "linux":
        pytest.skip("an ELF module: Linux")
    needed = re.findall(r"NEEDED.*\[(.*)\]", _tool("readelf", "-d", str(_module.__file__)))  # type: ignore[union-attr]
    sanitizers = {"libasan", "libubsan"} if "asan" in os.environ.get("LD_PRELOAD", "") else set()
    allowed = {"libtorch_cpu", "libc10", "libstdc++", "libm", "libgcc_s", "libc", "libpthread"}
    names = {name.partition(".so")[0] for name in needed}
    assert {"libtorch_cpu"} <= names
    assert {n for n in names if not n.startswith("ld-linux")} <= allowed | sanitizers


@compiled
def test_the_module_uses_only_the_stable_interface_of_torch() -> None:
    # No C++ name of torch: those change from one version to the next
    symbols = _tool("nm", "-D", "--undefined-only", str(_module.__file__)).split()  # type: ignore[union-attr]
    of_torch = [s for s in symbols if re.match(r"_Z\w*N(K?)(2at|3c10|5torch)\d", s)]
    assert of_torch == []
    # the C interface: what the stable one is made of
    assert [s for s in symbols if s.startswith(("aoti_torch_", "torch_"))]


@compiled
def test_the_module_exports_only_its_entry() -> None:
    symbols = _tool("nm", "-D", "--defined-only", str(_module.__file__))  # type: ignore[union-attr]
    names = {line.split()[-1] for line in symbols.splitlines()}
    assert "PyInit__C" in names
    assert not [name for name in names if "fused_kd" in name]


@compiled
def test_both_languages_have_the_same_row_statistics_and_divergences() -> None:
    # Python's copies shape the tensors in a compiler's trace, and are the kernels' codes
    info = extension.cpu.build_info()
    assert info is not None
    assert info["row_statistics"] == ops.STATS
    assert info["divergences"] == list(DIVERGENCES)


def _functions(listing: str) -> dict[str, str]:
    """Return the disassembled code of each function in objdump's listing, by mangled name."""
    parts = re.split(r"^[0-9a-f]+ <(\S+)>:$", listing, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@compiled
def test_vector_instructions_stay_in_their_namespaces() -> None:
    # A processor without AVX executes none outside the kernels chosen for another.
    # Functions are distinguished by name: what isn't in the namespace of an instruction set
    # (standard library templates, lambdas of the driver) may be called on any processor
    info = extension.cpu.build_info()
    assert info is not None
    if "avx2" not in info["instruction_sets"]:  # type: ignore[operator]
        pytest.skip("not an x86-64 module")
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    symbols = _tool("nm", str(_module.__file__))  # type: ignore[union-attr]
    if "rows_forward" not in symbols:
        pytest.skip("the module is stripped of its symbols")
    listing = _tool("objdump", "-d", "--no-show-raw-insn", str(_module.__file__))  # type: ignore[union-attr]
    names = ("avx2", "avx512", "avx512_bf16", "amx")
    functions: dict[str, set[str]] = {isa: set() for isa in names}
    tiles = set()
    for name, code in _functions(listing).items():
        if re.search(r"%tmm|tilecfg|tilerelease", code):
            tiles.add(name)
        width = "zmm" if "%zmm" in code else "ymm" if "%ymm" in code else None
        vex = width or re.search(r"^\s+[0-9a-f]+:\s+v[a-z0-9]+ ", code, flags=re.MULTILINE)
        if not vex:
            continue
        owners = [isa for isa in functions if f"{len(isa)}{isa}" in name]
        assert owners, f"AVX outside the kernels: {name}"
        assert width != "zmm" or owners != ["avx2"], f"AVX-512 in {name}"
        functions[owners[0]].add(name)
    assert all(functions.values()), {isa: len(found) for isa, found in functions.items()}
    assert tiles
    assert all("3amx" in name for name in tiles), tiles


def test_the_package_without_the_module() -> None:
    # A module that doesn't load: the reference backend, and the reason shown
    code = (
        "import sys; sys.modules['fused_kd._C'] = None\n"
        "import torch, fused_kd; from fused_kd import env, backends\n"
        "x = torch.randn(2, 5)\n"
        "print(float(fused_kd.kd_loss(x, x, hard_weight=0)))\n"
        "print(env.report()['compiled_module'])\n"
        "print(env.report()['backends'])\n"
        "try: fused_kd.kd_loss(x, x, hard_weight=0, backend='cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    lines = printed_by(code, PYTHONPATH=str(ROOT)).splitlines()
    assert float(lines[0]) == 0.0
    assert lines[1].startswith("the compiled module ")
    assert lines[1] in lines[2]
    assert lines[3].startswith("backend='cpu' cannot run: the compiled module ")


def test_the_package_without_numpy() -> None:
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "import warnings; warnings.simplefilter('ignore')  # torch says that it has no numpy\n"
        "import torch, fused_kd\n"
        "from fused_kd import env, plan, testing\n"
        "x = torch.randn(2, 5, requires_grad=True)\n"
        "fused_kd.KDLoss()(x, torch.randn(2, 5), torch.tensor([1, 2])).backward()\n"
        "print(x.grad.isfinite().all().item(), env.report()['backends']['reference'])\n"
        "print('torch._dynamo' in sys.modules)\n"  # its import takes as long as torch's
    )
    assert printed_by(code, PYTHONPATH=str(ROOT)) == "True available\nFalse\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copy_source(tmp_path / "source", "tests")


def _pip(source: Path, *arguments: str, **environment: str) -> None:
    options = "--no-build-isolation", "--no-deps", "."
    passes(run_python("-m", "pip", *arguments, *options, cwd=source, **environment))


def _installed(target: Path) -> tuple[list[Path], str]:
    """Return an installation's compiled modules and env's report; assert that it computes."""
    code = (
        # an editable installation would provide its own compiled module
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in f.__module__]\n"
        "import torch, fused_kd\n"
        "x = torch.randn(2, 5, requires_grad=True)\n"
        "fused_kd.KDLoss()(x, torch.randn(2, 5), torch.tensor([1, 2])).backward()\n"
        f"assert fused_kd.__file__.startswith({str(target)!r}), fused_kd.__file__\n"
        "from fused_kd import env; env.main([])"
    )
    return sorted(target.glob("fused_kd/_C*.so")), printed_by(code, PYTHONPATH=str(target))


def _setup(source: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code`, then ``setup.py build_py``, in another process."""
    code += "\nimport runpy; runpy.run_path('setup.py', run_name='__main__')"
    return run_python("-c", code, "build_py", "-d", "built", cwd=source, **environment)


def _files(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return {str(path) for path in paths if "__pycache__" not in path.parts}


def test_importing_setup_builds_nothing(source: Path, tmp_path: Path) -> None:
    # Neither a command nor a decision: torch is not imported, the last build's note is kept
    note = source / "fused_kd" / "_not_built.txt"
    note.write_text("the last build's reason")
    before = _files(tmp_path)
    code = (
        "import importlib.util, os, sys\n"
        f"spec = importlib.util.spec_from_file_location('setup', {str(source / 'setup.py')!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "print(os.getcwd(), 'torch' in sys.modules)"
    )
    assert passes(run_python("-c", code, "build_py", cwd=tmp_path)) == f"{tmp_path} False\n"
    assert note.read_text() == "the last build's reason"
    assert _files(tmp_path) == before


def test_setup_runs_from_another_directory(source: Path, tmp_path: Path) -> None:
    # Metadata, packages and notes are found: the path of the caller does not matter
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    off = {"FUSED_KD_BUILD": "0", "FUSED_KD_CUDA": "0"}
    for arguments in (["build_py", "-d", "built"], ["build_ext", "--inplace"]):
        passes(run_python(source / "setup.py", *arguments, cwd=elsewhere, **off))
    assert _files(elsewhere) == set()
    names = {"_not_built.txt", "_cuda_not_built.txt"}
    assert {"__init__.py", "autograd.py", "py.typed", *names} <= _files(source / "built/fused_kd")
    assert names <= _files(source / "fused_kd")


def test_an_isolated_build_finds_the_torch_of_its_environment(source: Path, tmp_path: Path) -> None:
    # As pip isolates: the build's requirements alone are on the path, the Python is the same
    for name in ("setuptools", "_distutils_hack", "pybind11"):
        (tmp_path / name).symlink_to(Path(str(import_module(name).__file__)).parent)
    hide = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]"
    (tmp_path / "sitecustomize.py").write_text(hide)
    isolated = {"PYTHONPATH": str(tmp_path), "FUSED_KD_BUILD": "1"}
    assert "No module named 'torch'" in _setup(source, "import torch", **isolated).stderr
    done = _setup(source, "", **isolated)
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_old_setuptools_is_named(source: Path) -> None:
    done = _setup(source, "import setuptools; setuptools.__version__ = '65.5.0'")
    assert done.returncode == 1
    assert done.stderr.startswith("building fused_kd needs setuptools>=77; got 65.5.0: pip install")


# requested, no compiler, and one that fails
@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"FUSED_KD_BUILD": "0"}, "FUSED_KD_BUILD=0 when it was built"),
        ({"CC": "nocc", "CXX": "nocc"}, "no C++ compiler was found when it was built (nocc): e.g."),
        ({"CC": "/bin/false", "CXX": "/bin/false"}, "compiling it failed: command '/bin/false'"),
    ],
)
def test_an_installation_without_the_module(
    source: Path, tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    target = tmp_path / "target"
    _pip(source, "install", "--target", str(target), **environment)
    modules, report = _installed(target)
    assert modules == []
    assert reason in report
    assert max(map(len, report.splitlines())) < 200, "one sentence"


@pytest.mark.slow
def test_a_broken_compiler_where_the_module_is_demanded(source: Path, tmp_path: Path) -> None:
    broken = {"CC": "/bin/false", "CXX": "/bin/false", "FUSED_KD_BUILD": "1"}
    with pytest.raises(AssertionError, match="/bin/false"):
        _pip(source, "install", "--target", str(tmp_path / "target"), **broken)


@pytest.mark.slow
def test_a_word_that_the_build_does_not_know(source: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="FUSED_KD_BUILD must be 0 or 1; got 'yes'"):
        _pip(source, "install", "--target", str(tmp_path / "target"), FUSED_KD_BUILD="yes")


@pytest.mark.slow
def test_a_wheel_without_the_module(source: Path, tmp_path: Path) -> None:
    # The wheel with the module: tests/test_shipping.py
    _pip(source, "wheel", "-w", str(tmp_path), FUSED_KD_BUILD="0")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as content:
        assert any(name.endswith("licenses/LICENSE") for name in content.namelist())
        assert "fused_kd/_not_built.txt" in content.namelist()


def test_the_reason_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An installation's note comes before the error of the import
    where: Any = tmp_path / "extension.py"
    monkeypatch.setattr(extension, "__file__", str(where))
    why = extension.cpu._why_missing(ImportError("no such module"))
    assert why == "the compiled module was not built: no such module"
    (tmp_path / "_C.so").touch()
    why = extension.cpu._why_missing(ImportError("undefined symbol"))
    assert why == "the compiled module does not load: undefined symbol"
    (tmp_path / "_not_built.txt").write_text("no compiler\n")
    why = extension.cpu._why_missing(ImportError("no such module"))
    assert why == "the compiled module is not there: no compiler"
