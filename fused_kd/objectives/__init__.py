"""When have both objectives converged? See ``docs/howto/converged.md``."""

from .monitor import ConvergenceMonitor, Verdict

__all__ = ["ConvergenceMonitor", "Verdict"]
