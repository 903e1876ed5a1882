"""StudentTeacherLoss: student, teacher and loss in one module, whose forward returns the loss.

It is for wrappers that run code before and after a module's forward: DistributedDataParallel,
FSDP2's ``fully_shard``, accelerate's ``prepare``, Lightning. A loss that takes the lm_head's weight
must run inside that forward: outside, FSDP2 has sharded the weight again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import KDLossParts
from ..modules import KDLoss
from ..sides import Side, Teacher, TopK
from ._common.batches import TEACHER, teacher_of_batch
from ._common.heads import headless, scale_of, side_of
from ._common.labels import aligned
from ._common.models import PaddingCheck, check_inputs, check_models
from ._common.outputs import logits_of
from ._common.parts import check_loss, parts_of


class StudentTeacherLoss(nn.Module):
    """Two language models and the loss between them; call it with a batch.

    ::

        model = StudentTeacherLoss(student, teacher, KDLoss(temperature=2.0), heads=True)
        loss = model(**batch)  # input_ids, attention_mask, labels

    The teacher is frozen and put into evaluation mode, in place; it stays there after ``train()``,
    runs without gradient, and is not in ``state_dict()``. The student is the attribute `student`.
    Without a teacher model every batch must have an entry "teacher", a :class:`fused_kd.TopK` whose
    rows are those of the logits, such as :mod:`fused_kd.teachers` makes of a cache.

    Args:
        student: a causal language model of transformers, or a module with the same arguments and
            output (without `heads`, also one that returns a tensor of logits).
        teacher: the same, of the same vocabulary; or None, if the batches have it.
        loss: a KDLoss with ``ignore_index=-100``; None: ``KDLoss()``.
        heads: bypass the lm_heads and pass a :class:`fused_kd.Head` for each model to the loss, so
            that neither computes logits.
        shift: whether labels are those of the inputs, to be shifted to the next token. False:
            ``labels[i]`` belongs to ``logits[i]``, and the models may be of any kind (masked
            language models, classifiers, encoder-decoders).

    Raises:
        TypeError: A model is no nn.Module, the loss no KDLoss; with `heads` an lm_head is not a
            plain nn.Linear, or has hooks on its output.
        ValueError: A model is not causal, if labels are shifted; the vocabularies differ; both
            models have the same parameter or module; a router's aux_loss would be lost; the loss's
            ignore_index is not -100, or a keyword of it does not fit `heads`; a DistillationLoss
            bypasses the student's lm_head; with `heads` logits are soft-capped or otherwise changed
            after the lm_head.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        loss: KDLoss | None = None,
        *,
        heads: bool = False,
        shift: bool = True,
    ) -> None:
        super().__init__()
        loss = KDLoss() if loss is None else loss
        _check(student, teacher, loss, heads, shift)
        self.student, self.loss, self.shift = student, loss, shift
        self._scale = scale_of(student) if heads else None
        self._check_padding = PaddingCheck()
        self.teacher = teacher
        if teacher is None:
            return
        self._teacher_scale = scale_of(teacher) if heads else None
        teacher.eval().requires_grad_(False)
        self.register_state_dict_post_hook(_leave_out_teacher)
        self.register_load_state_dict_post_hook(_do_not_miss_teacher)

    def forward(
        self,
        labels: Tensor,
        num_items: float | Tensor | None = None,
        teacher: TopK | None = None,
        **inputs: Any,
    ) -> Tensor | KDLossParts:
        """Return the loss of a batch, as `loss` returns it.

        Args:
            labels: (B, S), those of the inputs themselves (they are shifted here, unless
                ``shift=False``), -100 where a token does not count.
            num_items: the denominator, see :func:`fused_kd.integrations.loop.global_num_items`;
                None: the kept tokens of this batch.
            teacher: (B, S) rows, if there is no teacher model; refused otherwise.
            inputs: the arguments of both models.

        Raises:
            TypeError: `num_items` has 16 bits, a model returns no logits, or as
                :func:`fused_kd.kd_loss`.
            ValueError: `labels` is None, inputs belong to one model, an encoder-decoder lacks
                decoder_input_ids, there are two teachers or none, or as kd_loss.
        """
        parts = self.parts(labels, num_items, teacher, **inputs)
        return parts if self.loss.options.return_parts else parts.loss

    def parts(
        self,
        labels: Tensor,
        num_items: float | Tensor | None = None,
        teacher: TopK | None = None,
        **inputs: Any,
    ) -> KDLossParts:
        """Return the loss with its hard and its soft part; arguments and errors as in forward.

        It runs no hooks of this module; those of FSDP2 must have run before, as in its forward.
        """
        _check_num_items(num_items)
        if self.teacher is not None and teacher is not None:
            raise ValueError(
                f"a batch must not have an entry {TEACHER!r} if the loss has a teacher model; got "
                f"a {type(teacher).__name__}: create the loss with teacher=None to learn from it"
            )
        targets = aligned(labels, self.shift)
        self._check_padding(labels, inputs)
        check_inputs(self.student, inputs)
        # first the teacher: its activations are freed before the student's are kept
        if self.teacher is None:
            other: Teacher = teacher_of_batch(teacher)
        else:
            with torch.no_grad():
                other = _side(self.teacher, inputs, self._teacher_scale)
        student = _side(self.student, inputs, self._scale)
        return parts_of(self.loss, student, other, targets, num_items)

    def train(self, mode: bool = True) -> StudentTeacherLoss:
        """Set the student's mode and return self; the teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self


def _side(model: nn.Module, inputs: dict[str, Any], scale: float | None) -> Side:
    """Return a model's logits, or its Head if `scale`, that of its logits, is not None."""
    if scale is None:
        return logits_of(model(**inputs))
    with headless(model):
        hidden = logits_of(model(**inputs))
    return side_of(model, hidden, scale)


def _check(
    student: nn.Module, teacher: nn.Module | None, loss: KDLoss, heads: bool, shift: bool
) -> None:
    """Refuse models or a loss that do not fit together; raises as :class:`StudentTeacherLoss`."""
    for name, model in (("student", student), ("teacher", teacher)):
        if name == "teacher" and model is None:
            continue
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module; got {type(model).__name__}")
    check_loss(loss, heads=heads, is_mean=False)
    check_models(student, teacher, shift=shift)


def _check_num_items(num_items: float | Tensor | None) -> None:
    """Refuse a count in 16 bits, since bfloat16 rounds 257 tokens to 256.

    Raises:
        TypeError: `num_items` is a bfloat16 or float16 tensor.
    """
    if isinstance(num_items, Tensor) and num_items.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"num_items must not have been rounded to 16 bits; got {num_items.dtype}: FSDP2's "
            "mixed precision casts the inputs of the outermost module, unless it is created with "
            "MixedPrecisionPolicy(..., cast_forward_inputs=False)"
        )


def _leave_out_teacher(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """Remove the teacher's entries from a state_dict, in place."""
    for name in [name for name in state_dict if name.startswith(f"{prefix}teacher.")]:
        del state_dict[name]


def _do_not_miss_teacher(module: nn.Module, incompatible_keys: Any) -> None:
    """Remove the teacher's entries from the keys that load_state_dict reports as missing."""
    own = tuple(f".teacher.{name}" for name in module.get_submodule("teacher").state_dict())
    missing = incompatible_keys.missing_keys  # with the prefix of the outer module
    missing[:] = [name for name in missing if not f".{name}".endswith(own)]
