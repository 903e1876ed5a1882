"""GKDTrainer: its generalized_jsd_loss, of logits or of hidden states."""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...modules import KDLoss, LinearKDLoss
from ..arguments import named
from ..heads import IGNORED, check_head, head_of, headless
from ..liger import LigerFusedLinearJSDLoss
from ..parts import parts_of
from ..probabilities import denominator
from .trainers import as_tensor, check_arguments, check_inherited, class_of, models_of

KIND = "GKDTrainer"
#: What decides the number that Liger's loss is.
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
    """``GKDTrainer.generalized_jsd_loss``, in float32 whatever the dtype of the logits.

    Args:
        student_logits: (B, S, V). Where they are a slice of logits along S, as in GKDTrainer, the
            slice costs nothing.
        teacher_logits: (B, S, V), without grad.
        labels: (B, S), aligned with the logits; -100 where a token does not count.
        beta: the teacher's weight; 0 and 1 are forward and reverse KL.
        temperature: of both softmaxes.
        reduction: "batchmean" divides by the tokens that count, or by B without labels; "mean" by V
            times the tokens; "sum" by nothing.
        num_items_in_batch: the denominator, whatever the reduction.
        options: of :class:`fused_kd.KDLoss`: `inplace`, `backend`.

    Returns:
        The loss, 0-d float32; 0 if no token counts.

    Raises:
        TypeError: as :func:`fused_kd.kd_loss`.
        ValueError: the same; and for reduction="none", which would be (B, S, V).
    """
    vocabulary = student_logits.shape[-1]
    num_items = _num_items(student_logits, labels, vocabulary, reduction, num_items_in_batch)
    loss = KDLoss.like("trl", beta=beta, temperature=temperature, **options)
    return as_tensor(loss(*_unsliced(student_logits, teacher_logits, labels), num_items=num_items))


def attributes(trainer: Any, level: str, entropy: bool, options: dict[str, Any]) -> dict[str, Any]:
    """What to set in a GKDTrainer."""
    check_inherited(trainer, KIND, "generalized_jsd_loss")
    installed = inspect.signature(class_of(trainer, KIND).generalized_jsd_loss)
    known = set(inspect.signature(generalized_jsd_loss).parameters) - {"options"}
    check_arguments(f"{KIND}.generalized_jsd_loss", installed.parameters, set(), known)
    found = _liger_loss(trainer)
    if level == "logits":
        KDLoss.like("trl", **options)  # refuses what is out of range
        return {**found, "generalized_jsd_loss": partial(generalized_jsd_loss, **options)}
    check_inherited(trainer, KIND, "compute_loss")
    linear = _Linear(trainer, options)
    return {**found, "compute_loss": linear.compute_loss, "generalized_jsd_loss": linear.loss}


class _Linear:
    """GKDTrainer's own compute_loss, with hidden states where it has logits."""

    def __init__(self, trainer: Any, options: dict[str, Any]) -> None:
        self.trainer, self.options, self.is_headless = trainer, options, False
        self.own = class_of(trainer, KIND).compute_loss
        LinearKDLoss.like("trl", **options)  # refuses what is out of range
        for model in models_of(trainer):
            check_head(model)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **keywords: Any
    ) -> Any:
        """As GKDTrainer's. Outputs that are asked for, for metrics, have their logits."""
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
        """As generalized_jsd_loss."""
        if not self.is_headless:
            return generalized_jsd_loss(
                student_logits, teacher_logits, labels, beta, temperature, reduction,
                num_items_in_batch, backend=self.options["backend"],
            )  # fmt: skip
        student, teacher = (head_of(model) for model in models_of(self.trainer))
        vocabulary = student.out_features
        num_items = _num_items(student_logits, labels, vocabulary, reduction, num_items_in_batch)
        loss = LinearKDLoss.like("trl", beta=beta, temperature=temperature, **self.options)
        with self.trainer.accelerator.autocast():  # the models' own ended with their forward
            heads = student, teacher
            return parts_of(loss, student_logits, teacher_logits, labels, num_items, heads).loss


def _num_items(
    rows: Tensor,  # (B, S, anything)
    labels: Tensor | None,  # (B, S)
    vocabulary: int,
    reduction: str,
    num_items: float | Tensor | None,
) -> float | Tensor:
    """What TRL divides the sum over the tokens by."""
    if num_items is not None:
        return num_items.to(rows.device) if isinstance(num_items, Tensor) else num_items
    kept = None if labels is None else labels != IGNORED
    count = rows.shape[0] if reduction == "batchmean" else math.prod(rows.shape[:-1])
    return denominator(reduction, count, kept, vocabulary)


def _unsliced(
    student: Tensor, teacher: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``logits[:, a:b]`` of both models as the whole logits, with labels that ignore the rest.

    Autograd's backward of a slice makes a second gradient of the size of the logits. The view knows
    what it is a slice of, so the loss is taken from there, and the slice never gets a gradient.
    """
    sliced = student, teacher, labels
    whole, taught = student._base, teacher._base
    if labels is None or whole is None or taught is None or not student.requires_grad:
        return sliced
    if (whole.requires_grad, whole.shape[:2]) != (True, taught.shape[:2]):
        return sliced
    begins = {_begin(student, whole), _begin(teacher, taught)}
    begin = begins.pop()
    if begins or begin is None:
        return sliced
    around = (begin, whole.shape[1] - begin - student.shape[1])
    return whole, taught, nn.functional.pad(labels, around, value=IGNORED)


def _begin(view: Tensor, base: Tensor) -> int | None:
    """The a with view = base[:, a:b], three-dimensional; None: it is another view."""
    if not view.dim() == base.dim() == 3 or view.stride() != base.stride() or view.numel() == 0:
        return None
    if view.shape[0] != base.shape[0] or view.shape[2] != base.shape[2]:
        return None
    return (view.storage_offset() - base.storage_offset()) // base.stride(1)


def _liger_loss(trainer: Any) -> dict[str, Any]:
    """Versions of TRL before 1.16 can be told to call Liger's loss: ours, with its settings."""
    before = getattr(trainer, "liger_loss", None)
    if before is None:
        return {}
    if type(before).__name__ != LigerFusedLinearJSDLoss.__name__:
        raise TypeError(
            f"trainer.liger_loss must be a {LigerFusedLinearJSDLoss.__name__}; got "
            f"{type(before).__name__}"
        )
    settings = {name: getattr(before, name) for name in _LIGERS}
    return {"liger_loss": LigerFusedLinearJSDLoss(**settings)}
