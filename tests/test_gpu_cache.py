"""Triton's binaries compiled beforehand, without a GPU, and found again in another place."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import triton_cache  # noqa: E402


def _entry(folder: Path) -> Path:
    """One binary as Triton keeps it."""
    entry = folder / "HASH"
    entry.mkdir(parents=True)
    paths = {name: str(entry / name) for name in ("kernel.json", "kernel.cubin")}
    for path in paths.values():
        Path(path).write_text("content")
    (entry / "__grp__kernel.json").write_text(json.dumps({"child_paths": paths}))
    return entry


def test_installed_entries_say_where_they_are(tmp_path: Path) -> None:
    _entry(tmp_path / "made")
    assert triton_cache.install(tmp_path / "made", tmp_path / "used") == 1
    group = json.loads((tmp_path / "used" / "HASH" / "__grp__kernel.json").read_text())
    assert group["child_paths"] == {
        name: str(tmp_path / "used" / "HASH" / name) for name in ("kernel.json", "kernel.cubin")
    }


COMPILE = """
import sys
from pathlib import Path
from benchmarks import gpu_cache, gpu_smoke, triton_cache

folder = Path(sys.argv[1])
with gpu_cache.filling(folder, capability=sys.argv[2]):
    gpu_smoke.launch(gpu_smoke.Case("mse", "fp32", "fp32", int(sys.argv[3])), "triton", "cpu")
print(triton_cache.count(folder))
"""


def _compile(folder: Path, capability: str = "9.0", vocabulary: int = 7) -> int:
    command = [sys.executable, "-c", COMPILE, str(folder), capability, str(vocabulary)]
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_what_was_compiled_is_found_by_another_process_elsewhere(tmp_path: Path) -> None:
    made, used = tmp_path / "made", tmp_path / "used"
    count = _compile(made)
    assert count >= 3  # forward, forward and backward, from statistics
    assert triton_cache.install(made, used) == count
    made.rename(tmp_path / "gone")
    assert _compile(used) == count
    assert _compile(used, vocabulary=20_001) > count  # another binary: it would have shown
    assert _compile(tmp_path / "other", capability="8.0") == count
    names = [{path.name for path in folder.iterdir()} for folder in (used, tmp_path / "other")]
    assert not names[0] & names[1]  # a binary for another GPU is another one
