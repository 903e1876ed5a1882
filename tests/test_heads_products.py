"""The products of each device: what a GPU would multiply, with its dtypes, in tests on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.backends import formula_of, needs_cpu
from support.heads import (
    H_S,
    Heads,
    Outcome,
    distance,
    make_heads,
    multiply_as_on_cuda,
    near,
    ours,
    truth,
)
from support.logits import identical
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_kd import Head, extension, kd_loss
from fused_kd.backends import named, reference
from fused_kd.checks import call as checks
from fused_kd.engines import chunks, driver, operators, products
from fused_kd.engines.memory import row_bytes
from fused_kd.engines.problem import Problem
from fused_kd.testing import cpu_peak


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    return multiply_as_on_cuda(monkeypatch)


def test_cuda(dtype: torch.dtype, as_on_cuda: list[tuple[Any, ...]]) -> None:
    heads = make_heads(dtype=dtype)
    heads.labels[::3] = -100
    want = truth(heads)
    with torch.no_grad():
        heads.hidden[::3] = torch.nan  # masked
    got = ours(heads, chunk_rows=10)
    eps = torch.finfo(dtype).eps
    for name, mine, exact in zip(Outcome._fields, got, want, strict=True):
        assert distance(mine, exact) <= (1e-6 if name == "loss" else 1e-6 + eps), name
    assert not got.hidden[::3].any()
    assert {call[2] for call in as_on_cuda} == {dtype}
    # logits have float32; gradients are rounded by the product
    assert {call[3] for call in as_on_cuda} == {torch.float32, dtype}
    # 4 chunks of 4 products, or of 3 and one of what is kept; float16 computes the logits twice
    of_weight = 4 if dtype == torch.float32 else 1
    assert len(as_on_cuda) == 4 * 3 + of_weight + (4 * 2 if dtype == torch.float16 else 0)


# H is 24. The gradients of all rows' logits take more memory than the weight gradient in float32;
# in bfloat16, if the processor multiplies it, less than that; for all dtypes less than the logits
# of a chunk
@pytest.mark.parametrize(
    ("rows", "keeping"),
    [(150, ()), (37, (torch.bfloat16,)), (16, (torch.bfloat16, torch.float16, torch.float32))],
)
@pytest.mark.parametrize("ignored", [False, True])
def test_gradients_kept_or_summed(
    rows: int,
    keeping: tuple[torch.dtype, ...],
    ignored: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[torch.dtype | None] = []

    def spy(*arguments: Any) -> torch.dtype | None:
        kept.append(chosen(*arguments))
        return kept[-1]

    chosen = driver._kept_dtype
    monkeypatch.setattr(driver, "_kept_dtype", spy)
    heads = make_heads(rows=rows, dtype=dtype)
    if ignored:
        heads.labels[::3] = -100
    got, want = ours(heads, chunk_rows=10), truth(heads)
    eps = torch.finfo(dtype).eps
    for name, mine, exact in zip(Outcome._fields, got, want, strict=True):
        assert distance(mine, exact) <= (2e-6 if name == "loss" else 2e-6 + eps), name
    info = extension.cpu.build_info()
    pairs = info is not None and info["product_multiplies_pairs"]
    rounded = torch.bfloat16 if dtype == torch.bfloat16 and pairs else torch.float32
    assert kept == [rounded if dtype in keeping and (pairs or rows == 16) else None]


@needs_cpu
def test_a_kept_gradient_is_rounded_once_and_multiplied_at_once() -> None:
    # The weight gradient has the bits of one product of all rows, for chunks of any height that
    # are kept: up to 12 rows, whose logits fit in its memory.
    heads = make_heads(rows=16, dtype=torch.bfloat16)
    whole = ours(heads, chunk_rows=10)
    for rows in (1, 7, 12):
        assert torch.equal(ours(heads, chunk_rows=rows).weight, whole.weight)


# Up to 2·H = 48 rows are kept in bfloat16; in float32 12, two chunks, like the logits of both sides
@pytest.mark.parametrize("teacher", ["head", "logits", "gathered logits"])
@pytest.mark.parametrize(
    ("dtype", "rows"), [(torch.bfloat16, 36), (torch.bfloat16, 47), (torch.float32, 12)]
)
def test_keeping_takes_no_more_memory(
    dtype: torch.dtype, rows: int, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = make_heads(rows=rows, vocabulary=4000, dtype=dtype)
    side: Head | Tensor = heads.teacher_side
    if teacher != "head":
        side = F.linear(*(x.float() for x in heads.teacher))
    if teacher == "gathered logits":
        heads.labels[0] = -100

    def step() -> Any:
        loss = kd_loss(heads.student_side, side, heads.labels, chunk_rows=6)
        return torch.autograd.grad(loss, heads.student)

    step()
    as_chosen = cpu_peak(step).highest
    monkeypatch.setattr(driver, "_kept_dtype", lambda *arguments: None)
    assert as_chosen <= cpu_peak(step).highest + 4096


def test_a_default_dtype_changes_no_gradient(dtype: torch.dtype) -> None:
    heads = make_heads(dtype=dtype)
    want = ours(heads, chunk_rows=10)
    default = torch.get_default_dtype()
    try:
        for other in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(other)
            identical(ours(heads, chunk_rows=10), want)
    finally:
        torch.set_default_dtype(default)


def test_cuda_kept_rows(as_on_cuda: list[tuple[Any, ...]]) -> None:
    heads = make_heads()
    heads.labels[::3] = -100
    kept = int((heads.labels != -100).sum())
    want = truth(heads)
    with torch.no_grad():
        heads.hidden[::3] = torch.nan
    for bound in (kept, kept + 5):
        as_on_cuda.clear()
        got = ours(heads, kept_rows=bound)
        assert sum(call[0][0] for call in as_on_cuda if call[1] == (24, 131)) == bound
        near(got, want, 1e-6)


def test_cuda_too_few_kept_rows_are_not_a_number(
    as_on_cuda: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the check on the host, rows must not be left out silently.
    monkeypatch.setattr(checks, "_check_kept_rows", lambda *arguments: None)
    heads = make_heads()
    assert ours(heads, kept_rows=37).loss.isfinite()
    assert ours(heads, kept_rows=36).loss.isnan()


def test_cuda_autocast_casts_tiles(
    as_on_cuda: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products.CudaProducts, "tile_bytes", 50 * 24 * 4)
    heads = make_heads()
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(heads)
    assert max(call[1][1] for call in as_on_cuda if call[0] == (37, 24)) == 50
    assert {call[2] for call in as_on_cuda} == {torch.bfloat16}
    near(got, truth(heads), 2e-2)


def test_cuda_float16_is_scaled_before_the_operand_is_rounded(
    as_on_cuda: list[tuple[Any, ...]],
) -> None:
    heads = make_heads()
    with torch.autocast("cpu", torch.float16):
        got = ours(heads, torch.tensor(2.0**16), num_items=2.0**26)
    want = truth(heads, torch.tensor(2.0**16), num_items=2.0**26)
    near(got, want, 2e-3)


def test_cuda_teacher_logits_and_16_bit_accumulation(as_on_cuda: list[tuple[Any, ...]]) -> None:
    heads = make_heads(dtype=torch.bfloat16)
    logits = (heads.teacher_hidden.float() @ heads.teacher_weight.float().t()).requires_grad_(False)
    student, accumulate = heads.student_side, torch.bfloat16
    loss = kd_loss(student, logits, heads.labels, chunk_rows=16, grad_accum_dtype=accumulate)
    want = truth(heads)
    near(torch.autograd.grad(loss, heads.student), want[1:], 2e-2)
    assert (torch.bfloat16, torch.bfloat16) in {call[2:4] for call in as_on_cuda}


def _rounded_by_a_kernel_of_its_own(
    heads: Heads, teacher: tuple[Tensor, Tensor] | Tensor | None, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    """Return hidden and weight gradients from logit gradients made in float32, then rounded."""
    dtype, rows = heads.hidden.dtype, heads.hidden.shape[0]
    hidden, weight = heads.hidden.detach(), heads.weight.detach()
    formula = formula_of()
    w = torch.full((rows,), 0.5) / rows
    of_hidden, of_weight = torch.empty_like(hidden), torch.zeros(weight.shape)
    for begin in range(0, rows, chunk_rows):
        chunk = slice(begin, begin + chunk_rows)
        s = (hidden[chunk].double() @ weight.t().double()).float()
        if isinstance(teacher, tuple):
            t = (teacher[0][chunk].double() @ teacher[1].t().double()).float()
        else:
            t = s if teacher is None else teacher[chunk]
        w_soft = None if teacher is None else w[chunk]
        inputs = (s[None], t[None], heads.labels[chunk], w[chunk], w_soft)
        gradient = reference.forward_backward(*inputs, formula)[3][0].to(dtype).double()
        of_hidden[chunk] = (gradient @ weight.double()).float().to(dtype)
        of_weight.add_(gradient.t() @ hidden[chunk].double())
    return of_hidden, of_weight.to(dtype)


@pytest.mark.parametrize("first_part", [16, 1])
@pytest.mark.parametrize("chunk_rows", [37, 10])
@pytest.mark.parametrize("kind", ["head", "logits", "copied logits", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("as_on_cuda")
def test_cuda_row_kernels_round_as_a_kernel_of_its_own_would(
    dtype: torch.dtype,
    kind: str,
    chunk_rows: int,
    first_part: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Bit for bit, although the gradient may take the place of logits not read yet.
    monkeypatch.setattr(chunks, "FIRST_PART", first_part)
    heads = make_heads(dtype=dtype)
    logits = F.linear(*heads.teacher).float()
    copied = torch.stack([logits, logits], -1)[..., 0]
    sides = {"head": heads.teacher_side, "logits": logits, "copied logits": copied}
    teacher: Any = sides.get(kind)
    keywords: dict[str, Any] = {"chunk_rows": chunk_rows, "backend": "reference"}
    if kind == "none":
        keywords["soft_weight"] = 0.0
    loss = kd_loss(Head(heads.hidden, heads.weight), teacher, heads.labels, **keywords)
    got = torch.autograd.grad(loss, (heads.hidden, heads.weight))
    plain = heads.teacher if kind == "head" else teacher
    want = _rounded_by_a_kernel_of_its_own(heads, plain, chunk_rows)
    identical(got, want)


def _apart(a: Tensor, b: Tensor) -> bool:
    """Return True if contiguous tensors share no memory: a kernel may read one, write the other."""
    (a_begin, a_end), (b_begin, b_end) = ((x.data_ptr(), x.data_ptr() + x.nbytes) for x in (a, b))
    return a_end <= b_begin or b_end <= a_begin


@pytest.mark.parametrize("kind", ["head", "logits", "copied logits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("as_on_cuda")
def test_cuda_a_sixteenth_of_the_rows_is_rounded_apart(
    dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The row kernel rounds the other rows; with a teacher's head no buffer is added to the logits.
    visits: list[tuple[int, bool, torch.dtype]] = []
    buffers: list[chunks.HeadChunk] = []

    class Watched(chunks.HeadChunk):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            buffers.append(self)

    def watch(*rows: Any, inplace: bool = False, out: Tensor | None = None) -> Any:
        place = rows[0] if out is None else out
        assert out is None or all(_apart(out, x) for x in rows[:2])
        visits.append((place.shape[1], inplace, place.dtype))
        return reference.forward_backward(*rows, inplace=inplace, out=out)

    monkeypatch.setattr(chunks, "HeadChunk", Watched)
    monkeypatch.setattr(operators, "named", lambda name: SimpleNamespace(forward_backward=watch))
    heads = make_heads(rows=37, dtype=dtype)
    teacher_logits = F.linear(*heads.teacher)
    copied = torch.stack([teacher_logits, teacher_logits], -1)[..., 0]
    sides = {"head": heads.teacher_side, "logits": teacher_logits, "copied logits": copied}
    kd_loss(Head(heads.hidden, heads.weight), sides[kind], heads.labels, backend="reference")
    accum_dtype = torch.float32
    if dtype == accum_dtype or kind == "copied logits":
        assert visits == [(37, True, accum_dtype)]
    elif kind == "logits":
        assert visits == [(37, False, dtype)]
    else:
        out = [(rows, False, dtype) for rows in (3, 6, 12, 13)]
        assert visits == [(3, True, accum_dtype), *out]
    (buffer,) = buffers
    if buffer.gradient is None:  # made when the copy is gone
        assert kind == "copied logits"
        return
    gradient = buffer.gradient.untyped_storage().data_ptr()
    buffers_of_logits = (buffer.logits, buffer.teacher.buffer)
    logits = [x.untyped_storage().data_ptr() for x in buffers_of_logits if x is not None]
    assert (gradient in logits) == (kind == "head" or dtype == accum_dtype)


def _problem(student: Head, teacher: Any) -> Problem:
    """Return a Problem of two sides, complete enough for driver.sizes_of."""
    if isinstance(teacher, Head):
        teacher = products.Projection(*teacher[:3], torch.bfloat16)
    return Problem(
        student=products.Projection(*student[:3], torch.bfloat16),
        teacher=teacher,
        labels=None,
        w_hard=None,
        w_soft=None,
        formula=formula_of(),
        backend_name="reference",
        backend=named("reference"),
        accum_dtype=torch.float32,
        chunk_rows=None,
        memory_budget=None,
        kept_rows=None,
        grad_accum_dtype=torch.float32,
        may_narrow=False,
        inplace=False,
    )


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("kind", ["head", "logits", "none"])
@pytest.mark.usefixtures("as_on_cuda")
def test_cuda_memory_of_a_chunk(kind: str, gathered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # The bytes that determine a chunk's height are the bytes that a chunk takes.
    def mm(out: Tensor, a: Tensor, b: Tensor, add: bool, scale: float) -> None:
        """Multiply into `out` without a temporary, which the measurement would include."""
        torch.ops.fused_kd.product_(out, a, b, None, torch.bfloat16, False, add)

    monkeypatch.setattr(products, "_mm", mm)
    rows, vocabulary, height = 64, 8192, 32
    heads = make_heads(rows, vocabulary, torch.bfloat16)
    student = Head(heads.hidden, heads.weight)
    sides = {"head": heads.teacher_side, "logits": F.linear(*heads.teacher)}
    teacher = sides.get(kind)
    sizes = driver.sizes_of(_problem(student, teacher), products.CudaProducts(), gathered)
    soft_weight = 0.0 if kind == "none" else 0.5

    def step() -> None:
        loss = kd_loss(
            student,
            teacher,
            heads.labels,
            chunk_rows=height,
            kept_rows=rows if gathered else None,
            soft_weight=soft_weight,
        )
        torch.autograd.grad(loss, (heads.hidden, heads.weight))

    step()
    outputs = heads.hidden.nbytes + 4 * heads.weight.numel()  # and the sum, in float32
    taken = cpu_peak(step).highest - outputs
    predicted = height * row_bytes(sizes)
    assert 0.95 * predicted <= taken <= predicted + 64 * 1024


@pytest.mark.parametrize("kept_rows", [None, 24, 30])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.usefixtures("as_on_cuda")
def test_cuda_student_logits(dtype: torch.dtype, inplace: bool, kept_rows: int | None) -> None:
    # Ignored rows, which are not numbers, are masked, or left out as far as kept_rows says.
    heads = make_heads(dtype=dtype)
    heads.labels[::3] = -100
    logits = F.linear(*heads.student).detach().requires_grad_()
    exact = logits.detach().double().requires_grad_()
    whole = F.linear(*(x.double() for x in heads.teacher))
    want = kd_loss(exact, whole, heads.labels, backend="reference")
    want.backward()
    with torch.no_grad():
        logits[::3] = torch.nan
        heads.teacher_hidden[::3] = torch.inf
    keywords: dict[str, Any] = {"chunk_rows": 10, "kept_rows": kept_rows, "inplace": inplace}
    student = logits * 1 if inplace else logits
    loss = kd_loss(student, heads.teacher_side, heads.labels, **keywords)
    (got,) = torch.autograd.grad(loss, logits)
    assert got.dtype == dtype
    assert not got[::3].any()
    assert distance(loss.detach(), want.detach()) <= 1e-6
    assert distance(got, exact.grad) <= 1e-6 + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_scale_of_a_head(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = make_heads(dtype=dtype)
    sides = Head(*heads.student, scale=-0.3), Head(*heads.teacher, heads.bias.detach(), 1.7)
    student, teacher = (x.scale * F.linear(*x.to(torch.float64)[:3]) for x in sides)
    want = kd_loss(student, teacher, heads.labels, backend="reference")
    exact = torch.autograd.grad(want, heads.student)
    multiply_as_on_cuda(monkeypatch)
    loss = kd_loss(*sides, heads.labels, chunk_rows=10)
    assert distance(loss.detach(), want.detach()) < 1e-6
    eps = torch.finfo(dtype).eps
    near(torch.autograd.grad(loss, heads.student), exact, 1e-6 + 2 * eps)


class _NothingWaits(TorchDispatchMode):
    """A mode that fails at operators for which a GPU's host waits, such as reads of values."""

    aten = torch.ops.aten
    refused = (aten._local_scalar_dense, aten.lift_fresh, aten.nonzero, aten.masked_select)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in self.refused, f"{func}: the host waits for the device"
        for name in ("chunked_losses", "chunked_gradients"):
            if func is getattr(torch.ops.fused_kd, name).default:
                with self:  # trace into the operator
                    return getattr(operators, name)(*args)
        return func(*args, **(kwargs or {}))


