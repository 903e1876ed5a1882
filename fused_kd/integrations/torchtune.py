"""torchtune's distillation losses under their names and signatures: change ``kd_loss`` of a recipe.

``_component_: fused_kd.integrations.torchtune.ForwardKLWithChunkedOutputLoss``; torchtune itself is
not needed. The numbers are torchtune's: temperature 1, and the soft cross-entropy −Σ q log p for
the forward KL, which is the divergence plus the teacher's entropy and has the same gradient.
What differs, on purpose:

* with no row that counts, the loss is 0 and attached to the graph, with zero gradients; torchtune
  returns a constant, or 0/0;
* an entry of -inf for the student alone makes the forward KL infinite, one for the teacher alone
  the reverse and the symmetric one; torchtune drops the term;
* a teacher that requires grad is refused, and so are chunks that do not match.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import kd_loss
from ..checks import check_dense
from .arguments import counted


class _KLLoss(nn.Module):
    """What the losses on whole logits share."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(
        self,
        student_logits: Tensor,  # (..., V)
        teacher_logits: Tensor,  # (..., V)
        labels: Tensor,  # as many as there are rows; only says which rows count
        normalize: bool = True,
    ) -> Tensor:
        """The mean over the rows whose label is not `ignore_index`; their sum without `normalize`.

        Raises:
            TypeError: no tensor, or one of the wrong dtype.
            ValueError: shapes that do not fit, as :func:`fused_kd.kd_loss`.
        """
        check_dense("student_logits", student_logits)
        check_dense("teacher_logits", teacher_logits)
        labels, rows = counted(labels, self.ignore_index), student_logits.shape[:-1]
        if labels.numel() == rows.numel():
            labels = labels.reshape(rows)
        divisor = kept_rows(labels, self.ignore_index) if normalize else 1
        return self.divided(student_logits, teacher_logits, labels, divisor)

    def divided(
        self,
        student: Tensor,  # (..., V)
        teacher: Tensor,  # (..., V)
        labels: Tensor,  # (...)
        divisor: float | Tensor,
    ) -> Tensor:
        """The sum over the rows that count, divided before the gradient is rounded."""
        raise NotImplementedError

    def _divergence(
        self,
        name: str,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        divisor: float | Tensor,
    ) -> Tensor:
        loss = kd_loss(
            student,
            teacher,
            labels,
            hard_weight=0.0,
            soft_weight=1.0,
            divergence=name,
            ignore_index=self.ignore_index,
            num_items=divisor,
        )
        assert isinstance(loss, Tensor)
        return loss


class ForwardKLLoss(_KLLoss):
    """The soft cross-entropy −Σ q log p.

    Its value needs the teacher's entropy, which costs one more read of the teacher's logits;
    ``KDLoss.like("torchtune")`` has the same gradient without it.

    Args:
        ignore_index: rows with this label do not count.
    """

    def divided(
        self, student: Tensor, teacher: Tensor, labels: Tensor, divisor: float | Tensor
    ) -> Tensor:
        divergence = self._divergence("forward_kl", student, teacher, labels, divisor)
        return divergence + self._entropy(teacher, labels) / divisor

    @torch.no_grad()
    def _entropy(self, teacher: Tensor, labels: Tensor) -> Tensor:
        """Of the rows that count, together: log V − KL(q ‖ uniform) each.

        The uniform distribution is one row of equal logits that every row reads.
        """
        uniform = teacher.new_zeros(teacher.shape[-1]).expand_as(teacher)
        below = self._divergence("forward_kl", uniform, teacher, labels, 1)
        rows = (labels != self.ignore_index).sum().to(below.dtype)
        return rows * math.log(teacher.shape[-1]) - below


class ReverseKLLoss(_KLLoss):
    """KL(p ‖ q).

    Args:
        ignore_index: rows with this label do not count.
    """

    def divided(
        self, student: Tensor, teacher: Tensor, labels: Tensor, divisor: float | Tensor
    ) -> Tensor:
        return self._divergence("reverse_kl", student, teacher, labels, divisor)


