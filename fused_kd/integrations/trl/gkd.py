"""GKDTrainer: its generalized_jsd_loss, of logits or of hidden states."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...modules import KDLoss
from ...sides import Side, row_count, row_shape, rows_tensor, vocabulary
from .._common.arguments import named
from .._common.heads import headless, scale_of, side_of
from .._common.labels import IGNORE_INDEX
from .._common.parts import as_tensor, parts_of
from .._common.probabilities import denominator
from ..liger import LigerFusedLinearJSDLoss
from .trainers import check_arguments, check_inherited, class_of, models_of

KIND = "GKDTrainer"
#: Attributes of Liger's loss that determine its value.
_LIGERS = ("weight_hard_loss", "weight_soft_loss", "beta", "ignore_index", "temperature")


@named(num_items="num_items_in_batch")
def generalized_jsd_loss(
    student_logits: Tensor,  # (B, S, V)
    teacher_logits: Tensor,  # (B, S, V)
    labels: Tensor | None = None,  # (B, S)
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: float | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Compute ``GKDTrainer.generalized_jsd_loss``, in float32 (float64 for float64 logits).

    Args:
        student_logits: (B, S, V). If both logits are the same slice along S, as in GKDTrainer,
            the backward makes no second gradient for the slice.
        teacher_logits: (B, S, V), without grad.
        labels: (B, S), aligned with the logits; -100 for a token that does not count; None: all
            count.
        beta: the teacher's weight; 0 and 1 are forward and reverse KL.
        temperature: softens both sides.
        reduction: "batchmean" divides by the tokens that count, or by B without labels; "mean" by V
            times the tokens; "sum" by nothing.
        num_items_in_batch: the denominator; the reduction is then neither used nor checked.
        options: of :class:`fused_kd.KDLoss`: `inplace` (of slices, over the whole logits),
            `backend`.

    Returns:
        The loss, 0-d; 0 if no token counts.

    Raises:
        TypeError: As :func:`fused_kd.kd_loss`.
        ValueError: The same; or, without `num_items_in_batch`, the reduction is another one, such
            as "none", which would be (B, S, V).
    """
    num_items = _num_items(student_logits, labels, reduction, num_items_in_batch)
    loss = KDLoss.like("trl", beta=beta, temperature=temperature, **options)
    return as_tensor(loss(*_unsliced(student_logits, teacher_logits, labels), num_items=num_items))


