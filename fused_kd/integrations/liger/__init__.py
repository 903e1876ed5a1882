"""Liger-Kernel's distillation losses under their names and signatures: change the import line.

Liger need not be installed. Intended differences:

* all arithmetic and the losses are float32; Liger's chunked loss computes in the logits' dtype;
* hidden states (B, S, H) are cut into chunks of at most ``chunk_size`` rows, like flat ones; weight
  gradients are summed in float32 unless ``accum_dtype`` is set;
* ``compiled`` and ``eps`` have no effect: nothing is compiled, and log 0 needs no bound;
* a teacher with a larger vocabulary is refused; Liger pads the student with logits of zero;
* a negative weight or temperature is refused.

The functional forms are in :mod:`fused_kd.integrations.liger.functional`.
"""

from .dense import LigerFusedCETVDLoss, LigerJSD, LigerKLDIVLoss
from .linear import LigerFusedLinearJSD, LigerFusedLinearJSDLoss, LigerFusedLinearKLDivLoss

__all__ = [
    "LigerFusedCETVDLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKLDivLoss",
    "LigerJSD",
    "LigerKLDIVLoss",
]
