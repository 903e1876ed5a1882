"""Every check of a user's tensors, and its message. No tensor is written before all have passed.

A message states the argument, what was expected, what was passed and what to do; an argument `name`
is what it calls the tensor. A function `check_*` raises TypeError for a wrong type or dtype, and
ValueError for a wrong value, shape, device or layout. Checks that read *values* (the range of a
label, the sign of a weight) run only for plain CPU tensors outside a compiler's trace. On a GPU
they would synchronise; FUSED_KD_DEBUG=1 allows that.
"""

from .call import check_accumulation, check_call, check_side
from .tensors import LOGIT_DTYPES, check_dense, check_floating, may_read_values, sorted_rows
from .topk import (
    SMALLEST_TAIL,
    check_topk,
    check_topk_values,
    mass_slack,
    masses,
    reads_values,
)

__all__ = [
    "LOGIT_DTYPES",
    "SMALLEST_TAIL",
    "check_accumulation",
    "check_call",
    "check_dense",
    "check_floating",
    "check_side",
    "check_topk",
    "check_topk_values",
    "mass_slack",
    "masses",
    "may_read_values",
    "reads_values",
    "sorted_rows",
]
