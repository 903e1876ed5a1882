"""NeMo Automodel's ``KDLoss`` by its signature: change ``kd_loss_fn`` of a recipe's configuration.

``_target_: fused_kd.integrations.automodel.KDLoss``. Written from its source (July 2026) and tested
against its formula; never run inside Automodel.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import KDLoss as _KDLoss
from ..checks import check_dense
from .arguments import counted


class KDLoss(nn.Module):
    """T² · KL(teacher ‖ student) at temperature T, over the rows that count.

    Unlike Automodel's it is 0 if no row counts, whatever the logits; tensor parallelism is refused.

    Args:
        ignore_index: rows with this label do not count.
        temperature: of both sides.
        fp32_upcast: no effect: all arithmetic is float32.
        tp_group: None; logits must be whole.
        chunk_size: no effect: nothing is materialised that chunks would cut.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value outside its range, or a `tp_group`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: Any = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.fp32_upcast = fp32_upcast
        self.tp_group = tp_group
        self.chunk_size = chunk_size
        self._loss()  # refuses what is out of range

    def _loss(self) -> _KDLoss:
        if self.tp_group is not None:
            raise ValueError(
                "tp_group must be None: the loss needs whole rows of logits, not a shard of the "
                f"vocabulary; got {self.tp_group!r}"
            )
        return _KDLoss.like(
            "automodel", ignore_index=self.ignore_index, temperature=self.temperature
        )

    def forward(
        self,
        student_logits: Tensor,  # (..., V)
        teacher_logits: Tensor,  # (..., V)
        labels: Tensor,  # as many as there are rows; only says which rows count
        num_batch_labels: float | Tensor | None = None,
    ) -> Tensor:
        """The mean over the rows that count, or their sum over `num_batch_labels`.

        Raises:
            TypeError: no tensor, one of the wrong dtype, or a DTensor.
            ValueError: shapes or values that do not fit; as :func:`fused_kd.kd_loss`.
        """
        check_dense("student_logits", student_logits)
        labels, rows = counted(labels, self.ignore_index), student_logits.shape[:-1]
        if labels.numel() == rows.numel():
            labels = labels.reshape(rows)
        loss: Tensor = self._loss()(
            student_logits, teacher_logits, labels, num_items=num_batch_labels
        )
        return loss
