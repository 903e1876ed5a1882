"""What is published: sdist and wheel, the API page, the kernel for the Hugging Face Hub."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from runpy import run_path

import pytest
from support.processes import ROOT, passes, printed_by, run


def test_the_api_page_is_up_to_date() -> None:
    pytest.importorskip("griffe")
    page = run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    assert page == (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), "run `make api`"


@pytest.mark.slow
def test_make_dist(tmp_path: Path) -> None:
    # The wheel is built from the sdist, so both are known to build
    for name in ("build", "auditwheel"):
        pytest.importorskip(name)
    if shutil.which("make") is None or shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no make, or no C++ compiler")
    made = ".*", "__pycache__", "*.so", "*_not_built.txt", "out", "build", "dist"
    ignore = shutil.ignore_patterns(*made)
    shutil.copytree(ROOT, tmp_path / "tree", ignore=ignore)  # a build leaves files behind
    environment = f"VENV={sys.prefix}"  # used as it is: make -o
    command = "make", "-o", f"{sys.prefix}/.packages", "dist", environment
    passes(run(*command, cwd=tmp_path / "tree"))
    sdist, wheel = sorted((tmp_path / "tree/dist").iterdir(), key=lambda path: path.suffix)

    with tarfile.open(sdist) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    assert {"setup.py", "csrc/kernel_sources.py", "csrc/cuda/launch.cu", "CHANGELOG.md"} <= names
    assert not {x.partition("/")[0] for x in names} & {"tests", "benchmarks", "examples", "docs"}

    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.search(rf"-{python}-{python}-manylinux_2_\d+_\w+\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        content.extractall(tmp_path / "installed")
    assert {x.partition("/")[0].partition("-")[0] for x in names} == {"fused_kd"}
    assert not [x for x in names if x.endswith((".cpp", ".h", ".cu", ".o", "/_not_built.txt"))]
    assert "fused_kd/py.typed" in names
    (module,) = (tmp_path / "installed").glob("fused_kd/*.so")
    assert module.stat().st_size < 4 << 20, "without symbols"

    # an editable installation would provide its module instead
    code = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in f.__module__]\n"
        f"{PARITY}print(fused_kd.__file__, compare(fused_kd, 'cpu', fused_kd))"
    )
    path = str(tmp_path / "installed")
    where, error = printed_by(code, PYTHONPATH=path).split()
    assert where.startswith(path)
    assert float(error) < 1e-6


#: compare(package, backend, truth): the largest error of loss and gradient against the reference.
PARITY = """
import torch, fused_kd

def compare(package, backend, truth):
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 9, 1030, generator=g) * 3
    y = torch.randint(1030, (9,), generator=g)
    worst = 0.0
    for divergence in ("forward_kl", "jsd", "tvd"):
        found = []
        for side, p, name in ((x, package, backend), (x.double(), truth, "reference")):
            s = side.clone().requires_grad_()
            loss = p.KDLoss(divergence=divergence, backend=name)(s, t.to(s), y)
            loss.backward()
            found.append(torch.cat([loss.detach()[None], s.grad.flatten()]).double())
        worst = max(worst, (found[0] - found[1]).abs().max().item())
    return worst

"""


@pytest.mark.slow
def test_the_hub_kernel_runs_alongside_the_package(tmp_path: Path) -> None:
    # Loaded by the `kernels` package, in a process that also imports fused_kd
    kernels = pytest.importorskip("kernels")
    pytest.importorskip("triton")
    run_path(str(ROOT / "tools" / "hub_kernel.py"))["lay_out"](tmp_path)
    for variant in sorted((tmp_path / "build").iterdir()):
        stated = kernels._rust.Metadata.read_from_file(variant / "metadata.json").digest
        stated.validate(kernels._rust.Digest.hash_variant(stated.algorithm, variant))
    code = (
        "import sys, kernels\n"
        "from pathlib import Path\n"
        f"kernel = kernels.get_local_kernel(Path({str(tmp_path)!r}))\n"
        "assert not [x for x in sys.modules if x.partition('.')[0] == 'fused_kd']\n"
        f"{PARITY}print(kernel.__file__, compare(kernel, 'triton', fused_kd))"
    )
    offline = {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    where, error = printed_by(code, **offline).split()
    assert where == str(tmp_path / "build" / "torch-cpu" / "__init__.py")
    assert float(error) < 1e-6
