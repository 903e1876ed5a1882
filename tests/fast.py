"""The old name of support.backends, for the tests of benchmarks and integrations."""

from support.backends import needs_cpu, one_thread

__all__ = ["needs_cpu", "one_thread"]
