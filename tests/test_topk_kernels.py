"""The CPU kernels of a top-k teacher, on every instruction set of this processor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support.backends import formula_of, needs_cpu, one_thread, threads
from support.logits import identical, rows_and_gradient, scalar_and_gradient
from support.topk import PAIRS, with_topk
from torch import Tensor

from fused_kd import TopK
from fused_kd.backends import named
from fused_kd.checks import mass_slack
from fused_kd.classes import Classes, _in_one_pass, _step_by_step, classes_of
from fused_kd.testing import Inputs, assert_obeys_error_rule, make_inputs

pytestmark = needs_cpu

INF, NAN = math.inf, math.nan
SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
BLOCK = 2048
#: Two blocks and a part of one that is no whole number of vectors.
V = 2 * BLOCK + 64 + 5
#: The first and the last entries of blocks and of the row.
ENDS = [0, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, V - 1]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def at_the_ends(inputs: Inputs) -> Inputs:
    """Return inputs whose teacher has its largest logits at the ends of blocks."""
    assert isinstance(inputs.teacher, Tensor)
    teacher = inputs.teacher.float()
    teacher[:, ENDS] = teacher.masked_fill(teacher == -INF, 0.0).amax(1, keepdim=True) + 1
    return inputs._replace(teacher=teacher)


# T: the tail's sum is the hard term's (1), or its powers are (2, 4), or there are two exponentials;
# the tokens are left out by a low logit, of which the sums are corrected at 4, but not at 8 and 0.1
CONFIGURATIONS = list(
    zip(
        ["language_model", "confident", "shifted", "range_400", "inf_columns", "huge", "inf_first"],
        [SINGLE, BRAIN, HALF, BRAIN, SINGLE, BRAIN, SINGLE],
        [1.0, 2.0, 4.0, 3.7, 8.0, 1.0, 0.1],
        strict=True,
    )
)


@pytest.mark.parametrize("i", range(len(CONFIGURATIONS)))
def test_error_rule(isa: str, i: int) -> None:
    regime, dtype, temperature = CONFIGURATIONS[i]
    for tail, name in PAIRS[i % 4 :: 4]:
        inputs = at_the_ends(make_inputs(regime, 2, V, dtype, torch.float32, seed=i))
        inputs = with_topk(inputs, 40, tail, temperature)
        keywords: dict[str, Any] = {"temperature": temperature, "beta": 0.3}
        keywords["label_smoothing"] = 0.1 * (i % 2)
        upstream = torch.tensor([1.0, -300.0])
        assert_obeys_error_rule(inputs, upstream, backend="cpu", divergence=name, **keywords)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 4.9, 30.0])
@pytest.mark.parametrize("left", [0, 5])
def test_a_block_full_of_tokens_leaves_no_trace_in_the_tail(
    isa: str, left: int, temperature: float
) -> None:
    # The first block has the tail's reference. In the second, `left` entries are in the tail, far
    # below; all others are tokens, which the low logits stand for.
    student = torch.randn(1, 2 * BLOCK)
    student[:, BLOCK:] -= 11 * temperature
    student[:, :BLOCK] -= 20 * temperature
    student[:, 0] += 20 * temperature
    ids = torch.arange(BLOCK + left, 2 * BLOCK)[None]
    # a mass that the tail does not have: the gradient there is of the size of the tail's share
    topk = TopK(ids, torch.full(ids.shape, 0.5 / ids.numel()).log(), torch.tensor([0.5]).log())
    topk = topk._replace(temperature=temperature)
    keywords = {"temperature": temperature, "hard_weight": 0, "soft_weight": 1}
    got = rows_and_gradient(student, topk, backend="cpu", **keywords)
    want = rows_and_gradient(student.double(), topk, **keywords)
    torch.testing.assert_close(got[0].double(), want[0], rtol=4e-6, atol=0.0)
    in_the_tail = slice(0, BLOCK + left)
    torch.testing.assert_close(
        got[1].double()[:, in_the_tail], want[1][:, in_the_tail], rtol=2e-5, atol=0.0
    )


# ------------------------------------------------------------------------------ the same bits


def _inputs(dtype: torch.dtype, rows: int, vocabulary: int, k: int, temperature: float) -> Inputs:
    inputs = make_inputs("language_model", rows, vocabulary, dtype, torch.float32)
    teacher = inputs.teacher
    assert isinstance(teacher, Tensor)
    # the first block is below the others, so that the reference rises
    teacher[:, :BLOCK] -= 6
    inputs.student[:, :BLOCK] -= 6
    return with_topk(inputs._replace(teacher=teacher), k, "bucket", temperature)


def _everything(inputs: Inputs, number: int, **keywords: Any) -> Any:
    """Compute on `number` threads; return row losses and gradient, then sum and its gradient."""
    keywords |= {"backend": "cpu"}
    with threads(number):
        rows = rows_and_gradient(*inputs, **keywords)
        return *rows, *scalar_and_gradient(*inputs, reduction="sum", **keywords)


# (N, V, K): the vocabulary split (one segment is 32768); the same, more rows; rows split
@pytest.mark.parametrize("shape", [(1, 33_001, 300), (3, 32_800, 40), (9, 4_100, 40)])
def test_the_threads_change_no_bit(
    isa: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    temperature = 1.0 if dtype == BRAIN else 4.0
    inputs = _inputs(dtype, *shape, temperature)
    want, got = (_everything(inputs, number, temperature=temperature) for number in (1, 2))
    identical(got, want)
    # the gradient of the forward is that of the backward, from the statistics
    assert torch.equal(want[1], want[3])


def test_a_row_has_the_same_bits_alone(isa: str) -> None:
    inputs = _inputs(BRAIN, 9, 33_000, 40, 2.0)
    assert isinstance(inputs.teacher, TopK)
    batch = _everything(inputs, 2, temperature=2.0)
    for row in (0, 8):
        part = slice(row, row + 1)
        one = Inputs(inputs.student[part], inputs.teacher.rows(part), inputs.labels[part])
        alone = _everything(one, 2, temperature=2.0)
        for index in (0, 1, 3):
            assert torch.equal(batch[index][part], alone[index])


# ----------------------------------------------------------- in place, strided, and odd rows


def same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Assert that the tensors of two sequences have equal values, or NaN, everywhere."""
    identical(*([x.float().nan_to_num(7e37) for x in tensors] for tensors in (got, want)))


