"""TRL: the losses of GKDTrainer and DistillationTrainer, replaced in one trainer.

::

    trainer = use_fused_kd(GKDTrainer(model=student, teacher_model=teacher, args=args, ...))
    trainer.train()

Only that object is changed, never TRL; :func:`restore` undoes the change. The numbers are TRL's: β
weighs the teacher, 0 and 1 are forward and reverse KL, there is no factor T².
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from .._common.frameworks import need
from .._common.models import check_causal, check_vocabularies, unwrapped

need("trl")
from . import distillation, gkd  # noqa: E402
from .gkd import generalized_jsd_loss  # noqa: E402
from .trainers import class_of, models_of  # noqa: E402

__all__ = ["generalized_jsd_loss", "restore", "use_fused_kd"]

Trainer = TypeVar("Trainer")

#: Class of TRL → its levels, the default first, and the function that returns its new attributes.
_KINDS: dict[str, tuple[tuple[str, ...], Callable[..., dict[str, Any]]]] = {
    "GKDTrainer": (("logits", "linear"), gkd.attributes),
    "DistillationTrainer": (("linear",), distillation.attributes),
}
#: Advice for a model whose labels TRL would shift by mistake.
_SHIFTED = "TRL's trainers shift the labels; call KDLoss in a training loop of your own"
#: Name of the attribute that holds the replaced ones, and the mark of one that was not set.
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
    """Make one trainer compute its loss with fused_kd; a second call replaces the first.

    Args:
        trainer: a GKDTrainer or DistillationTrainer of TRL that has a teacher; or of a subclass
            that does not change their loss.
        level: for a GKDTrainer "logits", or "linear", at which neither model's logits are whole.
            A DistillationTrainer is always at the level "linear".
        entropy: whether a DistillationTrainer logs the student's mean entropy, which needs one more
            product with the student's head; otherwise it logs None.
        inplace: at the level "logits": write the gradient over the student's logits.
        memory_budget: at the level "linear": bytes of a chunk, see :func:`fused_kd.linear_kd_loss`.
        backend: as in :func:`fused_kd.kd_loss`.

    Returns:
        The trainer.

    Raises:
        TypeError: The trainer is another one, has no teacher, or has a loss of its own; the version
            of TRL is unknown; at the level "linear" an lm_head is not a plain nn.Linear.
        ValueError: A model is not causal; the vocabularies differ; at the level "linear" logits are
            soft-capped, or scaled by another factor than TRL uses; an option is out of its range.
    """
    kind = next((name for name in _KINDS if class_of(trainer, name) is not None), None)
    if kind is None:
        raise TypeError(
            "trainer must be a GKDTrainer or a DistillationTrainer of TRL; got "
            f"{type(trainer).__name__}"
        )
    if getattr(trainer, "teacher_model", None) is None:
        raise TypeError(
            f"trainer must have a teacher_model; got a {type(trainer).__name__} without"
        )
    levels, attributes_of = _KINDS[kind]
    level = level or levels[0]
    if level not in levels:
        raise ValueError(f"level of a {kind} must be one of {levels}; got {level!r}")
    if inplace and level != "logits":
        raise ValueError(
            "inplace must be False at level='linear', since logits are not stored; got True: use "
            "level='logits'"
        )
    if memory_budget is not None and level != "linear":
        raise ValueError(
            "memory_budget must be None at level='logits', since there are no chunks; got "
            f"{memory_budget}: use level='linear'"
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
    """Undo :func:`use_fused_kd`; return the trainer."""
    for name, value in vars(trainer).pop(_REPLACED, {}).items():
        if value is _ABSENT:
            delattr(trainer, name)
        else:
            setattr(trainer, name, value)
    return trainer
