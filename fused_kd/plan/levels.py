"""Predict the memory and work of the loss: eager torch, from logits, and from heads.

The figures are for one forward and backward of the default loss (cross-entropy and forward KL,
reduction "mean"), with gradients of the student's hidden states and lm_head. They assume that no
variable holds the logits during the backward, since that would keep them in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..checks import LOGIT_DTYPES, check_accumulation
from ..engines.memory import (
    FEWEST_ROWS,
    Sizes,
    automatic_rows,
    chunk_rows,
    in_gradient_bytes,
    keeping_bytes,
    row_bytes,
    rows_in_gradient,
    summing_bytes,
)
from ..engines.products import TILE_BYTES, CompiledProducts, TorchProducts, products_for
from ..options import KDOptions, check_count

#: Float32 (N, V) tensors of the eager composition at its peak: both log-softmaxes of the student
#: and the teacher's, kept for the backward, and the three factors of the divergence. Float32 copies
#: of narrower logits are counted separately.
EAGER_TEMPORARIES = 6
#: Number of (N, V) tensors that all its operations read and write, in forward and backward.
EAGER_PASSES = 35


class Level(NamedTuple):
    """Memory and work of one way to compute the loss and its gradients."""

    memory: dict[str, int]  # bytes of each part at the moment of the peak, beyond the inputs
    flop: int  # floating-point operations of the matrix products
    traffic: int  # bytes read and written, each operand of each operation once

    @property
    def peak(self) -> int:
        """Return the peak memory in bytes, beyond the inputs."""
        return sum(self.memory.values())


class Plan(NamedTuple):
    """The result of :func:`plan`: bytes and work of every level, and the chunks of heads."""

    inputs: int  # bytes of hidden states, heads and labels
    eager: Level
    logits: Level
    logits_inplace: Level
    heads: Level
    chunk_rows: int  # rows of a chunk of `heads`
    chunks: int  # number of chunks
    #: What decides chunk_rows: "rows", "memory_budget", "automatic", "floor" or "weight gradient".
    reason: str
    explanation: str  # the reason as a sentence
    weight_gradient_share: float  # share of the traffic of `heads` that sums the weight gradient

    @property
    def levels(self) -> dict[str, Level]:
        """Return all levels by their name in the printed report."""
        return {
            "eager": self.eager,
            "logits": self.logits,
            "logits, in place": self.logits_inplace,
            "heads": self.heads,
        }


def plan(
    rows: int,
    vocab: int,
    hidden_student: int,
    hidden_teacher: int,
    dtype: torch.dtype = torch.bfloat16,
    memory_budget: int | None = None,
    *,
    device: torch.device | str = "cpu",
    grad_accum_dtype: torch.dtype = torch.float32,
) -> Plan:
    """Return the predicted peak memory and work of the loss; nothing is allocated.

    Args:
        rows: N, the number of rows that are not ignored.
        vocab: V, the vocabulary size.
        hidden_student: H, the hidden size of the student.
        hidden_teacher: H of the teacher.
        dtype: dtype of hidden states and lm_heads.
        memory_budget: bytes for a chunk of rows with heads; None: automatic.
        device: the device of the loss. For a GPU that this machine does not have, pass
            `memory_budget`: the automatic one depends on the GPU's memory.
        grad_accum_dtype: dtype in which the weight gradient is summed over chunks: float32 or
            `dtype`; ignored for float64.

    Returns:
        A Plan: memory, FLOP and traffic of eager torch, of logits, of logits in place, and of heads
        on both sides; and the chunks of heads.

    Raises:
        TypeError: A size is not an int, `dtype` is not float32, bfloat16, float16 or float64, or
            `grad_accum_dtype` is not a dtype.
        ValueError: A value is out of range, or `memory_budget` does not hold one row.
        RuntimeError: On a CPU, FUSED_KD_CPU names an instruction set that is unknown or lacking.
    """
    sizes = {"rows": rows, "vocab": vocab, "hidden_student": hidden_student}
    for name, value in (sizes | {"hidden_teacher": hidden_teacher}).items():
        if value is None:
            raise TypeError(f"{name} must be an int; got None")
        check_count(name, value, least=1)
    KDOptions(memory_budget=memory_budget, grad_accum_dtype=grad_accum_dtype)
    if dtype not in LOGIT_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64; got {dtype!r}")
    check_accumulation(grad_accum_dtype, dtype)
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch device; got {device!r} ({error})") from error
    estimate = _Estimate(
        rows, vocab, hidden_student, hidden_teacher, dtype, grad_accum_dtype, parsed
    )
    height, reason, explanation = estimate.chunk(memory_budget)
    in_one = estimate.fit_in_one_chunk(memory_budget)
    keeps = estimate.keeps(height, in_one)
    if keeps and (taller := estimate.rows_in_gradient(height)) != height:
        height, reason = taller, "weight gradient"
        explanation = f"chunks of {height} rows, whose logits fit in the weight gradient's memory"
    heads, added = estimate.heads(height, in_one, keeps)
    return Plan(
        estimate.inputs,
        estimate.whole(eager=True),
        estimate.whole(),
        estimate.whole(inplace=True),
        heads,
        height,
        -(-rows // height),
        reason,
        explanation,
        added / heads.traffic,
    )


class _Estimate:
    """The bytes of every tensor of a call; peaks and traffic are sums of them."""

    def __init__(
        self,
        rows: int,
        vocab: int,
        student: int,
        teacher: int,
        dtype: torch.dtype,
        accumulate: torch.dtype,
        device: torch.device,
    ) -> None:
        self.rows, self.dtype, self.device = rows, dtype, device
        self.accum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.accumulate = dtype if dtype == torch.float64 else accumulate
        self.products = products_for("auto", device, self.accum_dtype)
        self.gradient_dtype = self.products.gradient_dtype(self.accum_dtype, dtype)
        self.kept_dtype = self.products.kept_dtype(self.accum_dtype, dtype)
        size, accum_size = dtype.itemsize, self.accum_dtype.itemsize
        self.sizes = Sizes(
            *(vocab, student, teacher, accum_size, size, size),
            gathered=False,
            converted=dtype != self.accum_dtype,
        )
        self.logits, self.accum_logits = rows * vocab * size, rows * vocab * accum_size
        self.hidden, self.weight = rows * student * size, vocab * student * size
        self.teacher = (rows + vocab) * teacher * size
        self.inputs = self.hidden + self.weight + self.teacher + rows * torch.int64.itemsize
        self.forward_flop = 2 * rows * vocab * (student + teacher)
        self.flop = self.forward_flop + 4 * rows * vocab * student

    def whole(self, eager: bool = False, inplace: bool = False) -> Level:
        """Return the level that stores all logits of both models.

        Args:
            eager: for the loss composed from torch operations; else for this package's.
            inplace: the gradient overwrites the student's logits; ignored if `eager`.
        """
        n, accum = self.logits, self.accum_logits
        # eager makes float32 copies of narrower logits, of student and teacher
        narrow = 0 if self.dtype == self.accum_dtype else 2
        loss = {"student logits": n, "teacher logits": n}
        # products: the logits of both are written, their gradient is read twice
        traffic = 4 * n + 3 * (self.hidden + self.weight) + self.teacher
        if eager:
            loss["eager temporaries"] = (EAGER_TEMPORARIES + narrow) * accum
            traffic += EAGER_PASSES * accum + (3 * (n + accum) if narrow else 0)
        else:
            traffic += 3 * n
            if not inplace:
                loss["gradient of the logits"] = n
        after = {"gradient of the logits": n, "gradients": self.hidden + self.weight}
        return Level(_highest(loss, after), self.flop, traffic)

    def heads(self, height: int, in_one: bool, keeps: bool) -> tuple[Level, int]:
        """Return the level of heads, and the bytes of its traffic that sum the weight gradient.

        Args:
            height: rows of a chunk.
            in_one: the result of :meth:`fit_in_one_chunk`.
            keeps: the result of :meth:`keeps`.
        """
        chunks = -(-self.rows // height)
        accumulate = self.dtype if in_one or keeps else self.accumulate
        elements = self.weight // self.dtype.itemsize
        total = elements * accumulate.itemsize
        rounded = self.weight if accumulate != self.dtype else 0
        products = self._product_bytes(1 if keeps else chunks, accumulate)
        chunk = {"chunk": height * row_bytes(self.sizes), "products": products}
        gradient_dtype = self.kept_dtype if keeps else self.gradient_dtype
        gradient = self.logits // self.dtype.itemsize * gradient_dtype.itemsize
        if keeps:
            chunk["chunk"] -= in_gradient_bytes(self.sizes, height, accumulate.itemsize)
            if accumulate.itemsize == 2:
                chunk["products"] += self.products.sum_bytes(elements)
            memory = {"gradients": self.hidden + total, "gradient of the logits": gradient} | chunk
        else:
            held = {"gradients": self.hidden, "accumulator": total}
            memory = _highest(held | chunk, held | {"gradients": self.hidden + rounded})
        weights = chunks * (self.weight + self.sizes.vocabulary * self._teacher_row())
        forward = 4 * self.accum_logits + self.hidden + self.rows * self._teacher_row() + weights
        # the first chunk is written, not added; what is kept is multiplied once
        added = total if keeps else (2 * chunks - 1) * total
        traffic = forward + 3 * gradient + 2 * self.hidden + chunks * self.weight + added
        flop = self.flop
        if rounded:
            traffic += total + rounded
        if torch.float16 in (self.dtype, accumulate):
            # the backward recomputes the logits, since only it has the loss scale
            traffic, flop = traffic + forward, flop + self.forward_flop
        return Level(memory, flop, traffic), added

    def keeps(self, height: int, in_one: bool) -> bool:
        """Return True if the gradients of all rows' logits are kept, as the driver decides.

        The arguments are those of :meth:`heads`.
        """
        total = self.dtype if in_one else self.accumulate
        summing = summing_bytes(self.sizes, height, total.itemsize, self.dtype.itemsize)
        sizes = self.sizes, self.rows, height
        return keeping_bytes(*sizes, self.kept_dtype.itemsize, self.dtype.itemsize) <= summing

    def rows_in_gradient(self, height: int) -> int:
        """Return the rows of a chunk if :meth:`keeps` is True, at least `height`."""
        return rows_in_gradient(self.sizes, self.rows, height, self.dtype.itemsize)

    def chunk(self, budget: int | None) -> tuple[int, str, str]:
        """Return chunk_rows, reason and explanation of a Plan, for a memory_budget or None.

        Raises:
            ValueError: The budget does not hold one row, or is None and the device not present.
        """
        fixed, row = self.products.fixed_bytes(), row_bytes(self.sizes)
        try:
            height = chunk_rows(self.rows, None, budget, self.device, self.sizes, fixed)
            floor = budget is None and automatic_rows(self.device, self.sizes, fixed) == FEWEST_ROWS
        except (AssertionError, AttributeError, RuntimeError) as error:
            raise ValueError(
                "device must be on this machine if memory_budget is None, because the automatic "
                f"budget depends on its memory; got {str(self.device)!r}: pass memory_budget "
                f"({error})"
            ) from error
        if height == self.rows:
            reason, because = "rows", "all of them fit"
        elif budget is not None:
            reason, because = "memory_budget", f"what memory_budget={shown(budget)} allows"
        elif floor:
            reason, because = "floor", "the fewest that the automatic choice takes"
        else:
            reason, because = "automatic", "what the automatic budget of the device allows"
        need = f"{shown(row)} each, and {shown(fixed)} for the products"
        return height, reason, f"chunks of {height} rows, {because} ({need})"

    def fit_in_one_chunk(self, budget: int | None) -> bool:
        """Return True if all rows fit in one chunk in the worst case, in which they are gathered.

        Then the weight gradient needs no sum. :meth:`chunk` must have accepted the budget before.
        """
        fixed, gathered = self.products.fixed_bytes(), self.sizes._replace(gathered=True)
        return self.rows <= chunk_rows(self.rows, None, budget, self.device, gathered, fixed)

    def _teacher_row(self) -> int:
        return (self.sizes.teacher_hidden or 0) * self.dtype.itemsize

    def _product_bytes(self, chunks: int, accumulate: torch.dtype) -> int:
        """Return the bytes that the products hold alongside a chunk.

        They depend on the number of `chunks` and on the dtype of the weight gradient's sum.
        """
        student = self.sizes.student_hidden or 0
        width = max(student, self.sizes.teacher_hidden or 0)
        tile, sum_tile = (
            min(TILE_BYTES, self.sizes.vocabulary * hidden * self.accum_dtype.itemsize)
            for hidden in (width, student)
        )
        compiled = isinstance(self.products, CompiledProducts)
        held = self.products.fixed_bytes() if compiled else 0
        one_at_a_time = [0]
        rounds = accumulate != self.accum_dtype and self.device.type == "cpu"
        if rounds and not (compiled and chunks == 1):
            # the tile in the wider dtype, and the sum that it is added to
            one_at_a_time.append(sum_tile * min(chunks, 2))
        if isinstance(self.products, TorchProducts) and self.dtype != self.accum_dtype:
            one_at_a_time.append(tile)
        held += max(one_at_a_time)
        return held


def _highest(*moments: dict[str, int]) -> dict[str, int]:
    return max(moments, key=lambda parts: sum(parts.values()))


def shown(size: float) -> str:
    """Format a number of bytes with a unit, as in "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