class Rows:
    """Arguments of a backend's row kernels: some rows with the classes of a top-k teacher.

    Both terms have the weights 0.5 and 0.25 in all rows, which a test changes before its calls.
    """

    def __init__(self, inputs: Inputs, **keywords: Any) -> None:
        assert isinstance(inputs.teacher, TopK)
        rows, self.vocabulary = inputs.student.shape
        classes, _ = classes_of(inputs.teacher, self.vocabulary, torch.float32)
        logits = classes.logits.view(1, rows, -1).clone()
        self.classes = Classes(logits, classes.token_ids.clone())
        self.student, self.labels = inputs.student[None].clone(), inputs.labels.clone()
        self.w_hard, self.w_soft = torch.full((rows,), 0.5), torch.full((rows,), 0.25)
        self.formula = formula_of(**keywords)

    def arguments(
        self, student: Tensor | None = None, part: slice = slice(None)
    ) -> tuple[Any, ...]:
        """Return the arguments of the rows `part`, with `student` (1, N, V) in place of ours."""
        student = self.student if student is None else student
        classes = Classes(self.classes.logits[:, part], self.classes.token_ids[part])
        vectors = (self.labels[part], self.w_hard[part], self.w_soft[part])
        return student[:, part], classes, *vectors, self.formula

    def check_bits(self) -> list[Tensor]:
        """Assert that all ways to the gradient give the same bits.

        Returns:
            Hard and soft terms, and the gradient.
        """
        cpu = named("cpu")
        hard, soft, stats, grad = cpu.forward_backward(*self.arguments())
        # rows of a larger tensor, of which nothing else may change
        memory = torch.full((1, len(self.labels), self.vocabulary + 7), 7.0).to(grad.dtype)
        over = memory[..., 3:-4].copy_(self.student)
        ways: list[tuple[Tensor, ...]] = [cpu.forward_backward(*self.arguments(over), inplace=True)]
        assert ways[0][3].data_ptr() == over.data_ptr()
        assert (memory[..., :3] == 7).all()
        assert (memory[..., -4:] == 7).all()
        *vectors, formula = self.arguments()
        ways.append((hard, soft, stats, cpu.backward(*vectors, stats, formula)))
        over = over.clone().copy_(self.student)
        again = cpu.backward(over, *vectors[1:], stats, formula, inplace=True)
        ways.append((*cpu.forward(*self.arguments()), again))
        for way in ways:
            same(way, (hard, soft, stats, grad))
        return [hard, soft, grad[0]]

    def exact(self) -> list[Tensor]:
        """Return the same by the reference in float64."""
        call = self.arguments(self.student.double())
        hard, soft, _, grad = named("reference").forward_backward(*call)
        return [hard, soft, grad[0]]