def attributes(trainer: Any, heads: bool, entropy: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes to set in a GKDTrainer; raises as :func:`.use_fused_kd`.

    `entropy` is not used. `options` has the key "backend".
    """
    check_inherited(trainer, KIND, "generalized_jsd_loss")
    installed = inspect.signature(class_of(trainer, KIND).generalized_jsd_loss)
    known = set(inspect.signature(generalized_jsd_loss).parameters) - {"options"}
    check_arguments(f"{KIND}.generalized_jsd_loss", installed.parameters, set(), known)
    liger_loss = _liger_loss(trainer)
    KDLoss.like("trl", **options)  # refuses what is out of range
    if not heads:
        return {**liger_loss, "generalized_jsd_loss": partial(generalized_jsd_loss, **options)}
    check_inherited(trainer, KIND, "compute_loss")
    ours = _Headless(trainer, options)
    return {**liger_loss, "compute_loss": ours.compute_loss, "generalized_jsd_loss": ours.loss}


class _Headless:
    """GKDTrainer's own compute_loss, with hidden states instead of logits."""

    def __init__(self, trainer: Any, options: dict[str, Any]) -> None:
        self.trainer, self.options, self.is_headless = trainer, options, False
        self.own = class_of(trainer, KIND).compute_loss
        self.scales = [scale_of(model) for model in models_of(trainer)]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **keywords: Any
    ) -> Any:
        """Compute GKDTrainer's loss from hidden states; with `return_outputs` from logits."""
        if return_outputs:
            return self.own(self.trainer, model, inputs, return_outputs=True, **keywords)
        student, teacher = models_of(self.trainer)
        with headless(student), headless(teacher):
            self.is_headless = True
            try:
                return self.own(self.trainer, model, inputs, **keywords)
            finally:
                self.is_headless = False

    def loss(
        self,
        student_logits: Tensor,  # (B, S, V); headless (B, S, H)
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor:
        """Compute generalized_jsd_loss; inside compute_loss the inputs are hidden states."""
        if not self.is_headless:
            inputs = student_logits, teacher_logits, labels, beta, temperature, reduction
            backend = self.options["backend"]
            return generalized_jsd_loss(*inputs, num_items_in_batch, backend=backend)
        outputs = student_logits, teacher_logits
        student, teacher = map(side_of, models_of(self.trainer), outputs, self.scales)
        num_items = _num_items(student, labels, reduction, num_items_in_batch)
        loss = KDLoss.like("trl", beta=beta, temperature=temperature, **self.options)
        with self.trainer.accelerator.autocast():  # the models' own ended with their forward
            return parts_of(loss, student, teacher, labels, num_items).loss


def _num_items(
    student: Side,
    labels: Tensor | None,  # (B, S)
    reduction: str,
    num_items: float | Tensor | None,
) -> float | Tensor:
    """Return the divisor of the sum over the tokens: `num_items`, else that of the reduction.

    A tensor is moved to the student's device. Without `num_items`, raises as denominator().
    """
    if num_items is not None:
        device = rows_tensor(student).device
        return num_items.to(device) if isinstance(num_items, Tensor) else num_items
    kept = None if labels is None else labels != IGNORE_INDEX
    shape = row_shape(student)
    count = shape[0] if reduction == "batchmean" else row_count(shape)
    return denominator(reduction, count, kept, vocabulary(student))


def _unsliced(
    student: Tensor, teacher: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the whole logits for slices ``logits[:, a:b]``, with labels that ignore the rest.

    Autograd's backward of a slice makes a second gradient of the size of the logits. The loss is
    computed from the view's base instead, and the slice gets no gradient. Other arguments (views of
    another kind, different slices, no labels) are returned unchanged.
    """
    sliced = student, teacher, labels
    student_base, teacher_base = student._base, teacher._base
    if labels is None or student_base is None or teacher_base is None or not student.requires_grad:
        return sliced
    if not student_base.requires_grad or student_base.shape[:2] != teacher_base.shape[:2]:
        return sliced
    begins = {_begin(student, student_base), _begin(teacher, teacher_base)}
    begin = begins.pop()
    if begins or begin is None:
        return sliced
    around = (begin, student_base.shape[1] - begin - student.shape[1])
    return student_base, teacher_base, nn.functional.pad(labels, around, value=IGNORE_INDEX)


def _begin(view: Tensor, base: Tensor) -> int | None:
    """Return the a of a three-dimensional view = base[:, a:b]; None for any other view."""
    if not view.dim() == base.dim() == 3 or view.stride() != base.stride() or view.numel() == 0:
        return None
    if view.shape[0] != base.shape[0] or view.shape[2] != base.shape[2]:
        return None
    return (view.storage_offset() - base.storage_offset()) // base.stride(1)


def _liger_loss(trainer: Any) -> dict[str, Any]:
    """Return the attribute liger_loss, which TRL before 1.16 may call, as ours; {} if it is None.

    Ours has the settings that determine the value; chunk_size is the default.

    Raises:
        TypeError: The trainer's liger_loss is of another class.
    """
    before = getattr(trainer, "liger_loss", None)
    if before is None:
        return {}
    if type(before).__name__ != LigerFusedLinearJSDLoss.__name__:
        raise TypeError(
            f"trainer.liger_loss must be a {LigerFusedLinearJSDLoss.__name__}; got "
            f"{type(before).__name__}: train without fused_kd"
        )
    settings = {name: getattr(before, name) for name in _LIGERS}
    return {"liger_loss": LigerFusedLinearJSDLoss(**settings)}