def _shifted(x: Tensor) -> Tensor:
    """Return x as 4 sequences with a gap after each: the leading dimensions do not fold."""
    return F.pad(x.view(4, 9, -1), (0, 0, 0, 1), value=torch.nan)[:, :-1]


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "folded": lambda x: x.view(4, 9, -1),
    "shifted": _shifted,
    "four dimensions": lambda x: _shifted(x).unflatten(0, (2, 2)),
    "transposed": lambda x: x.view(4, 9, -1).transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0].view(4, 9, -1),
}


@pytest.mark.parametrize("kind", ["head", "logits"])
@pytest.mark.parametrize("kept_rows", [None, 32])
@pytest.mark.parametrize("layout", _LAYOUTS)
def test_nothing_waits_for_the_device(
    layout: str,
    kept_rows: int | None,
    kind: str,
    as_on_cuda: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "may_read_values", lambda *tensors: False)
    heads = make_heads(rows=36)
    heads.labels[::9] = -100
    lay_out = _LAYOUTS[layout]
    student = Head(lay_out(heads.hidden), heads.weight, heads.bias)
    teacher: Any = Head(lay_out(heads.teacher_hidden), heads.teacher_weight)
    if kind == "logits":
        teacher = lay_out(F.linear(*heads.teacher))
    labels = heads.labels.view(student.hidden.shape[:-1])
    with _NothingWaits():
        loss = kd_loss(student, teacher, labels, chunk_rows=10, kept_rows=kept_rows)
        got = torch.autograd.grad(loss, heads.student)
    near((loss, *got), truth(heads), 1e-6)