@pytest.mark.parametrize("regime", ["language_model", "range_400", "inf_columns"])
def test_in_place_changes_no_bit(isa: str, regime: str, dtype: torch.dtype) -> None:
    # Tokens of any logit, which in place are overwritten before the row is read: -inf, far below
    # the others and far above.
    inputs = at_the_ends(make_inputs(regime, 3, V, dtype, torch.float32))
    for i, temperature in enumerate((1.0, 4.0, 8.0, 0.1)):
        call = with_topk(inputs, 40, "bucket", temperature)
        assert isinstance(call.teacher, TopK)
        for row, logit in enumerate((-INF, -900.0, 900.0)):
            call.student[row, call.teacher.token_ids[row, : 20 * row + 1]] = logit
        smoothing = 0.1 * (i % 2)
        rows = Rows(call, temperature=temperature, divergence="jsd", label_smoothing=smoothing)
        assert not rows.check_bits()[2].isnan().any()


def odd_rows(dtype: torch.dtype, vocabulary: int, tail: str, **keywords: Any) -> Rows:
    """Return rows of which each is special, but for the first."""
    inputs = at_the_ends(make_inputs("language_model", 17, vocabulary, dtype, torch.float32))
    rows = Rows(with_topk(inputs, 12, tail, keywords["temperature"]), **keywords)
    logits, token_ids = rows.classes.logits[0], rows.classes.token_ids
    in_support = torch.zeros(17, vocabulary).scatter(1, token_ids.clamp(min=0).long(), 1.0).bool()
    student, first = rows.student[0], token_ids[:, 0]
    rows.w_soft[1] = 0  # hard only
    rows.w_hard[2] = 0
    rows.w_hard[3] = rows.w_soft[3] = 0
    student[4, 5] = NAN
    student[5, first[5]] = NAN
    student[6, first[6]] = INF
    student[7] = -INF
    rows.labels[8] = vocabulary
    logits[9], token_ids[9] = NAN, -1  # refused by a check of values that could not be made
    logits[10, :-1], logits[10, -1], token_ids[10] = -INF, 0, -1  # no entry
    student[11, first[11]] = -INF
    student[12, ~in_support[12]] = -INF
    student[13, in_support[13]] = -INF
    rows.labels[14] = first[14]
    rows.labels[15] = in_support[15].logical_not().nonzero()[-1, 0]
    student[15, rows.labels[15]] = -INF
    # entries masked by the lowest number: of the support, alone in its block, and others
    student[16, first[16]] = torch.finfo(dtype).min
    student[3, 7] = student[1, 3] = NAN
    return rows


