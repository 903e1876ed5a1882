"""The end of a process of a process group: with an exit status, without Python's finalization."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from torch import distributed as dist


def run_rank(main: Callable[[], object]) -> NoReturn:
    """Run `main`, leave the process group and end this process; the status is 1 if `main` raised.

    Returning from the program instead would let Python finalize, and that can abort the process
    (SIGABRT): a worker thread of gloo may hold the last reference to a collective's tensor, and
    releases it when there is no interpreter left to release it with. `os._exit` skips
    finalization, and with it the flushing of output, which is therefore done here.

    A rank that raised leaves the group without `destroy_process_group`, which would wait for
    collectives that the other ranks cannot complete.
    """
    status = 1
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        status = 0
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
