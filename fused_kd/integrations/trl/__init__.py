"""TRL: the losses of its distillation trainers, replaced in one trainer.

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
from . import distillation, gkd, server  # noqa: E402
from .gkd import generalized_jsd_loss  # noqa: E402
from .trainers import class_of, models_of, student_of  # noqa: E402

__all__ = ["generalized_jsd_loss", "restore", "use_fused_kd"]

Trainer = TypeVar("Trainer")

#: Class of TRL → whether it has heads by default, and what returns its new attributes.
_KINDS: dict[str, tuple[bool, Callable[..., dict[str, Any]]]] = {
    "GKDTrainer": (False, gkd.attributes),
    server.KIND: (False, server.attributes),  # before the class that it inherits from
    "DistillationTrainer": (True, distillation.attributes),
}
#: Advice for a model whose labels TRL would shift by mistake.
_SHIFTED = "TRL's trainers shift the labels; call KDLoss in your own training loop"
#: Name of the attribute that holds the replaced ones, and the mark of one that was not set.
_REPLACED, _ABSENT = "_fused_kd_replaced", object()


def use_fused_kd(
    trainer: Trainer,
    *,
    heads: bool | None = None,
    entropy: bool = True,
    inplace: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Trainer:
    """Make one trainer compute its loss with fused_kd; a second call replaces the first.

    Args:
        trainer: a GKDTrainer or DistillationTrainer of TRL that has a teacher, or a
            ServerDistillationTrainer; or of a subclass that does not change their loss.
        heads: bypass the lm_heads and pass a :class:`fused_kd.Head` for each side to the loss, so
            that neither model computes logits. None: False, but True for a DistillationTrainer with
            a teacher model, which never computes them.
        entropy: whether a DistillationTrainer logs the student's mean entropy, which needs one more
            product with the student's head; otherwise it logs None. The others ignore it.
        inplace: without `heads`: write the gradient over the student's logits.
        memory_budget: with `heads`: bytes of a chunk, see :func:`fused_kd.kd_loss`.
        backend: as in :func:`fused_kd.kd_loss`.

    Returns:
        The trainer.

    Raises:
        TypeError: The trainer is of another class, has no teacher, or overrides the loss; TRL's
            function has other arguments than in the known versions; with `heads` an lm_head is not
            a plain nn.Linear, or has hooks on its output; an option has the wrong type.
        ValueError: A model is not causal; the vocabularies differ; with `heads` logits are
            soft-capped, or (in a DistillationTrainer) scaled by another factor than TRL uses; a
            ServerDistillationTrainer has loss_add_tail and a temperature that is not 1; an option
            is out of its range, or excludes another.
    """
    kind = next((name for name in _KINDS if class_of(trainer, name) is not None), None)
    if kind is None:
        raise TypeError(
            "trainer must be a GKDTrainer or a DistillationTrainer of TRL; got "
            f"{type(trainer).__name__}: for transformers.Trainer use DistillationLoss of "
            "fused_kd.integrations.transformers"
        )
    if kind != server.KIND and getattr(trainer, "teacher_model", None) is None:
        raise TypeError(
            f"trainer must have a teacher_model; got a {type(trainer).__name__} without: pass "
            "teacher_model to its constructor"
        )
    default, attributes_of = _KINDS[kind]
    heads = default if heads is None else heads
    if default and not heads:
        raise ValueError(
            f"heads of a {kind} must be True, since it makes no logits; got {heads}: leave it out"
        )
    if inplace and heads:
        raise ValueError(
            "inplace must be False with heads=True, since logits are not stored; got True: use "
            "heads=False"
        )
    if memory_budget is not None and not heads:
        raise ValueError(
            "memory_budget must be None with heads=False, since there are no chunks; got "
            f"{memory_budget}: use heads=True"
        )
    if kind == server.KIND:  # its teacher's vocabulary is not known
        student = unwrapped(student_of(trainer))
        check_causal(student, student, _SHIFTED)
    else:
        student, teacher = (unwrapped(model) for model in models_of(trainer))
        check_causal(student, teacher, _SHIFTED)
        check_vocabularies(student, teacher)
    options = {"backend": backend, "inplace": inplace, "memory_budget": memory_budget}
    attributes = attributes_of(trainer, heads, entropy, options)
    restore(trainer)
    before = {name: vars(trainer).get(name, _ABSENT) for name in attributes}
    vars(trainer).update({**attributes, _REPLACED: before})
    return trainer


def restore(trainer: Trainer) -> Trainer:
    """Undo :func:`use_fused_kd` in place, if it was called; return the trainer."""
    for name, value in vars(trainer).pop(_REPLACED, {}).items():
        if value is _ABSENT:
            delattr(trainer, name)
        else:
            setattr(trainer, name, value)
    return trainer