def test_odd_rows(dtype: torch.dtype) -> None:
    for i, (tail, name) in enumerate(PAIRS):
        keywords = {"divergence": name, "temperature": (1.0, 2.0, 3.0)[i % 3], "beta": 0.3}
        rows = odd_rows(dtype, V, tail, label_smoothing=0.1 * (i % 2), **keywords)
        for x, exact in zip(rows.check_bits(), rows.exact(), strict=True):
            rtol = {SINGLE: 2e-5, BRAIN: 2**-7, HALF: 2**-10}[x.dtype]
            smallest = 2**-24 if x.dtype == HALF else 1e-7
            want = exact.to(x.dtype).float()
            torch.testing.assert_close(x.float(), want, rtol=rtol, atol=smallest, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_odd_rows_split_over_threads(smoothing: float, dtype: torch.dtype) -> None:
    keywords = {"divergence": "forward_kl", "temperature": 2.0, "label_smoothing": smoothing}
    rows = odd_rows(dtype, 33_000, "bucket", **keywords)
    run = named("cpu").forward_backward
    for part in (slice(0, 7), slice(7, 12), slice(12, 17)):  # fewer than four for each thread
        for inplace in (False, True):
            results = []
            for number in (1, 2):
                with threads(number):
                    call = rows.arguments(rows.student.clone(), part)
                    results.append(run(*call, inplace=inplace))
            same(*results)


def test_a_gradient_of_16_bits_is_the_rounded_one(isa: str) -> None:
    rows = odd_rows(SINGLE, V, "bucket", divergence="reverse_kl", temperature=2.0)
    *_, want = named("cpu").forward_backward(*rows.arguments())
    for dtype in (BRAIN, HALF):
        out = torch.empty(want.shape, dtype=dtype)
        named("cpu").forward_backward(*rows.arguments(), out=out)
        same([out], [want.to(dtype)])


@pytest.mark.parametrize("scale", [0.3, 1e-30, 0.0, INF, NAN])
def test_a_rescaled_gradient(scale: float, dtype: torch.dtype) -> None:
    rows = odd_rows(dtype, V, "bucket", divergence="forward_kl", temperature=2.0)
    results = []
    for name, student in (("cpu", rows.student), ("reference", rows.student.double())):
        *vectors, formula = rows.arguments(student)
        *_, stats, grad = named(name).forward_backward(*rows.arguments(student))
        named(name).rescale(grad, torch.tensor(scale), *vectors, stats, formula)
        results.append(grad[0])
    got, want = results
    assert not got[3].any()  # neither term, regardless of the factor
    if not math.isfinite(scale):
        assert not got[0].isfinite().any()
        return
    smallest = torch.finfo(dtype).smallest_normal
    rtol = {SINGLE: 2e-5, BRAIN: 2**-7, HALF: 2**-10}[dtype]
    atol = 1e-7 * scale + (2**-24 if dtype == HALF else smallest)
    torch.testing.assert_close(
        got.float(), want.to(dtype).float(), rtol=rtol, atol=atol, equal_nan=True
    )


@pytest.mark.parametrize("teacher", ["dense", "top k"])
@pytest.mark.parametrize("columns", [slice(None), slice(1, None), slice(3, 2500)])
def test_the_lowest_number_of_float32_is_a_logit(columns: slice, teacher: str) -> None:
    # Masks of the lowest number, in all of a row too; -inf stands for nothing else in the sums.
    lowest = torch.finfo(SINGLE).min
    for vocabulary, k in ((1, 0), (1, 1), (2, 1), (2, 2), (3000, 2)):
        inputs = make_inputs("randn", 2, vocabulary)
        assert isinstance(inputs.teacher, Tensor)
        inputs.student[:, columns] = lowest
        if teacher == "dense":
            inputs.teacher[:, columns] = lowest
        else:
            inputs = with_topk(inputs, k)
        for smoothing in (0.0, 0.1):
            keywords: dict[str, Any] = {"divergence": "tvd", "label_smoothing": smoothing}
            got = rows_and_gradient(*inputs, backend="cpu", **keywords)
            double = inputs._replace(student=inputs.student.double())
            want = rows_and_gradient(*double, **keywords)
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y.float(), rtol=2e-5, atol=1e-7)


