"""The examples run as a user runs them, and their losses fall."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from needs import need

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
#: Example: what it imports, in addition to transformers.
PACKAGES = {
    "transformers_trainer": "accelerate",
    "trl_gkd": "trl",
    "trl_distillation": "trl",
    "liger": "transformers",
    "model_optimizer": "modelopt",
    "lightning_module": "lightning",
    "accelerate_loop": "accelerate",
    "ddp": "transformers",
    "fsdp2": "transformers",
    "cached_teacher": "transformers",
}


def test_every_example_is_run_and_short_enough_to_be_copied() -> None:
    files = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    del files["measure"]  # runs the others
    assert files.keys() == PACKAGES.keys()
    assert max(files.values()) <= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_an_example_trains(name: str, tmp_path: Path) -> None:
    need("transformers")
    need(PACKAGES[name])
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    module = ["-m", *launch] if name in ("ddp", "fsdp2") else []
    command = [sys.executable, *module, str(EXAMPLES / f"{name}.py")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ((first, last),) = re.findall(r"^loss (\S+) -> (\S+)$", done.stdout, re.MULTILINE)
    assert 0 < float(last) < 0.8 * float(first)
