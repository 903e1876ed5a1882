"""TRL: the losses of GKDTrainer and DistillationTrainer, replaced in one trainer.

::

    trainer = use_fused_kd(GKDTrainer(model=student, teacher_model=teacher, args=args, ...))
    trainer.train()

Only that object is changed, never TRL; :func:`restore` gives it back. The numbers are TRL's own: β
weighs the teacher, 0 and 1 are forward and reverse KL, there is no factor T².
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..frameworks import need
from ..models import check_causal, check_vocabularies, unwrapped

need("trl")
from . import distillation, gkd  # noqa: E402
from .gkd import generalized_jsd_loss  # noqa: E402
from .trainers import class_of, models_of  # noqa: E402

__all__ = ["generalized_jsd_loss", "restore", "use_fused_kd"]

Trainer = TypeVar("Trainer")

#: Class of TRL → the levels it can be at, the usual one first, and what is to be set in it.
_KINDS: dict[str, tuple[tuple[str, ...], Callable[..., dict[str, Any]]]] = {
    "GKDTrainer": (("logits", "linear"), gkd.attributes),
    "DistillationTrainer": (("linear",), distillation.attributes),
}
#: What to do with a model whose labels TRL would shift by mistake.
_SHIFTED = "TRL's trainers shift the labels; call KDLoss in a training loop of your own"
#: Where a trainer keeps what was there before.
_REPLACED, _ABSENT = "_fused_kd_replaced", object()


def use_fused_kd(
    trainer: Trainer,
    *,
    level: str | None = None,
    entropy: bool = True,
    inplace: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Trainer:
    """Makes one trainer compute its loss with fused_kd; a second call replaces the first.

    Args:
        trainer: a GKDTrainer or DistillationTrainer of TRL that has a teacher; or of a subclass
            that leaves their loss as it is.
        level: of a GKDTrainer: "logits", or "linear", where neither model's logits are ever whole.
            A DistillationTrainer is at the level "linear".
        entropy: of a DistillationTrainer: whether it logs the student's mean entropy, which takes
            one more product with the student's head; without it, it logs None.
        inplace: at the level "logits": write the gradient over the student's logits.
        memory_budget: at the level "linear": bytes of a chunk, see :func:`fused_kd.linear_kd_loss`.
        backend: as in :func:`fused_kd.kd_loss`.

    Returns:
        The trainer.

    Raises:
        TypeError: another trainer, or one without a teacher or with a loss of its own; a version of
            TRL that is not known; at the level "linear" an lm_head that is not a plain nn.Linear.
        ValueError: a model that is not causal; vocabularies that differ; at the level "linear"
            logits that are soft-capped, or scaled by another factor than TRL takes; an option out
            of its range.
    """
    kind = next((name for name in _KINDS if class_of(trainer, name) is not None), None)
    if kind is None:
        raise TypeError(
            "trainer must be a GKDTrainer or a DistillationTrainer of TRL; got "
            f"{type(trainer).__name__}"
        )
    if getattr(trainer, "teacher_model", None) is None:
        raise TypeError(
            f"trainer must have a teacher_model; this {type(trainer).__name__} has none"
        )
    levels, attributes_of = _KINDS[kind]
    level = level or levels[0]
    if level not in levels:
        raise ValueError(f"level of a {kind} must be one of {levels}; got {level!r}")
    if inplace and level != "logits":
        raise ValueError("inplace=True needs level='logits'; at level='linear' logits are not kept")
    if memory_budget is not None and level != "linear":
        raise ValueError(
            "memory_budget needs level='linear'; at level='logits' there are no chunks"
        )
    student, teacher = (unwrapped(model) for model in models_of(trainer))
    check_causal(student, teacher, _SHIFTED)
    check_vocabularies(student, teacher)
    options: dict[str, Any] = {"backend": backend}
    options |= {"inplace": inplace} if level == "logits" else {"memory_budget": memory_budget}
    attributes = attributes_of(trainer, level, entropy, options)
    restore(trainer)
    before = {name: vars(trainer).get(name, _ABSENT) for name in attributes}
    vars(trainer).update({**attributes, _REPLACED: before})
    return trainer


def restore(trainer: Trainer) -> Trainer:
    """Undoes :func:`use_fused_kd`; returns the trainer."""
    for name, value in vars(trainer).pop(_REPLACED, {}).items():
        if value is _ABSENT:
            delattr(trainer, name)
        else:
            setattr(trainer, name, value)
    return trainer