# ------------------------------------------------------------------- values drawn at random


def drawn_call(seed: int) -> tuple[Inputs, dict[str, Any]]:
    """Return inputs and keywords of a loss, drawn by a generator of this seed."""
    draw = torch.Generator().manual_seed(seed)

    def one_of(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=draw))]

    def happens(chance: float) -> bool:
        return bool(torch.rand((), generator=draw) < chance)

    rows, vocabulary = one_of(1, 2, 3), one_of(1, 2, 5, 23, 64, 100, 2048, 2080, 5000)
    k = min(vocabulary, one_of(0, 1, 2, 5, 16, 64, vocabulary))
    scale = one_of(0.1, 1.0, 5.0, 30.0)
    student, teacher = (scale * torch.randn(rows, vocabulary, generator=draw) for _ in range(2))
    student += one_of(0.0, 0.0, 0.0, 1e4, -300.0)
    largest = teacher.topk(k, -1).indices
    if happens(0.3):
        student.scatter_add_(1, largest, torch.full(largest.shape, one_of(-300.0, 300.0, 20.0)))
    if happens(0.3):
        student[:, int(torch.randint(vocabulary, (), generator=draw))] += one_of(20.0, 200.0)
    if happens(0.3):
        student[torch.rand(rows, vocabulary, generator=draw) < 0.2] = -INF
    if happens(0.2):
        student[0, int(torch.randint(vocabulary, (), generator=draw))] = one_of(NAN, INF, -INF)
    labels = torch.randint(vocabulary, (rows,), generator=draw)
    tail, name = one_of(*PAIRS)
    temperature = one_of(1.0, 1.0, 2.0, 4.0, 0.5, 3.7, 8.0, 0.1, 30.0)
    k = max(k, 1) if tail == "sampled" else k
    inputs = with_topk(Inputs(student, teacher, labels), k, tail, temperature)
    assert isinstance(inputs.teacher, TopK)
    if tail != "sampled" and happens(0.4):
        absent = torch.rand(inputs.teacher.logprobs.shape, generator=draw) < 0.3
        inputs.teacher.logprobs[absent] = -INF
    hard, soft = one_of((0.0, 1.0), (0.5, 0.5), (0.3, 0.9))
    keywords = {
        "divergence": name,
        "temperature": temperature,
        "beta": one_of(0.5, 0.1),
        "label_smoothing": one_of(0.0, 0.0, 0.1),
        "hard_weight": hard,
        "soft_weight": soft,
    }
    student = student.to(one_of(SINGLE, BRAIN, HALF))
    return inputs._replace(student=student), keywords


@pytest.mark.parametrize("part", range(4))
def test_any_values_obey_the_error_rule(part: int) -> None:
    for seed in range(30 * part, 30 * (part + 1)):
        inputs, keywords = drawn_call(seed)
        upstream = torch.full(inputs.labels.shape, 1024.0 if inputs.student.dtype == HALF else 1.5)
        try:
            if keywords["divergence"] != "tvd":  # its errors have one sign: too large in norm
                assert_obeys_error_rule(inputs, upstream, backend="cpu", **keywords)
            Rows(inputs, **keywords).check_bits()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {keywords}") from error


# ------------------------------------------------------------- the values checked, and the classes


