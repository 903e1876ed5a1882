"""Tools for tests: difficult inputs, the eager baseline, the error rule, memory measurements."""

from .baseline import eager_divergence, eager_kd_loss, eager_topk_divergence
from .error_rule import (
    Conditioning,
    Result,
    assert_no_worse,
    assert_obeys_error_rule,
    conditioning,
    evaluate,
    truth_and_eager,
)
from .inputs import DTYPES, REGIMES, Inputs, make_inputs
from .memory import Peak, cpu_peak, guarded

__all__ = [
    "DTYPES",
    "REGIMES",
    "Conditioning",
    "Inputs",
    "Peak",
    "Result",
    "assert_no_worse",
    "assert_obeys_error_rule",
    "conditioning",
    "cpu_peak",
    "eager_divergence",
    "eager_kd_loss",
    "eager_topk_divergence",
    "evaluate",
    "guarded",
    "make_inputs",
    "truth_and_eager",
]
