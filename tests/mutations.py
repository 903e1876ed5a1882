"""Break the product in a copy, one fault at a time: ``python tests/mutations.py [WORD ...]``.

Each entry of mutations.toml replaces one text of one file, and names the tests that must then
fail; without a fault they must pass. Words select the entries whose file or promise contains one
of them. Needs Python 3.11, and the module for CPUs, compiled in place. With ccache on the PATH, a
fault of that module compiles only the files that it changes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import tomllib

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("fused_kd", "csrc", "tests", "benchmarks", "setup.py", "pyproject.toml", "README.md")
#: Sources of the module for CPUs. Those in csrc/cuda are compiled by the tests that emulate them.
COMPILED = ("csrc/bindings", "csrc/cpu", "csrc/kd_math.h", "csrc/problem.h")
INTERPRETED = "tests/triton_interpreted"


class Mutation(NamedTuple):
    """A fault, and the tests that must find it."""

    what: str  # the promise that it breaks
    file: str
    before: str  # occurs once in the file
    after: str
    tests: list[str]  # node ids of pytest; at least one of these tests must fail

    @property
    def is_compiled(self) -> bool:
        return self.file.startswith(COMPILED)


def selected(words: list[str]) -> list[Mutation]:
    """Return the entries that contain one of the words (no words: all), those to be compiled last.

    Raises:
        ValueError: The text of an entry does not occur exactly once.
    """
    entries = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text())["mutation"]
    mutations = [Mutation(**entry) for entry in entries]
    for m in mutations:
        if (ROOT / m.file).read_text().count(m.before) != 1:
            raise ValueError(f"{m.file} must contain once: {m.before!r}")
    if words:
        mutations = [m for m in mutations if any(w in m.file or w in m.what for w in words)]
    return sorted(mutations, key=lambda m: m.is_compiled)


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in a folder, with these variables; any status is returned."""
    environment = {**os.environ, "PYTHONPATH": str(folder), **variables}
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def build(folder: Path) -> None:
    """Compile the module for CPUs in place; raise CalledProcessError if that fails."""
    compilers = {"CC": "ccache gcc", "CXX": "ccache g++"} if shutil.which("ccache") else {}
    variables = {"FUSED_KD_BUILD": "1", "FUSED_KD_CUDA": "0", **compilers}
    run(["setup.py", "-q", "build_ext", "--inplace"], folder, **variables).check_returncode()


def run_tests(tests: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run pytest up to a failure; its exit status is 0 if all tests pass, 1 if one fails."""
    variables = {"FUSED_KD_ALL_FRAMEWORKS": "1"}  # a missing one is an error, no skipped test
    if tests[0].startswith(INTERPRETED):
        variables["TRITON_INTERPRET"] = "1"
    return run(["-m", "pytest", "-qx", "-p", "no:cacheprovider", *tests], folder, **variables)


def is_caught(mutation: Mutation, folder: Path) -> bool:
    """Return True if a test fails, or the tests crash, with the fault in place.

    `folder` is the copy to break. Its source is restored afterwards, but not the compiled module,
    which keeps the fault until the next build: so compiled faults come last.

    Raises:
        subprocess.CalledProcessError: The fault does not compile.
    """
    path = folder / mutation.file
    source = path.read_text()
    path.write_text(source.replace(mutation.before, mutation.after))
    try:
        if mutation.is_compiled:
            build(folder)
        status = run_tests(mutation.tests, folder).returncode
        return status == 1 or status < 0  # below 0: a signal, as of an access outside of memory
    finally:
        path.write_text(source)


def main(words: list[str]) -> int:
    """Print what is caught; return 0 if all selected faults are and the tests pass without them."""
    mutations = selected(words)
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in COPIED:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, folder / part)
        for is_interpreted in (False, True):
            tests = sorted({x for m in mutations for x in m.tests})
            tests = [x for x in tests if x.startswith(INTERPRETED) == is_interpreted]
            result = run_tests(tests, folder) if tests else None
            if result is not None and result.returncode != 0:
                print(f"fails without a fault:\n{result.stdout}{result.stderr}")
                return 1
        for m in mutations:
            caught = is_caught(m, folder)
            missed += not caught
            print("caught" if caught else "MISSED", m.file, m.what, sep="  ", flush=True)
    print(f"{len(mutations) - missed} of {len(mutations)} caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
