"""Labels of a batch: shifted to the next token, or reduced to which rows count."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor, nn

from ...checks import check_dense
from ...rows import LABEL_DTYPES

#: Label of a token that does not count.
IGNORE_INDEX = -100


def shifted(labels: Tensor | None) -> Tensor:  # (B, S) -> (B, S)
    """Return labels of the next token, -100 at the end, as a causal language model is trained on.

    They are a new tensor. The labels are shifted, never the logits: a slice of the logits costs a
    second gradient.

    Raises:
        ValueError: `labels` is None.
    """
    return nn.functional.pad(_present(labels)[..., 1:], (0, 1), value=IGNORE_INDEX)


def aligned(labels: Tensor | None, shift: bool) -> Tensor:
    """Return labels of the logits at the same position: :func:`shifted` if `shift`, else unchanged.

    Raises:
        ValueError: `labels` is None.
    """
    return shifted(labels) if shift else _present(labels)


def mask_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Return int64 labels with `ignore_index` kept and every other label replaced by one class.

    For losses without cross-entropy, to which labels only say which rows count. In some frameworks
    these may be -1, beyond the vocabulary, or bools. The class is 0, or 1 if `ignore_index` is 0.

    Args:
        labels: (...), of any dtype.
        ignore_index: label of the rows that do not count.

    Raises:
        TypeError: `labels` is not a dense local tensor, or `ignore_index` is not an int.
    """
    check_dense("labels", labels)
    if not isinstance(ignore_index, Integral):
        raise TypeError(f"ignore_index must be an int; got {ignore_index!r}")
    if labels.dtype in LABEL_DTYPES:  # ignore_index may not fit a narrower one
        labels = labels.to(torch.int64)
    return torch.where(labels != ignore_index, int(ignore_index == 0), ignore_index)


def in_rows_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return labels reshaped to the leading shape of the logits.

    If their numbers differ, the labels are returned unchanged: the loss reports their shape.
    """
    rows = logits.shape[:-1]
    return labels.reshape(rows) if labels.numel() == rows.numel() else labels


def _present(labels: Tensor | None) -> Tensor:
    """Return `labels`.

    Raises:
        ValueError: `labels` is None.
    """
    if labels is None:
        raise ValueError(
            "labels must be in the batch, since they say which tokens count, even with "
            "hard_weight=0; got none: use a collator that makes them, such as "
            "DataCollatorForLanguageModeling(tokenizer, mlm=False)"
        )
    return labels
