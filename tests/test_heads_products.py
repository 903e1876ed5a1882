"""The products of each device: what a GPU would multiply, with its dtypes, in tests on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES
from linear_helpers import (
    H_S,
    Heads,
    Outcome,
    distance,
    make_heads,
    multiply_as_on_cuda,
    ours,
    truth,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_kd import checks, linear_kd_loss
from fused_kd.backends import reference
from fused_kd.linear import chunks, functional, operators, products
from fused_kd.linear.memory import row_bytes
from fused_kd.options import KDOptions
from fused_kd.testing import cpu_peak


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    return multiply_as_on_cuda(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
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
    assert {call[3] for call in as_on_cuda} == {torch.float32}
    # float16 comes back for its gradient: 4 chunks of 2 products, and again with 2 more
    assert len(as_on_cuda) == (4 * 2 + 4 * 4 if dtype == torch.float16 else 4 * 4)


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
        for mine, exact in zip(got, want, strict=True):
            assert distance(mine, exact) < 1e-6


def test_cuda_too_few_kept_rows_are_not_a_number(
    as_on_cuda: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the host does not look, rows must not be left out silently."""
    monkeypatch.setattr(functional, "check_kept_rows", lambda *arguments: None)
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
    for mine, exact in zip(got, truth(heads), strict=True):
        assert distance(mine, exact) < 2e-2


def test_cuda_float16_is_scaled_before_the_operand_is_rounded(
    as_on_cuda: list[tuple[Any, ...]],
) -> None:
    heads = make_heads()
    with torch.autocast("cpu", torch.float16):
        got = ours(heads, torch.tensor(2.0**16), num_items=2.0**26)
    want = truth(heads, torch.tensor(2.0**16), num_items=2.0**26)
    for mine, exact in zip(got, want, strict=True):
        assert distance(mine, exact) < 2e-3


def test_cuda_teacher_logits_and_16_bit_accumulation(as_on_cuda: list[tuple[Any, ...]]) -> None:
    heads = make_heads(dtype=torch.bfloat16)
    logits = (heads.teacher_hidden.float() @ heads.teacher_weight.float().t()).requires_grad_(False)
    arguments = {"labels": heads.labels, "student_bias": heads.bias, "chunk_rows": 16}
    loss = linear_kd_loss(
        heads.hidden,
        heads.weight,
        teacher_logits=logits,
        grad_accum_dtype=torch.bfloat16,
        **arguments,
    )
    want = truth(heads)
    for mine, exact in zip(torch.autograd.grad(loss, heads.student), want[1:], strict=True):
        assert distance(mine, exact) < 2e-2
    assert (torch.bfloat16, torch.bfloat16) in {call[2:4] for call in as_on_cuda}


