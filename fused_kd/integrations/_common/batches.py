"""The teacher of a batch: a TopK, for losses that have no teacher model."""

from __future__ import annotations

from ...sides import TopK

#: The entry of a batch; :class:`fused_kd.teachers.TopKDataset` and ``collate`` make it.
TEACHER = "teacher"


def teacher_of_batch(teacher: object) -> TopK:
    """Return the entry "teacher" of a batch, for a loss that has no teacher model.

    Raises:
        TypeError: It is no TopK.
        ValueError: It is None: the batch has no such entry.
    """
    if teacher is None:
        raise ValueError(
            f"a batch must have an entry {TEACHER!r}, a TopK, since the loss has no teacher model; "
            "got none: use a collator that keeps it, such as fused_kd.teachers.collate (and with a "
            "Trainer that is no KDTrainer, teacher_from_batches(trainer)), or pass a teacher model"
        )
    if not isinstance(teacher, TopK):
        raise TypeError(
            f"a batch's entry {TEACHER!r} must be a fused_kd.TopK; got {type(teacher).__name__}"
        )
    return teacher