def test_a_single_row_whose_entries_lie_apart() -> None:
    heads = make_heads(rows=1)
    apart = torch.stack([heads.hidden[0], heads.hidden[0]], -1)[:, 0]
    assert apart.shape == (H_S,)
    assert apart.stride(0) == 2
    student = Head(apart, heads.weight, heads.bias)
    loss = kd_loss(student, heads.teacher_side.rows(0), heads.labels[0])
    got = torch.autograd.grad(loss, heads.student)
    near((loss, *got), truth(heads), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_torch_products_tile_what_they_widen(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "products_for", lambda *arguments: products.TorchProducts())
    monkeypatch.setattr(products.TorchProducts, "tile_bytes", 50 * 24 * 4)
    heads = make_heads(dtype=dtype)
    for accumulate in {torch.float32, dtype}:
        got = ours(heads, chunk_rows=10, grad_accum_dtype=accumulate)
        for name, mine, exact in zip(Outcome._fields, got, truth(heads), strict=True):
            bound = 1e-6 if name == "loss" else 1e-6 + 2 * torch.finfo(dtype).eps
            assert distance(mine, exact) <= bound, (name, accumulate)


def test_products_of_each_backend() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    kinds = {
        ("cpu", cpu, torch.float64): products.TorchProducts,
        ("cuda", cuda, torch.float64): products.TorchProducts,
        ("cuda", cuda, torch.float32): products.CudaProducts,
        ("triton", cuda, torch.float32): products.CudaProducts,
        ("reference", cpu, torch.float32): products.TorchProducts,
        ("reference", cuda, torch.float32): products.TorchProducts,
    }
    if extension.cpu.why_not() is None:
        kinds["cpu", cpu, torch.float32] = products.CompiledProducts
    for asked, kind in kinds.items():
        assert type(products.products_for(*asked)) is kind, asked


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch has no CUDA kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_adds_16_bit_products_to_float32(dtype: torch.dtype) -> None:
    # Before torch 2.10 the CUDA kernel refused it. Its checks run without a device, too.
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    a, b, out = torch.zeros(3, 4, dtype=dtype), torch.zeros(4, 5, dtype=dtype), torch.zeros(3, 5)
    add = torch.ops.aten.addmm.dtype_out
    with pytest.raises(RuntimeError, match="expected it to be on GPU"):  # dtypes are checked first
        add.redispatch(cuda, out, a, b, torch.float32, out=out)
    with pytest.raises(RuntimeError, match="dtype"):
        add.redispatch(cuda, out.double(), a, b, torch.float32, out=out)
