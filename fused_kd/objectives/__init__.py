"""When have both objectives converged? See ``docs/howto/converged.md``."""

from .evaluation import evaluate
from .held_out import HeldOut
from .monitor import ConvergenceMonitor
from .picture import draw
from .probe import ParetoProbe, pareto_probe
from .schedule import LossSchedule, Ramp
from .verdict import Verdict

__all__ = [
    "ConvergenceMonitor",
    "HeldOut",
    "LossSchedule",
    "ParetoProbe",
    "Ramp",
    "Verdict",
    "draw",
    "evaluate",
    "pareto_probe",
]
