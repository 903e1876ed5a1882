"""torchtune's distillation losses under their names and signatures, for ``kd_loss`` of a recipe.

``_component_: fused_kd.integrations.torchtune.ForwardKLWithChunkedOutputLoss``; torchtune need not
be installed. The numbers are torchtune's: temperature 1, and the soft cross-entropy −Σ q log p for
the forward KL, which is the divergence plus the teacher's entropy and has the same gradient.
Intended differences:

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
from ._common.arguments import named
from ._common.labels import in_rows_of, mask_labels
from ._common.parts import as_tensor


class _KLLoss(nn.Module):
    """Base class of the losses on whole logits."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    @named()
    def forward(
        self,
        student_logits: Tensor,  # (..., V)
        teacher_logits: Tensor,  # (..., V)
        labels: Tensor,  # one for each row; only says which rows count
        normalize: bool = True,
    ) -> Tensor:
        """Return the mean over the rows that count, or their sum without `normalize`.

        Rows with the label `ignore_index` do not count.

        Raises:
            TypeError: An argument is no tensor, or has the wrong dtype.
            ValueError: Shapes do not fit, as :func:`fused_kd.kd_loss`.
        """
        check_dense("student_logits", student_logits)
        check_dense("teacher_logits", teacher_logits)
        labels = in_rows_of(student_logits, mask_labels(labels, self.ignore_index))
        divisor = count_rows(labels, self.ignore_index) if normalize else 1
        return self.divided(student_logits, teacher_logits, labels, divisor)

    def divided(
        self,
        student: Tensor,  # (..., V)
        teacher: Tensor,  # (..., V)
        labels: Tensor,  # (...)
        divisor: float | Tensor,
    ) -> Tensor:
        """Return the sum over the rows that count, divided before the gradient is rounded."""
        raise NotImplementedError

    def _divergence(
        self,
        name: str,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        divisor: float | Tensor,
    ) -> Tensor:
        """Return a divergence, summed over the rows that count and divided."""
        return as_tensor(
            kd_loss(
                student,
                teacher,
                labels,
                hard_weight=0.0,
                soft_weight=1.0,
                divergence=name,
                ignore_index=self.ignore_index,
                num_items=divisor,
            )
        )


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
        """Return the soft cross-entropy, as :meth:`_KLLoss.divided`."""
        divergence = self._divergence("forward_kl", student, teacher, labels, divisor)
        return divergence + self._entropy(teacher, labels) / divisor

    @torch.no_grad()
    def _entropy(self, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the entropies of the rows that count: log V − KL(q ‖ uniform) each.

        The uniform distribution is one row of equal logits, expanded to all rows.
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
        """Return the reverse KL, as :meth:`_KLLoss.divided`."""
        return self._divergence("reverse_kl", student, teacher, labels, divisor)


class SymmetricKLLoss(_KLLoss):
    """``sym_kd_ratio`` · forward + (1 − ``sym_kd_ratio``) · reverse, which is not a JSD.

    The two are computed separately, each with a gradient of the size of the logits.

    Args:
        sym_kd_ratio: in [0, 1]; a term of weight 0 is not computed.
        ignore_index: rows with this label do not count.

    Raises:
        ValueError: The ratio is outside [0, 1].
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
        """Return the weighted sum of both, as :meth:`_KLLoss.divided`."""
        ratios = ((self.fkl, self.sym_kd_ratio), (self.rkl, 1.0 - self.sym_kd_ratio))
        terms = [
            loss.divided(student, teacher, labels, divisor / ratio)
            for loss, ratio in ratios
            if ratio > 0.0
        ]
        return torch.stack(terms).sum()


class _ChunkedOutputLoss(nn.Module):
    """Base class of the losses on logits in chunks along the sequence, which are never joined."""

    def __init__(self, num_output_chunks: int, loss: _KLLoss) -> None:
        super().__init__()
        self.num_output_chunks = num_output_chunks
        self.ignore_index = loss.ignore_index
        self.loss = loss

    @named()
    def forward(
        self,
        student_logits: Sequence[Tensor],  # (B, S_i, V) or (B·S_i, V) each
        teacher_logits: Sequence[Tensor],  # the same
        labels: Tensor,  # (B, Σ S_i); only says which rows count
    ) -> Tensor:
        """Return the mean over the rows whose label is not `ignore_index`.

        The lengths of the chunks are those of the logits: `num_output_chunks` is for the model.

        Raises:
            TypeError: An argument is not a list of chunks, or a tensor has the wrong dtype.
            ValueError: The chunks have other lengths than the labels; or as
                :func:`fused_kd.kd_loss`.
        """
        _check_chunks("student_logits", student_logits)
        _check_chunks("teacher_logits", teacher_logits)
        labels = mask_labels(labels, self.ignore_index)
        if labels.dim() != 2:
            raise ValueError(f"labels must have shape (B, S); got {tuple(labels.shape)}")
        batch = max(len(labels), 1)
        rows = [chunk.shape[:-1].numel() for chunk in student_logits]
        lengths = [count // batch for count in rows]
        fit = sum(rows) == labels.numel() and not any(count % batch for count in rows)
        if len(teacher_logits) != len(lengths) or not fit:
            raise ValueError(
                "student_logits and teacher_logits must have the same number of chunks, and the "
                f"length of the labels together; got {lengths} for the student, "
                f"{len(teacher_logits)} chunks for the teacher and labels of shape "
                f"{tuple(labels.shape)}"
            )
        divisor = count_rows(labels, self.ignore_index)
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
        num_output_chunks: the number that the recipe passes to the models.
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
    """Refuse anything but a list of at least one tensor with rows.

    Raises:
        TypeError: It is no list, or empty; or a chunk is no tensor.
        ValueError: A chunk has fewer than two dimensions.
    """
    is_list = isinstance(chunks, (list, tuple))
    if not is_list or not chunks:
        kind = "none" if is_list else f"a {type(chunks).__name__}"
        raise TypeError(
            f"{name} must be a list of chunks, at least one; got {kind}: for whole logits use the "
            "class without chunks"
        )
    for i, chunk in enumerate(chunks):
        check_dense(f"{name}[{i}]", chunk)
        if chunk.dim() < 2:
            raise ValueError(
                f"{name}[{i}] must have shape (B, S_i, V) or (B*S_i, V); got {tuple(chunk.shape)}"
            )


def count_rows(labels: Tensor, ignore_index: int) -> Tensor:
    """Return the number of rows that count; at least 1, so that no row gives 0."""
    return (labels != ignore_index).sum().clamp(min=1)