class SymmetricKLLoss(_KLLoss):
    """``sym_kd_ratio`` · forward + (1 − ``sym_kd_ratio``) · reverse, which is not a JSD.

    The two are computed apart, each with a gradient of the size of the logits.

    Args:
        sym_kd_ratio: in [0, 1]; a term of weight 0 is not computed.
        ignore_index: rows with this label do not count.

    Raises:
        ValueError: a ratio outside [0, 1].
    """

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(ignore_index)
        if not 0.0 <= sym_kd_ratio <= 1.0:
            raise ValueError(f"sym_kd_ratio must be in [0, 1]; got {sym_kd_ratio}")
        self.sym_kd_ratio = sym_kd_ratio
        self.fkl = ForwardKLLoss(ignore_index)
        self.rkl = ReverseKLLoss(ignore_index)

    def divided(
        self, student: Tensor, teacher: Tensor, labels: Tensor, divisor: float | Tensor
    ) -> Tensor:
        ratios = ((self.fkl, self.sym_kd_ratio), (self.rkl, 1.0 - self.sym_kd_ratio))
        terms = [
            loss.divided(student, teacher, labels, divisor / ratio)
            for loss, ratio in ratios
            if ratio > 0.0
        ]
        return torch.stack(terms).sum()


class _ChunkedOutputLoss(nn.Module):
    """A loss on logits that come in chunks along the sequence; they are never put together."""

    def __init__(self, num_output_chunks: int, loss: _KLLoss) -> None:
        super().__init__()
        self.num_output_chunks = num_output_chunks
        self.ignore_index = loss.ignore_index
        self.loss = loss

    def forward(
        self,
        student_logits: Sequence[Tensor],  # (B, S_i, V) or (B·S_i, V) each
        teacher_logits: Sequence[Tensor],  # the same
        labels: Tensor,  # (B, Σ S_i); only says which rows count
    ) -> Tensor:
        """The mean over the rows whose label is not `ignore_index`.

        The logits say where they are cut: `num_output_chunks` is for the model.

        Raises:
            TypeError: not a list of chunks, or a tensor of the wrong dtype.
            ValueError: chunks of other lengths; or as :func:`fused_kd.kd_loss`.
        """
        _check_chunks("student_logits", student_logits)
        _check_chunks("teacher_logits", teacher_logits)
        labels = counted(labels, self.ignore_index)
        if labels.dim() != 2:
            raise ValueError(f"labels must have shape (B, S); got {tuple(labels.shape)}")
        batch = max(len(labels), 1)
        rows = [chunk.shape[:-1].numel() for chunk in student_logits]
        lengths = [count // batch for count in rows]
        fit = sum(rows) == labels.numel() and not any(count % batch for count in rows)
        if len(teacher_logits) != len(lengths) or not fit:
            raise ValueError(
                "student_logits and teacher_logits must be as many chunks, as long together as the "
                f"labels; got {lengths} for the student, {len(teacher_logits)} chunks for the "
                f"teacher and labels of shape {tuple(labels.shape)}"
            )
        divisor = kept_rows(labels, self.ignore_index)
        losses = [
            self.loss.divided(student, teacher, part.reshape(student.shape[:-1]), divisor)
            for student, teacher, part in zip(
                student_logits, teacher_logits, torch.split(labels, lengths, dim=1), strict=True
            )
        ]
        return torch.stack(losses).sum()


class ForwardKLWithChunkedOutputLoss(_ChunkedOutputLoss):
    """:class:`ForwardKLLoss` of chunks.

    Args:
        num_output_chunks: what the recipe hands to the models.
        ignore_index: rows with this label do not count.
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, ForwardKLLoss(ignore_index))


class ReverseKLWithChunkedOutputLoss(_ChunkedOutputLoss):
    """:class:`ReverseKLLoss` of chunks; the arguments of ForwardKLWithChunkedOutputLoss."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, ReverseKLLoss(ignore_index))


class SymmetricKLWithChunkedOutputLoss(_ChunkedOutputLoss):
    """:class:`SymmetricKLLoss` of chunks; the arguments of both."""

    def __init__(
        self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100
    ) -> None:
        super().__init__(num_output_chunks, SymmetricKLLoss(sym_kd_ratio, ignore_index))
        self.sym_kd_ratio = sym_kd_ratio


def _check_chunks(name: str, chunks: Sequence[Tensor]) -> None:
    """A list of at least one tensor with rows."""
    is_list = isinstance(chunks, (list, tuple))
    if not is_list or not chunks:
        got = "none" if is_list else f"a {type(chunks).__name__}"
        raise TypeError(
            f"{name} must be a list of chunks, at least one; got {got}: for whole logits there is "
            "the class without chunks"
        )
    for i, chunk in enumerate(chunks):
        check_dense(f"{name}[{i}]", chunk)
        if chunk.dim() < 2:
            raise ValueError(
                f"{name}[{i}] must have shape (B, S_i, V) or (B*S_i, V); got {tuple(chunk.shape)}"
            )


def kept_rows(labels: Tensor, ignore_index: int) -> Tensor:
    """How many rows count, at least 1: none of them sums to 0."""
    return (labels != ignore_index).sum().clamp(min=1)
