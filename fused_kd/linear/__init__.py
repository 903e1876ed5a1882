"""The linear level: the loss from hidden states and lm_head weights of both models.

The way of data: functional → autograd → operators → chunks → products and the row kernels.
"""

from .functional import linear_kd_loss

__all__ = ["linear_kd_loss"]
