"""Ranks end with a status that says whether they failed, and flushed output; messages name them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.processes import PATH, failures, run_python
from torch import distributed as dist
from torch.multiprocessing import ProcessExitedException

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)
RANK = """
import atexit, torch.distributed as dist
from support.ranks import run_rank

def main():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(print, "finalized")
    print("main ran")  # stays in the buffer of a pipe
    {last}

run_rank(main)
"""


def raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 fails")


def end_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(3)


def test_a_check_that_fails_on_one_rank_is_reported_with_the_rank(tmp_path: Path) -> None:
    (message,) = failures({"one": raise_on_rank_1}, 2, tmp_path)
    assert message.startswith("one, rank 1 of 2:\n")
    assert "ValueError: rank 1 fails" in message


def test_a_rank_that_ends_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProcessExitedException, match="process 1 terminated with exit code 3"):
        failures({"one": end_rank_1}, 2, tmp_path)


@pytest.mark.parametrize(("last", "status"), [("pass", 0), ("raise ValueError('bad')", 1)])
def test_the_status_of_a_rank(last: str, status: int) -> None:
    # Output arrives, and Python does not finalize: finalization can abort.
    ran = run_python("-c", RANK.format(last=last), PYTHONPATH=PATH)
    assert ran.returncode == status, ran.stderr
    assert ran.stdout == "main ran\n"
    assert ("Traceback" in ran.stderr) == bool(status)
