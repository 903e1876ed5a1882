"""The old name of support.processes, for the tests of integrations."""

from support.processes import failures, run_rank

__all__ = ["failures", "run_rank"]
