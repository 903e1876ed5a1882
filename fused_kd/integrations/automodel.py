"""NeMo Automodel's ``KDLoss`` by its signature, for ``kd_loss_fn`` of a recipe's configuration.

``_target_: fused_kd.integrations.automodel.KDLoss``. The tests compare it with Automodel's own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch import distributed as dist

from .. import KDLoss as _KDLoss
from ..checks import check_dense
from ._common.arguments import allow_zero, named
from ._common.labels import in_rows_of, mask_labels


class KDLoss(nn.Module):
    """T² · KL(teacher ‖ student) at temperature T, over the rows that count.

    If no row counts the loss is 0, regardless of the logits and of `num_batch_labels`. Unlike
    Automodel's loss, it refuses tensor parallelism. Attributes that are changed later are checked
    by the next call.

    Args:
        ignore_index: rows with this label do not count.
        temperature: temperature of both softmaxes.
        fp32_upcast: no effect: all arithmetic is float32 (float64 for float64 logits).
        tp_group: None, or a group of one rank, since whole rows of logits are needed.
        chunk_size: no effect: no intermediate tensor of the size of the logits is made.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is outside its range, or `tp_group` has several ranks.
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
        """Return the KDLoss of the current attributes; raises as the class."""
        _check_group(self.tp_group)
        return _KDLoss.like(
            "automodel", ignore_index=self.ignore_index, temperature=self.temperature
        )

    @named(num_items="num_batch_labels")
    def forward(
        self,
        student_logits: Tensor,  # (..., V)
        teacher_logits: Tensor,  # (..., V)
        labels: Tensor,  # one for each row; only says which rows count
        num_batch_labels: float | Tensor | None = None,
    ) -> Tensor:
        """Return the sum over the rows that count, divided by `num_batch_labels`, 0-d.

        It is float32, or float64 for float64 logits. None divides by the number of these rows; 0
        gives a loss of 0.

        Raises:
            TypeError: An argument is no tensor, has the wrong dtype, or is a DTensor.
            ValueError: Shapes or values do not fit, or the teacher's logits require grad.
        """
        check_dense("student_logits", student_logits)
        check_dense("teacher_logits", teacher_logits)
        labels = in_rows_of(student_logits, mask_labels(labels, self.ignore_index))
        loss: Tensor = self._loss()(
            student_logits, teacher_logits, labels, num_items=allow_zero(num_batch_labels)
        )
        return loss


def _check_group(group: Any) -> None:
    """Refuse a group over which the vocabulary is sharded.

    Raises:
        TypeError: `group` is neither None nor a process group.
        ValueError: The group has several ranks.
    """
    if group is None:
        return
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"tp_group must be None or a torch.distributed.ProcessGroup; got {type(group).__name__}"
        )
    if group.size() > 1:
        raise ValueError(
            "tp_group must be None or of one rank, since the loss needs whole rows of logits, not "
            f"a shard of the vocabulary; got {group.size()} ranks: use Automodel's own KDLoss"
        )
