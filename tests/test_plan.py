"""plan() against what torch allocates, the memory contract of heads, and the command line."""

from __future__ import annotations

import itertools
import runpy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.backends import needs_cpu
from torch import Tensor

from fused_kd import Head, kd_loss
from fused_kd.engines import driver
from fused_kd.engines.products import TILE_BYTES, CompiledProducts, TorchProducts, products_for
from fused_kd.options import MIB
from fused_kd.plan import Plan, levels, plan
from fused_kd.plan.__main__ import byte_count, main
from fused_kd.plan.models import MODELS
from fused_kd.testing import cpu_peak, eager_kd_loss

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
#: The promise is budget + 8 MiB; at these sizes that would hide a copy of the hidden states.
SLACK = 256 * 1024


@pytest.fixture(params=["as chosen", "torch"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return "as chosen", or "torch": the products are then those without the compiled module."""
    if request.param == "torch":
        for module in (driver, levels):
            monkeypatch.setattr(module, "products_for", lambda *_: TorchProducts())
    return str(request.param)


def unseen_bytes(products: str, elements: int = 0) -> int:
    """Return the bytes that these products allocate outside torch's allocator.

    With kept gradients, those of a 16-bit weight gradient of so many elements too.
    """
    chosen = products_for("auto", torch.device("cpu"), torch.float32)
    if products == "torch" or not isinstance(chosen, CompiledProducts):
        return 0
    return chosen.fixed_bytes() + chosen.sum_bytes(elements)


def unseen_of(planned: Plan, shape: tuple[int, int, int, int], dtype: torch.dtype, p: str) -> int:
    """Return the bytes of a plan's peak that torch's allocator does not see."""
    memory = planned.heads.memory
    sums = dtype.itemsize == 2 and "gradient of the logits" in memory
    return unseen_bytes(p, shape[1] * shape[2] * sums) if "products" in memory else 0


def make(rows: int, vocab: int, student: int, teacher: int, dtype: torch.dtype) -> Tensors:
    """Return hidden states and head of the student (leaves), those of the teacher, and labels."""
    shapes = ((rows, student), (vocab, student), (rows, teacher), (vocab, teacher))
    hidden, weight, *rest = (torch.randn(shape).to(dtype) for shape in shapes)
    labels = torch.randint(vocab, (rows,))
    return hidden.requires_grad_(), weight.requires_grad_(), *rest, labels


def eager(*tensors: Tensor) -> Tensor:
    hidden, weight, teacher_hidden, teacher_weight, labels = tensors
    teacher = F.linear(teacher_hidden, teacher_weight)
    return eager_kd_loss(F.linear(hidden, weight), teacher, labels, temperature=2.0)


def logits(*tensors: Tensor, inplace: bool = False) -> Tensor:
    hidden, weight, teacher_hidden, teacher_weight, labels = tensors
    teacher = F.linear(teacher_hidden, teacher_weight)
    student = F.linear(hidden, weight)
    return kd_loss(student, teacher, labels, temperature=2.0, inplace=inplace)


def heads(*tensors: Tensor, bias: Tensor | None = None, **keywords: Any) -> Tensor:
    hidden, weight, teacher_hidden, teacher_weight, labels = tensors
    teacher = Head(teacher_hidden, teacher_weight, None if bias is None else bias.detach())
    student = Head(hidden, weight, bias)
    return kd_loss(student, teacher, labels, temperature=2.0, **keywords)


def step_peak(loss_of: Callable[..., Tensor], tensors: Tensors, **keywords: Any) -> int:
    """Return the most bytes beyond the inputs during one forward and backward."""
    for x in tensors[:2]:
        x.grad = None
    return cpu_peak(lambda: loss_of(*tensors, **keywords).backward()).highest


def assert_close(parts: dict[str, int], measured: int) -> None:
    predicted = sum(parts.values())
    assert abs(predicted - measured) <= 0.05 * measured, (parts, predicted / MIB, measured / MIB)


# the peak is in the loss, since the logits are largest; in the heads' gradients, since those are
SHAPES = [(64, 8192, 32, 64), (32, 8192, 256, 64)]


# large enough for 5 % to include what torch's 16-bit products allocate: up to 0.4 MiB on a
# processor that has such products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], (32, 16384, 512, 64)], ids=str)
def test_whole_logits_peak_within_5_percent(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    planned, tensors = plan(*shape, dtype), make(*shape, dtype)
    assert_close(planned.eager.memory, step_peak(eager, tensors))
    assert_close(planned.logits.memory, step_peak(logits, tensors))
    assert_close(planned.logits_inplace.memory, step_peak(logits, tensors, inplace=True))


# gradients in the forward; converted operands; gradients in the backward, logits computed twice
# one chunk; several, the chunk the smaller part
@pytest.mark.parametrize("budget", [None, 9 * MIB])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_heads_peak_within_5_percent(
    shape: tuple[int, int, int, int], budget: int | None, dtype: torch.dtype, products: str
) -> None:
    planned = plan(*shape, dtype, budget)
    measured = step_peak(heads, make(*shape, dtype), memory_budget=budget)
    unseen = unseen_of(planned, shape, dtype, products)
    assert_close(planned.heads.memory, measured + unseen)


def test_heads_peak_with_a_narrow_accumulator_within_5_percent(products: str) -> None:
    narrow = {"grad_accum_dtype": torch.bfloat16}
    for shape in SHAPES:
        planned = plan(*shape, torch.bfloat16, 9 * MIB, **narrow)
        tensors = make(*shape, torch.bfloat16)
        measured = step_peak(heads, tensors, memory_budget=9 * MIB, **narrow)
        unseen = unseen_of(planned, shape, torch.bfloat16, products)
        assert_close(planned.heads.memory, measured + unseen)


# automatic; budgets of a few rows and of nearly all; not a multiple of anything
@pytest.mark.parametrize("budget", [None, 9 * MIB, 11 * MIB + 12345, 33 * MIB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_height_is_the_drivers(
    budget: int | None, dtype: torch.dtype, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heights: list[int] = []

    class Stop(Exception):
        pass

    def spy(problem: Any, products: Any, height: int, *rest: Any) -> None:
        heights.append(height)
        raise Stop

    monkeypatch.setattr(driver, "chunk_of", spy)
    shape = (301, 8192, 512, 768)
    with pytest.raises(Stop):
        heads(*make(*shape, dtype), memory_budget=budget)
    planned = plan(*shape, dtype, budget)
    assert heights == [planned.chunk_rows]
    assert planned.chunks == -(-301 // planned.chunk_rows)


@needs_cpu
def test_chunks_use_the_memory_of_the_weight_gradient() -> None:
    # H/4 rows of a bfloat16 head, whatever the budget; and no more memory than with fewer rows.
    shape = (500, 8192, 512, 64)
    few, many = (plan(*shape, torch.bfloat16, budget) for budget in (3 * MIB, 5 * MIB))
    for planned in (few, many):
        assert planned.reason == "weight gradient"
        assert planned.chunk_rows == 125  # 4 equal chunks of at most 128
    peaks = []
    for chunk in ({"memory_budget": 5 * MIB}, {"chunk_rows": 32}):
        peaks.append(step_peak(heads, make(*shape, torch.bfloat16), **chunk))
    assert peaks[0] <= peaks[1] + SLACK


def plain(tensors: Tensors, budget: int) -> Tensor:
    return heads(*tensors, memory_budget=budget)


def ignored(tensors: Tensors, budget: int) -> Tensor:
    tensors[4][::5] = -100
    return plain(tensors, budget)


def biases(tensors: Tensors, budget: int) -> Tensor:
    bias = torch.zeros(len(tensors[1]), dtype=tensors[1].dtype, requires_grad=True)
    return heads(*tensors, bias=bias, memory_budget=budget)


def frozen(tensors: Tensors, budget: int) -> Tensor:
    return plain((tensors[0], tensors[1].detach(), *tensors[2:]), budget)


def no_hidden(tensors: Tensors, budget: int) -> Tensor:
    return plain((tensors[0].detach(), *tensors[1:]), budget)


def rows_alone(tensors: Tensors, budget: int) -> Tensor:
    return heads(*tensors, memory_budget=budget, reduction="none").sum()


def slices(tensors: Tensors, budget: int) -> Tensor:
    """Return the loss of rows that do not fold into one dimension."""
    hidden, weight, teacher_hidden, teacher_weight, labels = tensors
    h, t, y = (x.unflatten(0, (4, -1))[:, 1:] for x in (hidden, teacher_hidden, labels))
    return heads(h, weight, t, teacher_weight, y, memory_budget=budget)


def narrow_sum(tensors: Tensors, budget: int) -> Tensor:
    return heads(*tensors, memory_budget=budget, grad_accum_dtype=tensors[1].dtype)


def autocast(tensors: Tensors, budget: int) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plain(tensors, budget)


#: Hidden sizes of half the vocabulary, so that a copy of hidden states would show.
CONTRACT = (1000, 1024, 512, 512)
# several chunks with the compiled products, and with torch's, whose tiles take 8 MiB
SMALL, LARGE = 5 * MIB, 11 * MIB
BFLOAT16, CASES = torch.bfloat16, [plain, ignored, biases, frozen, no_hidden, rows_alone, slices]
RUNS = [
    *(("as chosen", case, SMALL, BFLOAT16) for case in [*CASES, narrow_sum]),
    *(("as chosen", plain, LARGE, dtype) for dtype in (torch.float32, BFLOAT16, torch.float16)),
    *(("as chosen", case, SMALL, torch.float32) for case in (plain, ignored, autocast)),
    *(("torch", case, LARGE, BFLOAT16) for case in (plain, ignored, narrow_sum)),
    *(("torch", case, LARGE, torch.float32) for case in (plain, ignored, autocast)),
]


def allowed(tensors: Tensors, budget: int, narrow: bool = False) -> int:
    """Return the bytes of gradients, one accumulator, and the larger of budget and rounded head."""
    hidden, weight = tensors[:2]
    total = weight.nbytes if narrow else weight.numel() * 4
    rounded = 0 if total == weight.nbytes else weight.nbytes
    return hidden.nbytes + total + max(budget, rounded) + SLACK


# the products, the loss, the budget in bytes, the dtype
@pytest.mark.parametrize(("products", "case", "budget", "dtype"), RUNS, indirect=["products"])
def test_the_budget_is_kept(
    products: str, case: Callable[[Tensors, int], Tensor], budget: int, dtype: torch.dtype
) -> None:
    tensors = make(*CONTRACT, dtype)
    seen = budget - unseen_bytes(products)
    limit = allowed(tensors, seen, narrow=case is narrow_sum)
    if case is narrow_sum:  # a tile of the sum before it is rounded, and what it is added to
        limit += 2 * TILE_BYTES - SLACK
    if case is frozen:
        limit = tensors[0].nbytes + seen + SLACK
    peak = cpu_peak(lambda: case(tensors, budget).backward()).highest
    if case is slices:  # the gradient by a slice is copied into the whole
        limit += tensors[0].nbytes
    assert peak <= limit, (peak / MIB, limit / MIB)


def test_one_chunk_needs_no_accumulator(products: str) -> None:
    tensors = make(64, 8192, 1024, 512, torch.bfloat16)
    hidden, weight = tensors[:2]
    chunk = 8 * 64 * 8192
    peak = cpu_peak(lambda: plain(tensors, 64 * MIB).backward()).highest
    tiles = 4 * TILE_BYTES  # of weights that torch's products widen, and of the gradient
    assert peak <= hidden.nbytes + weight.nbytes + chunk + tiles + SLACK
    assert (
        tiles < weight.nbytes + weight.numel() * 4 - weight.nbytes - chunk
    )  # it would be measurable


# a view of the rows; gathered rows; a layout that is copied chunk by chunk
@pytest.mark.parametrize("kind", ["plain", "ignored", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_budget_is_kept_with_teacher_logits(
    dtype: torch.dtype, kind: str, products: str
) -> None:
    tensors = make(*CONTRACT, dtype)
    hidden, weight, *_, labels = tensors
    budget = LARGE if products == "torch" else SMALL
    teacher = torch.randn(1024, 1000).to(dtype).t()
    if kind != "transposed":
        teacher = teacher.contiguous()
    if kind == "ignored":
        labels[::5] = -100

    def step() -> None:
        loss = kd_loss(Head(hidden, weight), teacher, labels, memory_budget=budget)
        loss.backward()

    assert cpu_peak(step).highest <= allowed(tensors, budget - unseen_bytes(products))


def test_the_value_alone_needs_the_budget_alone(products: str) -> None:
    tensors = make(*CONTRACT, torch.bfloat16)
    with torch.no_grad():
        peak = cpu_peak(lambda: plain(tensors, LARGE)).highest
    assert peak + unseen_bytes(products) <= LARGE + SLACK


def llama(**keywords: Any) -> Plan:
    return plan(8192, 128256, 2048, 4096, **keywords)


def test_work_is_that_of_four_products_and_float16_makes_the_logits_twice() -> None:
    for level in llama().levels.values():
        assert level.flop == 2 * 8192 * 128256 * (3 * 2048 + 4096)
    again = 2 * 8192 * 128256 * (2048 + 4096)
    half, full = llama(dtype=torch.float16), llama()
    assert half.heads.flop == full.heads.flop + again
    assert half.logits.flop == full.logits.flop


def test_the_reason_for_the_height() -> None:
    assert llama().reason == "automatic"
    assert llama(memory_budget=64 * MIB).reason == "memory_budget"
    assert llama(memory_budget=2**40).reason == "rows"
    assert plan(16, 1000, 8, 8).reason == "rows"
    assert plan(8192, 2**20, 8, 8).reason == "floor"


def test_more_budget_means_fewer_chunks_and_less_traffic() -> None:
    plans = [llama(memory_budget=n * MIB) for n in (64, 256, 1024)]
    for small, large in itertools.pairwise(plans):
        assert small.chunks > large.chunks
        assert small.heads.traffic > large.heads.traffic
        assert small.weight_gradient_share > large.weight_gradient_share


# arguments and what the message names
@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"rows": 0}, ValueError, "rows must be at least 1; got 0"),
        ({"vocab": 1.5}, TypeError, "vocab must be an int; got 1.5"),
        ({"hidden_student": None}, TypeError, "hidden_student must be an int; got None"),
        ({"hidden_teacher": True}, TypeError, "hidden_teacher must be an int; got True"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float32, bfloat16.*; got torch.int8"),
        ({"memory_budget": -1}, ValueError, "memory_budget must be at least 1; got -1"),
        ({"memory_budget": 10**4}, ValueError, "memory_budget must hold at least one row"),
        ({"grad_accum_dtype": torch.float16}, ValueError, "must be torch.float32 or the dtype"),
        ({"device": "nothing"}, ValueError, "device must be a torch device; got 'nothing'"),
    ],
)
def test_bad_arguments(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"rows": 8, "vocab": 1000, "hidden_student": 8, "hidden_teacher": 8} | changed
    with pytest.raises(kind, match=message):
        plan(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU")
def test_a_gpu_that_is_not_here_needs_a_budget() -> None:
    with pytest.raises(ValueError, match=r"device must be on this machine.*got 'cuda'"):
        llama(device="cuda")
    assert llama(device="cuda", memory_budget=2**30).chunks > 1


LLAMA = ["--model-like", "llama-3.2-1b", "--teacher-like", "llama-3.1-8b"]


def test_the_command_prints_levels_parts_and_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LLAMA, "--memory-budget", "256MiB"]) == 0
    text = capsys.readouterr().out
    planned = llama(memory_budget=256 * MIB)
    assert "8192 rows, V = 128256, H = 2048 (student) and 4096 (teacher), bfloat16, cpu" in text
    for level in planned.levels.values():
        assert levels.shown(level.peak) in text
        assert all(part in text for part in level.memory)
    assert f"chunks of {planned.chunk_rows} rows, what memory_budget=256 MiB allows" in text
    assert f"{planned.chunks} in all" in text
    assert "Least memory: heads" in text


def test_numbers_override_models_and_padding_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--vocab", "1000", "--hidden-student", "8", "--rows", "16", "--dtype", "float32"])
    assert "V = 1000, H = 8 (student) and 8 (teacher), float32" in capsys.readouterr().out
    main(["--model-like", "Qwen3-0.6B", "--teacher-like", "qwen2.5-7b", "--hidden-teacher", "64"])
    text = capsys.readouterr().out
    assert "152064 rows are cut to 151936" in text
    assert "V = 151936, H = 1024 (student) and 64 (teacher)" in text


# what was typed, and what the message says
@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--model-like", "nonesuch"], "unknown model 'nonesuch'; known: llama-2-7b"),
        (["--rows", "8"], "pass --model-like, or --vocab and --hidden-student"),
        ([*LLAMA, "--memory-budget", "lots"], "expected bytes such as 256MiB"),
        ([*LLAMA, "--memory-budget", "1kB"], "memory_budget must hold at least one row"),
        ([*LLAMA, "--rows", "0"], "rows must be at least 1; got 0"),
        ([*LLAMA, "--hidden-teacher", "0"], "hidden_teacher must be at least 1; got 0"),
        (["--model-like", "gpt2", "--teacher-like", "phi-4"], "need the same tokenizer"),
    ],
)
def test_what_the_command_refuses(
    typed: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(typed)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_byte_counts() -> None:
    texts = {"256MiB": 2**28, "1.5 GiB": 3 * 2**29, "2gb": 2 * 10**9, "12345": 12345}
    assert {text: byte_count(text) for text in texts} == texts


def test_every_model_has_a_plan() -> None:
    for vocab, hidden in MODELS.values():
        assert plan(4096, vocab, hidden, hidden).heads.peak > 0


def test_python_m_helps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", "--help"])
    monkeypatch.delitem(sys.modules, "fused_kd.plan.__main__")
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("fused_kd.plan", run_name="__main__")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "--memory-budget" in text
    assert "llama-3.2-1b" in text
