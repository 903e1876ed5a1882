"""The CUDA backend's launchers under ThreadSanitizer and AddressSanitizer, run on the CPU.

tests/cuda_on_cpu/check_races.cpp has the launches. A race is reported if nothing orders two
accesses, regardless of their order in that run.
"""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import native_build
from support.emulated_cuda import FLAGS
from support.native_build import RACE, run_emulated

pytestmark = pytest.mark.slow

DRIVER = native_build.ROOT / "tests" / "cuda_on_cpu" / "check_races.cpp"
THREAD = ["-g", "-fsanitize=thread"]


def _build(folder: Path, flags: list[str], csrc: Path, kernels: list[str]) -> Path:
    """Compile the driver with the launchers and kernel files of `csrc`; return the program."""
    folder.mkdir()
    files = [DRIVER, *(csrc / "cuda" / name for name in ["launch.cu", *kernels])]
    common = [*FLAGS, *flags, f"-I{csrc / 'cuda'}", "-xc++", "-c"]
    objects = [folder / f"{file.stem}.o" for file in files]
    jobs = [[*common, file, "-o", to] for file, to in zip(files, objects, strict=True)]
    native_build.compile_all(jobs[::-1])  # begins with the largest
    program = folder / "check_races"
    native_build.compile_one(*flags, "-rdynamic", *objects, "-o", program)
    return program


@pytest.mark.parametrize(
    ("flags", "seeds"), [(THREAD, 1), (native_build.SANITIZE, 2)], ids=["races", "memory"]
)
def test_every_launch(tmp_path: Path, flags: list[str], seeds: int) -> None:
    kernels = ["rows_f32.cu", "rows_bf16.cu"]
    program = _build(tmp_path / "all", flags, native_build.ROOT / "csrc", kernels)
    status, text = run_emulated(program, seeds)
    assert status == 0, text[:6000]
    assert re.fullmatch(r"[1-9]\d{3,} launches, 0 failed\n", text), text


#: Statements that order memory accesses, and must not be left out.
ORDERING = re.compile(
    r"(exchange\.)?\b"
    r"(block_sync|warp_sync|cluster_arrive|cluster_wait|barrier_wait_for_peers|wait_for_place|"
    r"finish|wait_until|arrive)"
    r"\((?:[^(){};]|\([^(){};]*\))*\);"
)


@pytest.mark.parametrize(
    ("file", "instance", "number"),
    [
        ("rows.cuh", "-DONLY_TVD", 18),
        ("support.cuh", "-DONLY_CLASSES", 2),
        ("classes.cuh", "-DONLY_CLASSES", 4),
        ("measure.cuh", "-DONLY_CLASSES", 2),
    ],
)
def test_whatever_is_left_out_is_reported(
    file: str, instance: str, number: int, tmp_path: Path
) -> None:
    # Every barrier, arrival and wait of a file, one after another, in a copy.
    source = (native_build.ROOT / "csrc" / "cuda" / file).read_text()
    places = list(ORDERING.finditer(source))
    assert len(places) >= number

    def report(place: re.Match[str] | None) -> str:
        copy = tmp_path / ("none" if place is None else str(place.start()))
        shutil.copytree(native_build.ROOT / "csrc", copy / "csrc")
        if place is not None:
            changed = source[: place.start()] + "(void)0;" + source[place.end() :]
            (copy / "csrc" / "cuda" / file).write_text(changed)
        flags = [*THREAD, "-O0", instance]
        status, text = run_emulated(_build(copy / "build", flags, copy / "csrc", []), 2)
        if status == RACE or "cuda_on_cpu: kernel" in text:
            return "reported"
        return f"status {status}: {text[-500:]}"

    with ThreadPoolExecutor(2) as pool:
        none, *outcomes = pool.map(report, [None, *places])
    assert none.startswith("status 0: "), none
    missed = {
        f"line {source.count(chr(10), 0, place.start()) + 1}, {place[0]}": outcome
        for place, outcome in zip(places, outcomes, strict=True)
        if outcome != "reported"
    }
    assert missed == {}
