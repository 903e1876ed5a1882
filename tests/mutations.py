"""Break the product in a copy, one fault at a time: ``python tests/mutations.py [WORD ...]``.

Each entry of mutations.toml replaces one text of one file, and names the tests that must then
fail. Words select the entries whose file or promise contains one of them. About half an hour
for all on two cores: a change of csrc/ is compiled again. Needs Python 3.11.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import tomllib

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("fused_kd", "csrc", "tests", "benchmarks", "setup.py", "pyproject.toml", "README.md")
COMPILED = ("csrc/bindings", "csrc/cpu", "csrc/kd_math.h", "csrc/problem.h")


class Mutation(NamedTuple):
    """A fault, and the tests that must find it."""

    what: str  # the promise that it breaks
    file: str
    before: str  # occurs once in the file
    after: str
    tests: str  # arguments of pytest


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in the copy, which its Python imports."""
    environment = os.environ | {"PYTHONPATH": str(folder), "FUSED_KD_CUDA": "0"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def build(folder: Path) -> None:
    """Compile the CPU module of the copy."""
    run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder).check_returncode()


def tested(tests: str, folder: Path) -> int:
    """Return pytest's exit status: 0 if the tests pass, 1 if one fails."""
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-m", "not gpu"]
    return run([*command, *shlex.split(tests)], folder).returncode


def is_caught(mutation: Mutation, folder: Path) -> bool:
    """Return True if the tests fail with the fault; the copy is mended afterwards."""
    path = folder / mutation.file
    source = path.read_text()
    if source.count(mutation.before) != 1:
        raise ValueError(f"{mutation.file} must contain once: {mutation.before!r}")
    path.write_text(source.replace(mutation.before, mutation.after))
    is_compiled = mutation.file.startswith(COMPILED)
    try:
        if is_compiled:
            build(folder)
        return tested(mutation.tests, folder) == 1
    finally:
        path.write_text(source)
        if is_compiled:
            build(folder)


def main(words: list[str]) -> int:
    """Return 0 if all selected faults are caught and the tests pass without them."""
    entries = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text())["mutation"]
    mutations = [Mutation(**entry) for entry in entries]
    if words:
        mutations = [m for m in mutations if any(w in m.file or w in m.what for w in words)]
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in COPIED:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, folder / part)
        for tests in sorted({m.tests for m in mutations}):
            if tested(tests, folder) != 0:
                print(f"fails without a fault: {tests}")
                return 1
        for mutation in mutations:
            caught = is_caught(mutation, folder)
            missed += not caught
            print(
                "caught" if caught else "MISSED", mutation.file, mutation.what, sep="  ", flush=True
            )
    print(f"{len(mutations) - missed} of {len(mutations)} caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