def drawn_topk(seed: int) -> tuple[TopK, int, bool]:
    """Return a teacher of few entries, V, and whether one of its values must be refused."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    vocabulary, rows = 1 + draw(200), draw(7)
    k = draw(vocabulary + 1)
    logits = (1 + draw(20)) * torch.randn(rows, vocabulary, generator=generator)
    topk = TopK.from_logits(logits, k, [0.5, 1.0, 3.0][draw(3)])
    ids, logprobs, tails = topk.token_ids, topk.logprobs, topk.tail_logprob
    assert tails is not None
    if draw(2):
        logprobs[torch.rand(rows, k, generator=generator) < 0.3] = -INF
    if draw(4) == 0:
        logprobs[:1] = -INF
    ids[logprobs == -INF] = -7  # not read
    refused = rows > 0 and k > 1 and bool((logprobs[0, :2] > -INF).all()) and draw(3) == 0
    if refused:
        way = draw(4)
        if way == 0:
            ids[0, 0] = [vocabulary, -1, 2**31 - 1][draw(3)]
        elif way == 1:
            ids[0, 0] = ids[0, 1]
        else:
            logprobs[0, 0] = [NAN, INF][way - 2]
    topk = TopK(
        ids.int() if draw(2) else ids,
        logprobs.to([SINGLE, BRAIN, HALF][draw(3)]),
        tails.double() if draw(2) else tails,
        ["bucket", "renormalize", "zero"][draw(3)],
        topk.temperature,
    )
    return topk, vocabulary, refused


def test_the_classes_of_the_kernel_are_those_of_torch(isa: str) -> None:
    refusals = 0
    for seed in range(300):
        topk, vocabulary, refused = drawn_topk(seed)
        got = _in_one_pass(topk, vocabulary)
        assert (got is None) == refused
        refusals += refused
        if got is not None:
            want, _ = _step_by_step(topk, vocabulary, SINGLE, may_read=True)
            identical(got, want)
    assert refusals > 20


@pytest.mark.parametrize("over", [0.5, 2.0])  # of the slack
@pytest.mark.parametrize("k", [3, BLOCK + 5])
def test_the_kernel_adds_the_masses(isa: str, k: int, over: float) -> None:
    size = k + 1
    logprobs = torch.full((3, k), -math.log(size))
    tail = torch.full((3,), math.log1p(over * mass_slack(TopK(logprobs, logprobs)) * size))
    topk = TopK(torch.arange(k).expand(3, k), logprobs, tail - math.log(size))
    assert (_in_one_pass(topk, size + 5) is None) == (over > 1)


def test_the_operator_keeps_within_its_tensors() -> None:
    topk = TopK.from_logits(torch.randn(3, 20), 4)
    arguments: dict[str, Any] = {
        "logits": torch.empty(3, 5),
        "out_ids": torch.empty(3, 4, dtype=torch.int32),
        "token_ids": topk.token_ids,
        "logprobs": topk.logprobs,
        "tail_logprob": topk.tail_logprob,
        "tail": -INF,
        "vocabulary": 20,
        "temperature": 1.0,
        "slack": INF,
    }
    classes_ = torch.ops.fused_kd.classes_
    assert classes_(**arguments)
    wrong = {
        "logits": [torch.empty(3, 4), torch.empty(5, 3).T, torch.empty(3, 5, dtype=BRAIN)],
        "out_ids": [torch.empty(3, 4, dtype=torch.int64), torch.empty(2, 4, dtype=torch.int32)],
        "token_ids": [topk.token_ids[:2], topk.token_ids.short(), topk.token_ids[:, ::2]],
        "logprobs": [topk.logprobs.double(), topk.logprobs[0], topk.logprobs[:, :2]],
        "tail_logprob": [torch.zeros(2), torch.zeros(3, dtype=HALF), torch.zeros(6)[::2]],
        "vocabulary": [-1, 2**31 + 1],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(RuntimeError, match=name):
                classes_(**{**arguments, name: value})
    part = arguments["logits"].flatten()[:12].view(3, 4)
    with pytest.raises(RuntimeError, match="shares memory"):
        classes_(**{**arguments, "logprobs": part})
