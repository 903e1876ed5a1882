"""Nothing outside a tensor is read or written: NaN margins, guard pages."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import sys

import pytest
import torch
from support.backends import needs_cpu
from support.logits import DTYPES
from support.processes import PATH, passes, run_python
from torch import Tensor

from fused_kd import ops
from fused_kd.divergences import DIVERGENCES
from fused_kd.extension import cpu
from fused_kd.testing import guarded

pytestmark = needs_cpu

# one entry; around a vector of 4, 8 and 16, a pair of them, and a block of 2048
VOCABULARIES = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 2047, 2048, 2049, 2111]
MARGIN = 40  # more than the longest pair of vectors
N = 3


def _margins(values: Tensor) -> Tensor:
    """Return the (N, 1, V) values as a view, with MARGIN NaNs before and after each row."""
    rows, _, vocabulary = values.shape
    memory = torch.full((rows, 1, vocabulary + 2 * MARGIN), float("nan"), dtype=values.dtype)
    view = memory[..., MARGIN:-MARGIN]
    view.copy_(values)
    return view


def _nothing_else_written(view: Tensor) -> bool:
    memory = view._base
    assert memory is not None
    return bool(memory[..., :MARGIN].isnan().all() and memory[..., -MARGIN:].isnan().all())


def test_margins_of_nan_change_nothing(divergence: str, dtype: torch.dtype) -> None:
    op = torch.ops.fused_kd
    temperature = torch.tensor(2.0, dtype=torch.float64)
    numbers = (DIVERGENCES.index(divergence), temperature, 0.3, True, 0.1)
    for vocabulary in VOCABULARIES:
        student = (3 * torch.randn(N, 1, vocabulary)).to(dtype)
        teacher = (3 * torch.randn(N, 1, vocabulary)).to(dtype)
        rest = (None, torch.randint(vocabulary, (N,)), torch.rand(N), torch.rand(N))
        *want, grad = op.forward_backward.default(student, teacher, *rest, *numbers)
        assert not grad.isnan().any()
        padded, padded_teacher = _margins(student), _margins(teacher)
        arguments = (padded, padded_teacher, *rest)
        *got, other = op.forward_backward.default(*arguments, *numbers)
        assert torch.equal(other, grad), vocabulary
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b), vocabulary
        into, scale = _margins(grad), torch.tensor(0.75)
        op.rescale_.default(*arguments, got[2], *numbers, scale, into)
        scaled = grad.clone()
        op.rescale_.default(student, teacher, *rest, want[2], *numbers, scale, scaled)
        for narrow in {dtype} if dtype != torch.float32 else set(DTYPES):
            place = _margins(torch.zeros_like(grad, dtype=narrow))
            op.forward_backward_into.default(*arguments, *numbers, place)
            assert torch.equal(place, grad.to(narrow)), vocabulary
            assert _nothing_else_written(place), vocabulary
        op.forward_backward_.default(*arguments, *numbers)
        assert torch.equal(padded, grad), vocabulary
        assert torch.equal(into, scaled), vocabulary
        assert all(map(_nothing_else_written, (padded, padded_teacher, into))), vocabulary


def _guarded(values: Tensor, side: str) -> Tensor:
    copy = guarded(values.numel(), values.dtype, side)
    return copy.copy_(values.flatten()).view(values.shape)


def _classes(vocabulary: int, turn: int) -> tuple[Tensor, Tensor]:
    """Return the logits (1, N, K+1) of a top-k teacher's classes, and ids (N, K); some outside."""
    k = min(vocabulary, (0, 1, 7, 40)[turn // 5 % 4])
    token_ids = torch.rand(N, vocabulary).argsort(1)[:, :k].to(torch.int32)
    token_ids[:, 2::3] = (-1, vocabulary, 2**31 - 1, -(2**31))[turn % 4]
    return torch.randn(1, N, k + 1), token_ids


def walk_along_guard_pages() -> None:
    # Runs in another process: every tensor ends, or begins, at a page that can't be touched.
    torch.set_num_threads(1)
    op = torch.ops.fused_kd
    info = cpu.build_info()
    assert info is not None
    from fused_kd import _C

    sets = info["instruction_sets"]
    assert isinstance(sets, dict)
    turn = 0
    for isa in (name for name, runs in sets.items() if runs):
        _C.choose_instruction_set(isa)
        for side in ("after", "before"):
            for vocabulary in VOCABULARIES:
                for dtypes in ((a, b) for a in DTYPES for b in DTYPES):
                    turn += 1
                    number = torch.tensor([1.0, 2.0, 3.0][turn % 3], dtype=torch.float64)
                    temperature = _guarded(number, side).view(())
                    numbers = (turn % 5, temperature, 0.3, True, 0.1)
                    rows = [torch.randn(1, N, vocabulary).to(dtype) for dtype in dtypes]
                    if turn % 4 == 0:
                        rows[0][..., ::2] = -float("inf")
                    rest = (torch.randint(vocabulary, (N,)), torch.rand(N), torch.rand(N))
                    if turn % 3 == 0:  # kept and out of range: NaN, and never read
                        rest[0][turn % N] = (-100, -4000, vocabulary + 4000)[turn // 3 % 3]
                    token_ids = None
                    if dtypes[1] == torch.float32 and turn % 5 < 4 and turn % 7 < 5:
                        rows[1], token_ids = _classes(vocabulary, turn)
                    inputs = [
                        x if x is None else _guarded(x, side) for x in (*rows, token_ids, *rest)
                    ]
                    *_, stats, grad = op.forward_backward.default(*inputs, *numbers)
                    assert stats.shape == (N, ops.STATS)
                    into, stats = _guarded(grad, side), _guarded(stats, side)
                    for factor in (0.75, 4 / 3):  # computed again in 16 bits, else multiplied
                        scale = _guarded(torch.tensor([factor]), side)
                        op.rescale_.default(*inputs, stats, *numbers, scale, into)
                    op.scale_.default(into, _guarded(torch.tensor([0.75]), side))
                    if dtypes[0] == torch.float32:
                        into = _guarded(grad.to(dtypes[1]), side)
                        op.forward_backward_into.default(*inputs, *numbers, into)
                        assert torch.equal(into.isnan(), grad.isnan())
                    op.forward_backward_.default(*inputs, *numbers)
                    assert torch.equal(inputs[0].nan_to_num(7.0), grad.nan_to_num(7.0))
    print("walked")


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages by mprotect: Linux")
def test_guard_pages() -> None:
    code = "import test_bounds; test_bounds.walk_along_guard_pages()"
    assert passes(run_python("-c", code, PYTHONPATH=PATH)) == "walked\n"


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages by mprotect: Linux")
@pytest.mark.parametrize(("side", "offset"), [("after", 4), ("before", -1)])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_guard_page_notices(side: str, offset: int) -> None:
    # The test above relies on it: an access next to the tensor ends the process.
    address = guarded(1, torch.float32, side).data_ptr() + offset
    if (child := os.fork()) == 0:
        faulthandler.disable()
        _ = ctypes.c_char.from_address(address).value
        os._exit(0)
    assert os.waitpid(child, 0)[1] != 0  # a signal, or the status of the address sanitizer
