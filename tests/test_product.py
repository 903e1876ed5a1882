"""The CPU's matrix product: float32 sums of any operands, on every instruction set."""

from __future__ import annotations

import sys
from itertools import product as crossed
from typing import Any

import pytest
import torch
from support.backends import needs_cpu, threads
from support.logits import DTYPES
from support.processes import PATH, passes, run_python
from torch import Tensor

from fused_kd import extension
from fused_kd.testing import guarded

_module = extension.cpu.load()
pytestmark = needs_cpu

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EPS = 2.0**-24  # of one rounding to float32
PAIRS = ("avx512_bf16", "amx")  # multiply bfloat16 pairs

# (M, N, K): single elements; odd sizes inside one tile and one vector; around a tile and half a
# tile of 4x8, 6x16 and 12x32; a block's depth of 256 (512 in pairs) and one more; several blocks of
# rows (288) and of columns (1008); nothing to sum
SHAPES = [(1, 1, 1), (1, 70, 3), (65, 1, 31), (5, 7, 2), (6, 16, 256), (13, 33, 257), (70, 69, 67)]
SHAPES += [(11, 15, 513), (25, 63, 1030), (300, 17, 9), (3, 1030, 40), (4, 5, 0)]


def _product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    round_to: torch.dtype = F32,
    round_a: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Return a·b + bias of the operator; if `out` is given, the product is added to it."""
    accumulate = out is not None
    if out is None:
        out = torch.full((a.shape[0], b.shape[1]), float("nan"))
    torch.ops.fused_kd.product_(out, a, b, bias, round_to, round_a, accumulate)
    return out


def _matrix(rows: int, columns: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Return random values, contiguous along "rows" or "columns", next to NaNs not to be read."""
    shape = (rows, columns) if layout == "rows" else (columns, rows)
    memory = torch.full((shape[0], shape[1] + 3), float("nan"), dtype=dtype)
    memory[:, : shape[1]] = torch.randn(shape)
    view = memory[:, : shape[1]]
    return view if layout == "rows" else view.t()


def _as_multiplied(
    a: Tensor, b: Tensor, round_to: torch.dtype, round_a: bool, isa: str
) -> tuple[Tensor, Tensor]:
    """Return the operands in float64, after the rounding that the operator promises."""
    pairs = isa in PAIRS and round_to == BF16
    if round_to != F32:
        b = b.to(round_to)
        a = a.to(round_to) if round_a or pairs else a
    return a.double(), b.double()