def _rounded_by_a_kernel_of_its_own(
    heads: Heads, teacher: tuple[Tensor, Tensor] | Tensor | None, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    """The gradients by hidden states and weight, by way of a float32 gradient of the logits."""
    dtype, rows = heads.hidden.dtype, heads.hidden.shape[0]
    hidden, weight = heads.hidden.detach(), heads.weight.detach()
    options = KDOptions(soft_weight=0.0 if teacher is None else 0.5)
    w = torch.full((rows,), 0.5) / rows
    of_hidden, of_weight = torch.empty_like(hidden), torch.zeros(weight.shape)
    for begin in range(0, rows, chunk_rows):
        here = slice(begin, begin + chunk_rows)
        s = (hidden[here].double() @ weight.t().double()).float()
        if isinstance(teacher, tuple):
            t = (teacher[0][here].double() @ teacher[1].t().double()).float()
        else:
            t = s if teacher is None else teacher[here]
        w_soft = None if teacher is None else w[here]
        inputs = (s[None], t[None], heads.labels[here], w[here], w_soft)
        gradient = reference.forward_backward(*inputs, options)[3][0].to(dtype).double()
        of_hidden[here] = (gradient @ weight.double()).float().to(dtype)
        of_weight.add_(gradient.t() @ hidden[here].double())
    return of_hidden, of_weight.to(dtype)


@pytest.mark.parametrize("first_visit", [16, 1])
@pytest.mark.parametrize("chunk_rows", [37, 10])
@pytest.mark.parametrize("given", ["head", "logits", "copied logits", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("as_on_cuda")
def test_cuda_row_kernels_round_as_a_kernel_of_its_own_would(
    dtype: torch.dtype,
    given: str,
    chunk_rows: int,
    first_visit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, although the gradient may take the place of logits not visited yet."""
    monkeypatch.setattr(chunks, "FIRST_VISIT", first_visit)
    heads = make_heads(dtype=dtype)
    logits = F.linear(*heads.teacher).float()
    copied = torch.stack([logits, logits], -1)[..., 0]
    sides = {"head": heads.teacher, "logits": logits, "copied logits": copied}
    teacher: Any = sides.get(given)
    keywords: dict[str, Any] = {"chunk_rows": chunk_rows, "backend": "reference"}
    if given == "head":
        keywords |= {"teacher_hidden": teacher[0], "teacher_weight": teacher[1]}
    elif given == "none":
        keywords["soft_weight"] = 0.0
    else:
        keywords["teacher_logits"] = teacher
    loss = linear_kd_loss(heads.hidden, heads.weight, labels=heads.labels, **keywords)
    got = torch.autograd.grad(loss, (heads.hidden, heads.weight))
    want = _rounded_by_a_kernel_of_its_own(heads, teacher, chunk_rows)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


def _apart(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors share no memory: a kernel reads while it writes."""
    (a_begin, a_end), (b_begin, b_end) = ((x.data_ptr(), x.data_ptr() + x.nbytes) for x in (a, b))
    return a_end <= b_begin or b_end <= a_begin


@pytest.mark.parametrize("given", ["head", "logits", "copied logits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("as_on_cuda")
def test_cuda_a_sixteenth_of_the_rows_is_rounded_apart(
    dtype: torch.dtype, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row kernel rounds the others; and no buffer but the logits' own with a teacher's head."""
    visits: list[tuple[int, bool, torch.dtype]] = []
    buffers: list[chunks._Chunk] = []

    class Watched(chunks._Chunk):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            buffers.append(self)

    def watch(*rows: Any, inplace: bool = False, out: Tensor | None = None) -> Any:
        place = rows[0] if out is None else out
        assert out is None or all(_apart(out, x) for x in rows[:2])
        visits.append((place.shape[1], inplace, place.dtype))
        return reference.forward_backward(*rows, inplace=inplace, out=out)

    monkeypatch.setattr(chunks, "_Chunk", Watched)
    monkeypatch.setattr(operators, "named", lambda name: SimpleNamespace(forward_backward=watch))
    heads = make_heads(rows=37, dtype=dtype)
    arguments = {"teacher_hidden": heads.teacher_hidden, "teacher_weight": heads.teacher_weight}
    if given != "head":
        logits = F.linear(*heads.teacher)
        copied = torch.stack([logits, logits], -1)[..., 0]
        arguments = {"teacher_logits": logits if given == "logits" else copied}
    linear_kd_loss(
        heads.hidden, heads.weight, labels=heads.labels, backend="reference", **arguments
    )
    wide = torch.float32
    if dtype == wide or given == "copied logits":
        assert visits == [(37, True, wide)]
    elif given == "logits":
        assert visits == [(37, False, dtype)]
    else:
        out = [(rows, False, dtype) for rows in (3, 6, 12, 13)]
        assert visits == [(3, True, wide), *out]
    (buffer,) = buffers
    if buffer.gradient is None:  # made when the copy is gone
        assert given == "copied logits"
        return
    gradient = buffer.gradient.untyped_storage().data_ptr()
    logits = [
        x.untyped_storage().data_ptr() for x in (buffer.student, buffer.teacher) if x is not None
    ]
    assert (gradient in logits) == (given == "head" or dtype == wide)


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("given", ["head", "logits", "none"])
@pytest.mark.usefixtures("as_on_cuda")
def test_cuda_memory_of_a_chunk(
    given: str, gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the height of a chunk is computed from is what a chunk takes."""

    def mm(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:  # allocates nothing
        torch.ops.fused_kd.product_(out, a, b, None, torch.bfloat16, False, add)

    monkeypatch.setattr(products, "_mm", mm)
    rows, vocabulary, height = 64, 8192, 32
    heads = make_heads(rows, vocabulary, torch.bfloat16)
    student = products.Side(heads.hidden, heads.weight, None, torch.bfloat16)
    teacher = logits = None
    if given == "head":
        teacher = products.Side(*heads.teacher, None, torch.bfloat16)
    elif given == "logits":
        logits = F.linear(*heads.teacher)
    sizes = chunks.sizes_of(student, teacher, logits, torch.float32, gathered)
    tensors = (*student[:2], *(heads.teacher if teacher else (None, None)), heads.labels)
    soft_weight = 0.0 if given == "none" else 0.5

    def step() -> None:
        loss = linear_kd_loss(
            *tensors,
            teacher_logits=logits,
            chunk_rows=height,
            kept_rows=rows if gathered else None,
            soft_weight=soft_weight,
        )
        torch.autograd.grad(loss, student[:2])

    step()
    outputs = heads.hidden.nbytes + 4 * heads.weight.numel()  # and the sum, in float32
    taken = cpu_peak(step).highest - outputs
    predicted = height * row_bytes(sizes)
    assert 0.95 * predicted <= taken <= predicted + 64 * 1024


class _NothingWaits(TorchDispatchMode):
    """Refuses what a GPU's host waits for: values that are asked for, tensors of Python numbers."""

    aten = torch.ops.aten
    refused = (aten._local_scalar_dense, aten.lift_fresh, aten.nonzero, aten.masked_select)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in self.refused, f"{func}: the host waits for the device"
        for name in ("linear_losses", "linear_gradients"):
            if func is getattr(torch.ops.fused_kd, name).default:
                with self:  # look into it
                    return getattr(operators, name)(*args)
        return func(*args, **(kwargs or {}))


def _shifted(x: Tensor) -> Tensor:
    """The first rows of each of 4 sequences: the leading dimensions do not fold."""
    return F.pad(x.view(4, 9, -1), (0, 0, 0, 1), value=torch.nan)[:, :-1]


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "folded": lambda x: x.view(4, 9, -1),
    "shifted": _shifted,
    "four dimensions": lambda x: _shifted(x).unflatten(0, (2, 2)),
    "transposed": lambda x: x.view(4, 9, -1).transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0].view(4, 9, -1),
}


@pytest.mark.parametrize("given", ["head", "logits"])
@pytest.mark.parametrize("kept_rows", [None, 32])
@pytest.mark.parametrize("layout", _LAYOUTS)
def test_nothing_waits_for_the_device(
    layout: str,
    kept_rows: int | None,
    given: str,
    as_on_cuda: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "may_look_at_values", lambda *tensors: False)
    heads = make_heads(rows=36)
    heads.labels[::9] = -100
    lay_out = _LAYOUTS[layout]
    student = [lay_out(heads.hidden), heads.weight, heads.bias]
    teacher = {
        "teacher_hidden": lay_out(heads.teacher_hidden),
        "teacher_weight": heads.teacher_weight,
    }
    if given == "logits":
        teacher = {"teacher_logits": lay_out(F.linear(*heads.teacher))}
    with _NothingWaits():
        loss = linear_kd_loss(
            *student[:2],
            labels=heads.labels.view(student[0].shape[:-1]),
            student_bias=heads.bias,
            chunk_rows=10,
            kept_rows=kept_rows,
            **teacher,
        )
        got = torch.autograd.grad(loss, heads.student)
    for mine, exact in zip((loss, *got), truth(heads), strict=True):
        assert distance(mine, exact) < 1e-6


def test_a_single_row_whose_entries_lie_apart() -> None:
    heads = make_heads(rows=1)
    apart = torch.stack([heads.hidden[0], heads.hidden[0]], -1)[:, 0]
    assert apart.shape == (H_S,)
    assert apart.stride(0) == 2
    loss = linear_kd_loss(
        apart, heads.weight, heads.teacher_hidden[0], heads.teacher_weight, heads.labels[0],
        student_bias=heads.bias,
    )  # fmt: skip
    got = torch.autograd.grad(loss, heads.student)
    for mine, exact in zip((loss, *got), truth(heads), strict=True):
        assert distance(mine, exact) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_torch_products_tile_what_they_widen(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (chunks, functional):
        monkeypatch.setattr(module, "products_for", lambda device, wide: products.TorchProducts())
    monkeypatch.setattr(products.TorchProducts, "tile_bytes", 50 * 24 * 4)
    heads = make_heads(dtype=dtype)
    for accumulate in {torch.float32, dtype}:
        got = ours(heads, chunk_rows=10, grad_accum_dtype=accumulate)
        for name, mine, exact in zip(Outcome._fields, got, truth(heads), strict=True):
            bound = 1e-6 if name == "loss" else 1e-6 + 2 * torch.finfo(dtype).eps
            assert distance(mine, exact) <= bound, (name, accumulate)


def test_who_multiplies() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert isinstance(products.products_for(cpu, torch.float64), products.TorchProducts)
    assert isinstance(products.products_for(cuda, torch.float64), products.TorchProducts)
    assert isinstance(products.products_for(cuda, torch.float32), products.CudaProducts)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch has no CUDA kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_adds_16_bit_products_to_float32(dtype: torch.dtype) -> None:
    """Before torch 2.10 the CUDA kernel refused it. Its checks run without a device, too."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    a, b, out = torch.zeros(3, 4, dtype=dtype), torch.zeros(4, 5, dtype=dtype), torch.zeros(3, 5)
    add = torch.ops.aten.addmm.dtype_out
    with pytest.raises(RuntimeError, match="expected it to be on GPU"):  # dtypes are checked first
        add.redispatch(cuda, out, a, b, torch.float32, out=out)
    with pytest.raises(RuntimeError, match="dtype"):
        add.redispatch(cuda, out.double(), a, b, torch.float32, out=out)
