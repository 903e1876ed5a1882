"""Other processes: commands, and functions on several ranks that communicate over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed as dist
from torch import multiprocessing

from .ranks import run_rank

ROOT = Path(__file__).resolve().parents[2]
#: PYTHONPATH that finds the test files, csrc/kernel_sources.py and the package.
PATH = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "csrc"), str(ROOT)])
#: A collective that a rank does not enter fails after this, and the test with it.
TIMEOUT = timedelta(minutes=5)


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with variables added to the environment; raise only if it cannot be started."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def run_python(*arguments: object, **keywords: Any) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, *arguments, **keywords)


def printed_by(code: str, **environment: str) -> str:
    """Run code in another Python, outside the repository; assert success and return its output."""
    return passes(run_python("-c", code, cwd=Path("/"), **environment))


def passes(done: subprocess.CompletedProcess[str]) -> str:
    """Assert that a command succeeded; return its standard output."""
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def failures(checks: dict[str, Callable[[], None]], ranks: int, folder: Path) -> list[str]:
    """Run all checks, one after the other, on every rank of one process group.

    Args:
        checks: functions of a module, by name.
        ranks: processes to start.
        folder: an empty one, for the store and the results.

    Returns:
        For each check that failed on a rank: its name, the rank and the traceback.

    Raises:
        ProcessExitedException: a rank ended before its last check; the message names the rank.
    """
    multiprocessing.spawn(_rank, (ranks, folder, checks), nprocs=ranks)
    return [line for rank in range(ranks) for line in torch.load(folder / f"{rank}.pt")]


def _rank(rank: int, *arguments: Any) -> NoReturn:
    run_rank(partial(_run_checks, rank, *arguments))


def _run_checks(rank: int, ranks: int, folder: Path, checks: dict[str, Callable[[], None]]) -> None:
    torch.set_num_threads(1)
    for name, value in {"RANK": rank, "WORLD_SIZE": ranks}.items():  # as torchrun sets them
        os.environ[name] = os.environ[f"LOCAL_{name}"] = str(value)
    dist.init_process_group(
        "gloo", f"file://{folder / 'store'}", TIMEOUT, world_size=ranks, rank=rank
    )
    dist.barrier()  # a rank that ends at once would break a connection that another is still making
    failed: list[Any] = []
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            check()
        except Exception:
            failed.append(f"{name}, rank {rank} of {ranks}:\n{traceback.format_exc()}")
    torch.save(failed, folder / f"{rank}.pt")