def _assert_close(got: Tensor, want: Tensor, terms: Tensor, roundings: int) -> None:
    error = (got.double() - want).abs()
    bound = roundings * EPS * terms + 1e-37
    assert not got.isnan().any()
    assert bool((error <= bound).all()), float((error / bound).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_every_dtype_and_layout(isa: str, shape: tuple[int, int, int]) -> None:
    # Within the bound of float32 sums of exactly the rounded operands.
    M, N, K = shape
    layouts = list(crossed(("rows", "columns"), repeat=2))
    cases = crossed(DTYPES, DTYPES, DTYPES, (False, True))
    for i, (of_a, of_b, round_to, round_a) in enumerate(cases):
        for layout_a, layout_b in layouts if M * N * K < 20_000 else layouts[i % 4 :][:1]:
            a, b = _matrix(M, K, of_a, layout_a), _matrix(K, N, of_b, layout_b)
            got = _product(a, b, round_to=round_to, round_a=round_a)
            x, y = _as_multiplied(a, b, round_to, round_a, isa)
            _assert_close(got, x @ y, x.abs() @ y.abs(), K + 2)


def test_values_are_rounded_to_nearest_even(isa: str) -> None:
    # One term per sum shows the operands themselves: ties, subnormals, infinities, NaN.
    patterns = torch.tensor([0x3F80, 0x3F81, 0x0001, 0x7F7F, 0xFF7F, 0x7F80, 0x8000, 0x7FFF])
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    words = ((patterns[:, None] << 16) | low).flatten().to(torch.int64)
    small = torch.tensor([2.0**-24, 2.0**-25, 1.5 * 2.0**-24, 65504.0, 65519.9, 65520.0, -1e-9])
    values = torch.cat(
        [torch.where(words > 2**31 - 1, words - 2**32, words).int().view(F32), small]
    )
    values = values.repeat(2)[:97].contiguous()  # whole vectors and single elements
    unit = torch.ones(1, 1)
    for round_to in (F32, BF16, F16):
        want = values.to(round_to).float()
        if isa in PAIRS and round_to == BF16:
            want = torch.where(want.abs() < 2.0**-126, 0, want)  # the instruction flushes them
        for row in (values[None], values[:, None].t().contiguous()):
            got = _product(unit, row, round_to=round_to)[0]
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        got = _product(values[:, None], unit, round_to=round_to, round_a=True)[:, 0]
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_rounding_is_that_of_rounded_operands(isa: str) -> None:
    # The same bits as operands rounded before the call, or not rounded if not requested.
    a, b = torch.randn(20, 300), torch.randn(300, 45)
    for round_to in (BF16, F16):
        rounded_a, rounded_b = a.to(round_to), b.to(round_to)
        both = _product(a, b, round_to=round_to, round_a=True)
        assert torch.equal(both, _product(rounded_a, rounded_b, round_to=round_to))
        assert torch.equal(both, _product(rounded_a.float(), rounded_b, round_to=round_to))
        if not (isa in PAIRS and round_to == BF16):
            assert torch.equal(both, _product(rounded_a, rounded_b))
            only_b = _product(a, b, round_to=round_to)
            assert torch.equal(only_b, _product(a, rounded_b.float()))
            assert not torch.equal(only_b, both)


def test_bias_and_accumulation_into_strided_rows(isa: str) -> None:
    for M, N, K in ((7, 21, 5), (19, 70, 600)):
        a, b, bias, start = torch.randn(M, K), torch.randn(K, N), torch.randn(N), torch.randn(M, N)
        want, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        _assert_close(_product(a, b, bias), want + bias, terms + bias.abs(), K + 3)
        memory = torch.full((M, N + 5), 7.0)
        view = memory[:, 2 : N + 2]
        view.copy_(start)
        _product(a, b, out=view)
        _assert_close(view, want + start, terms + start.abs(), K + 3)
        assert bool((memory[:, :2] == 7).all())
        assert bool((memory[:, N + 2 :] == 7).all())
    nothing = torch.empty(3, 0), torch.empty(0, 4)
    assert torch.equal(_product(*nothing, torch.arange(4.0)), torch.arange(4.0).expand(3, 4))
    assert torch.equal(_product(*nothing, out=torch.ones(3, 4)), torch.ones(3, 4))
    assert _product(torch.empty(0, 3), torch.empty(3, 4)).shape == (0, 4)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_16_bit_result_is_the_sum_rounded_once(isa: str, dtype: torch.dtype) -> None:
    # In one block of K and in several, in tiles at every edge, into strided rows, with a bias.
    for M, N, K in ((7, 21, 5), (25, 70, 300), (300, 50, 600), (13, 1100, 1100)):
        a, b = _matrix(M, K, BF16, "columns"), _matrix(K, N, BF16, "rows")
        bias = torch.randn(N)
        memory = torch.full((M, N + 5), 7.0, dtype=dtype)
        out = memory[:, 2 : N + 2]
        torch.ops.fused_kd.product_(out, a, b, bias, BF16, True, False)
        assert torch.equal(out, _product(a, b, bias, BF16, True).to(dtype))
        assert bool((memory[:, :2] == 7).all())
        assert bool((memory[:, N + 2 :] == 7).all())
    large = torch.full((1, 1), 3e38 if dtype == BF16 else 65519.9)  # largest that is not infinite
    for value in (large, 1.01 * large, large * torch.nan):
        out = torch.empty(1, 1, dtype=dtype)
        torch.ops.fused_kd.product_(out, value, torch.ones(1, 1), None, F32, False, False)
        torch.testing.assert_close(out, value.to(dtype), rtol=0, atol=0, equal_nan=True)
    with pytest.raises(RuntimeError, match="out must be float32 if the product is added to it"):
        torch.ops.fused_kd.product_(out, large, large, None, F32, False, True)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_row_has_the_same_bits_in_any_company(isa: str, dtype: torch.dtype) -> None:
    # Any number of rows and columns, any thread, any place in a tile.
    a, b = torch.randn(310, 530).to(dtype), torch.randn(1100, 530).to(dtype).t()
    with threads(1):
        whole = _product(a, b, round_to=dtype)
        for rows in (slice(0, 1), slice(5, 6), slice(3, 20), slice(250, 310)):
            assert torch.equal(_product(a[rows], b, round_to=dtype), whole[rows])
        for columns in (slice(0, 1), slice(30, 47), slice(1000, 1100)):
            got = _product(a[:40], b[:, columns], round_to=dtype)
            assert torch.equal(got, whole[:40, columns])
        # the same values in the other layout
        other = _product(a.t().contiguous().t(), b.contiguous(), round_to=dtype)
        assert torch.equal(other, whole)
    for number in (2, 3, 5):
        with threads(number):
            assert torch.equal(_product(a, b, round_to=dtype), whole)


def test_what_is_not_finite_stays_in_its_row_and_column(isa: str) -> None:
    M, N, K = 15, 37, 259
    for value in (float("inf"), float("nan")):
        for round_to in (F32, BF16):
            a, b = torch.randn(M, K), torch.randn(K, N)
            clean = _product(a, b, round_to=round_to)
            a[M - 1, K - 1] = value
            b[0, N - 1] = value
            got = _product(a, b, round_to=round_to)
            assert torch.equal(got[:-1, :-1], clean[:-1, :-1])
            assert not got[-1].isfinite().any()
            assert not got[:, -1].isfinite().any()


def _guarded(values: Tensor, side: str, transposed: bool) -> Tensor:
    """Return a copy (`transposed`: in the other layout) next to a page that can't be touched."""
    laid = values.t() if transposed else values
    copy = guarded(laid.numel(), laid.dtype, side).copy_(laid.flatten()).view(laid.shape)
    return copy.t() if transposed else copy


def walk_along_guard_pages() -> None:
    # In another process: every tensor ends, or begins, at a page that can't be touched.
    assert _module is not None
    torch.set_num_threads(1)
    sets = _module.build_info()["instruction_sets"]
    turn = 0
    for isa in (name for name, runs in sets.items() if runs):
        _module.choose_instruction_set(isa)
        sizes = [(1, 1, 1), (7, 17, 9), (13, 33, 33), (5, 47, 258)]
        for (M, N, K), of_a, of_b, side in crossed(sizes, DTYPES, DTYPES, ("after", "before")):
            for transpose_a, transpose_b in crossed((False, True), repeat=2):
                turn += 1
                round_to = DTYPES[turn % 3]
                a, b = torch.randn(M, K).to(of_a), torch.randn(K, N).to(of_b)
                bias = _guarded(torch.randn(1, N), side, False)[0]
                out = _guarded(torch.zeros(M, N), side, False)
                operands = _guarded(a, side, transpose_a), _guarded(b, side, transpose_b)
                torch.ops.fused_kd.product_(out, *operands, bias, round_to, False, False)
                assert torch.equal(out, _product(a, b, bias, round_to))
    print("walked")


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages by mprotect: Linux")
def test_guard_pages() -> None:
    code = "import test_product; test_product.walk_along_guard_pages()"
    assert passes(run_python("-c", code, PYTHONPATH=PATH)) == "walked\n"


def _bad_input() -> list[tuple[dict[str, Any], str]]:
    matrix = torch.zeros(6, 8)
    return [
        ({"out": torch.zeros(2, 4, dtype=torch.float64)}, "out must be float32"),
        ({"out": torch.zeros(3, 4)}, r"out must be \(2, 4\); got \(3, 4\)"),
        ({"out": torch.zeros(8)}, "out must be a matrix; got 1 dimensions"),
        ({"out": torch.zeros(4, 2).t()}, "out must have last stride 1; got 2"),
        ({"out": torch.zeros(9).as_strided((2, 4), (3, 1))}, "the rows of out overlap: stride 3"),
        ({"a": torch.zeros(2, 5)}, "b must have a row for each column of a, 5; got 3"),
        ({"a": torch.zeros(2, 3, dtype=torch.int32)}, "a must be float32, bfloat16 or float16"),
        ({"a": torch.zeros(2, 3, 1)}, "a must be a matrix; got 3 dimensions"),
        ({"a": matrix[::3, :6:2]}, "a must have stride 1 in one dimension; got strides 24 and 2"),
        ({"b": matrix[::2, ::2]}, "b must have stride 1 in one dimension; got strides 16 and 2"),
        ({"b": torch.zeros(3, 4, dtype=torch.float64)}, "b must be float32, bfloat16 or float16"),
        ({"bias": torch.zeros(5)}, "bias must be contiguous with one entry for each of the 4"),
        ({"bias": torch.zeros(8)[::2]}, "bias must be contiguous with one entry"),
        ({"bias": torch.zeros(4, dtype=BF16)}, "bias must be a float32 CPU tensor"),
        ({"bias": torch.zeros(4), "accumulate": True}, "bias and accumulate exclude each other"),
        ({"round_to": torch.float64}, "round_to must be float32, bfloat16 or float16"),
        ({"out": matrix[:2, :4], "a": matrix[1:3, :3]}, "out shares memory with a"),
        ({"out": matrix[:2, :4], "b": matrix[:3, 4:]}, "out shares memory with b"),
    ]


@pytest.mark.parametrize(("changed", "message"), _bad_input())
def test_bad_input(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"out": torch.zeros(2, 4), "a": torch.zeros(2, 3)}
    arguments |= {"b": torch.zeros(3, 4), "bias": None, "round_to": F32, "round_a": False}
    arguments |= {"accumulate": False} | changed
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_kd.product_(*arguments.values())


def test_registration_and_fake() -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs = (torch.zeros(2, 4), torch.randn(2, 3), torch.randn(4, 3).t(), torch.randn(4))
    torch.library.opcheck(
        torch.ops.fused_kd.product_.default, (*inputs, BF16, True, False), test_utils=tests
    )
    meta = [x.to("meta") for x in inputs]
    with pytest.raises(RuntimeError, match=r"must be matrices that fit; got \(2, 4\), \(2, 3\)"):
        torch.ops.fused_kd.product_(meta[0], meta[1], meta[1], None, F32, False, False)


def test_the_scratch_memory_is_told() -> None:
    info = extension.cpu.build_info()
    assert info is not None
    size = info["product_bytes_per_thread"]
    assert isinstance(size, int)
    most = 2**20 if info["instruction_set"] == "amx" else 2**19
    assert 0 < size <= most + 64
    sums = info["product_sum_bytes_per_thread"]
    assert isinstance(sums, int)
    assert 0 < sums <= 2 * most
