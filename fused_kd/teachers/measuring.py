"""The top k of a teacher, and the exact mass of all other tokens, chunk by chunk."""

from __future__ import annotations

import torch

from ..backends import choose_name
from ..checks import check_side
from ..engines.memory import Sizes, chunk_rows
from ..engines.products import Projection, products_for
from ..engines.selection import is_scattered, take
from ..sides import Head, Side, TopK, arithmetic_dtype, operand_dtype, row_count, row_shape


def measure(
    teacher: Side,
    k: int,
    temperature: float = 1.0,
    *,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> TopK:
    """Return the k largest entries of each row of a teacher, and the exact tail.

    The logits of a Head are computed for one chunk of rows at a time, by the products that the loss
    uses: nothing of size (N, V) is stored.

    Args:
        teacher: logits (..., V) or a Head; not modified. It may require grad, which is ignored.
        k: K, from 0 to V.
        temperature: of the log-probabilities and of the loss.
        backend: whose products compute a Head's logits, as in :func:`fused_kd.kd_loss`; logits need
            none.
        memory_budget: bytes for a chunk's logits; None: automatic. The selection takes up to 192
            MiB more.

    Returns:
        A TopK with ``tail="bucket"``, as from :meth:`fused_kd.TopK.from_logits`, on the teacher's
        device.

    Raises:
        TypeError: `teacher` is neither, or has a wrong dtype.
        ValueError: `k`, `temperature` or a shape does not fit, or memory_budget holds no row.
        RuntimeError: The requested backend cannot run.
    """
    check_side("teacher", teacher)
    with torch.no_grad():
        if not isinstance(teacher, Head):
            return TopK.from_logits(teacher, k, temperature)
        projection = Projection(*teacher[:3], operand_dtype(teacher), float(teacher.scale))
        with torch.autocast(teacher.hidden.device.type, enabled=False):
            rows = _of_head(projection, k, temperature, backend, memory_budget)
    shape = row_shape(teacher)
    return rows._replace(
        token_ids=rows.token_ids.view(*shape, k),
        logprobs=rows.logprobs.view(*shape, k),
        tail_logprob=None if rows.tail_logprob is None else rows.tail_logprob.view(shape),
    )


def _of_head(
    head: Projection, k: int, temperature: float, backend: str, memory_budget: int | None
) -> TopK:
    """Return the TopK of N rows of a head, (N, k)."""
    hidden, dtype = head.hidden, arithmetic_dtype(head.hidden, head.weight)
    vocabulary, size = head.weight.shape
    rows = row_count(hidden.shape[:-1])
    products = products_for(choose_name(backend, hidden, head.weight), hidden.device, dtype)
    sizes = Sizes(
        vocabulary,
        student_hidden=size,
        accum_bytes=dtype.itemsize,
        student_bytes=hidden.dtype.itemsize,
        gathered=is_scattered(hidden),
        converted={hidden.dtype, head.compute} != {dtype},
    )
    fixed = products.fixed_bytes()
    height = chunk_rows(rows, None, memory_budget, hidden.device, sizes, fixed)
    buffer = hidden.new_empty((min(height, rows), vocabulary), dtype=dtype)
    parts = []
    for begin in range(0, max(rows, 1), height):  # once for no rows: k is checked
        part = take(hidden, slice(begin, min(begin + height, rows)))
        logits = buffer[: part.shape[0]]
        products.logits(logits, part, head)
        parts.append(TopK.from_logits(logits, k, temperature))
    ids, logprobs, tail = (
        torch.cat([x for x in tensors if x is not None])
        for tensors in zip(*(part[:3] for part in parts), strict=True)
    )
    return TopK(ids, logprobs, tail, "bucket", temperature)
