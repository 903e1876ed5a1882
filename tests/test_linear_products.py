"""The products of each device: what a GPU would multiply, with its dtypes, in tests on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_helpers import Outcome, distance, make_heads, ours, truth
from torch import Tensor

from fused_kd import linear_kd_loss
from fused_kd.linear import chunks, functional, products


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """CudaProducts and masked rows; each product in float64, after what cuBLAS asks of dtypes."""
    calls: list[tuple[Any, ...]] = []

    def mm(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
        assert a.dtype == b.dtype
        assert out.dtype == a.dtype or (
            out.dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16)
        )
        calls.append((tuple(a.shape), tuple(b.shape), a.dtype, out.dtype, add))
        exact = a.double() @ b.double()
        out.copy_(out + exact if add else exact)

    monkeypatch.setattr(products, "_mm", mm)
    for module in (chunks, functional):
        monkeypatch.setattr(module, "products_for", lambda device, wide: products.CudaProducts())
    monkeypatch.setattr(chunks, "_host_knows", lambda x: False)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
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
