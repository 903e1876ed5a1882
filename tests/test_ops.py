"""The registered operators: opcheck, schemas, and the checks that protect memory in C++."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.backends import needs_cpu
from support.logits import identical
from torch import Tensor

from fused_kd import ops
from fused_kd.backends import named, reference
from fused_kd.divergences import DIVERGENCES
from fused_kd.options import Formula, KDOptions, temperature_tensor

pytestmark = needs_cpu

B, S, V = 2, 3, 5
N = B * S
LAYOUTS = ("contiguous", "slice", "transposed")  # strides: collapsible; with a gap; inner > outer
# float32 and 16 bits read in place; mixed and half through float32 copies
DTYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
]
TERMS = ("both", "hard", "soft", "neither")
ROW_OPS = ("forward", "forward_backward", "forward_backward_", "forward_backward_into")
GRADIENT_OPS = ("backward", "backward_", "rescale_")


def op(name: str) -> Any:
    return getattr(torch.ops.fused_kd, name).default


def logits(dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    if layout == "slice":
        return torch.randn(B, S + 1, V).to(dtype)[:, :-1]
    if layout == "transposed":
        return torch.randn(S, B, V).to(dtype).transpose(0, 1)
    return torch.randn(B, S, V).to(dtype)


def rows(
    dtypes: tuple[torch.dtype, torch.dtype] = DTYPE_PAIRS[0],
    terms: str = "both",
    layout: str = "contiguous",
    k: int | None = None,
) -> list[Tensor | None]:
    """Return student, teacher, token_ids, labels, w_hard, w_soft; both weights of one row are 0.

    With `k` the teacher has logits of k+1 classes, and each row one absent token.
    """
    weights: list[Tensor | None] = [torch.rand(N), torch.rand(N)]
    for weight in weights:
        weight[1] = 0.0
    if terms in ("soft", "neither"):
        weights[0] = None
    if terms in ("hard", "neither"):
        weights[1] = None
    labels = None if weights[0] is None else torch.randint(V, (N,))
    if k is None:
        return [logits(dtypes[0], layout), logits(dtypes[1]), None, labels, *weights]
    token_ids = torch.rand(N, V).argsort(1)[:, :k].to(torch.int32)
    token_ids[:, -1:] = -1
    teacher = torch.randn(B, S, k + 1)
    teacher[..., k - 1 : k] = -torch.inf
    return [logits(dtypes[0], layout), teacher, token_ids, labels, *weights]


def formula(divergence: str = "forward_kl", smoothing: float = 0.1) -> Formula:
    return Formula(divergence, temperature_tensor(KDOptions(temperature=2.0)), 0.3, "t2", smoothing)


def numbers(divergence: str = "forward_kl", smoothing: float = 0.1) -> tuple[Any, ...]:
    """Return `formula` as the operators take it: code, temperature, beta, scale_t2, smoothing."""
    _, temperature, beta, _, _ = formula()
    return DIVERGENCES.index(divergence), temperature, beta, True, smoothing


def arguments(name: str, inputs: list[Any], divergence: str = "forward_kl") -> tuple[Any, ...]:
    """Return an operator's arguments for `rows()`; statistics and gradient are computed first."""
    numeric = numbers(divergence)
    if name == "forward_backward_into":
        return *inputs, *numeric, torch.zeros(B, S, V, dtype=inputs[STUDENT].dtype)
    if name in ROW_OPS:
        return *inputs, *numeric
    stats = op("forward")(*inputs, *numeric)[2]
    if name != "rescale_":
        return *inputs, stats, *numeric
    gradient = op("backward")(*inputs, stats, *numeric)
    return *inputs, stats, *numeric, torch.tensor(0.75), gradient


@pytest.mark.parametrize(
    "kind",
    [
        *({"layout": layout} for layout in LAYOUTS),
        *({"dtypes": dtypes} for dtypes in DTYPE_PAIRS[1:]),
        *({"terms": terms} for terms in TERMS[1:]),
        *({"k": k} for k in (0, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ROW_OPS + GRADIENT_OPS)
def test_opcheck(name: str, kind: dict[str, Any]) -> None:
    torch.library.opcheck(op(name), arguments(name, rows(**kind)))


@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
def test_opcheck_divergences(divergence: str) -> None:
    torch.library.opcheck(op("backward"), arguments("backward", rows(), divergence))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opcheck_a_gradient_of_16_bits(dtype: torch.dtype) -> None:
    into = torch.zeros(B, S + 1, V, dtype=dtype)[:, 1:]
    torch.library.opcheck(op("forward_backward_into"), (*rows(), *numbers(), into))


def test_opcheck_scale(dtype: torch.dtype) -> None:
    torch.library.opcheck(op("scale_"), (logits(dtype), torch.tensor(0.5)))


def test_every_operator_is_checked_here() -> None:
    names = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("fused_kd::")
    }
    # test_product, test_topk_kernels, test_metrics_ops, test_heads_ops
    elsewhere = {"product_", "classes_"}
    elsewhere |= {
        prefix + name for prefix in ops.PREFIXES for name in ("measure", "measure_support")
    }
    elsewhere |= {"chunked_losses", "chunked_gradients", "chunked_gradients_"}
    assert names == elsewhere | {
        prefix + name for prefix in ops.PREFIXES for name in (*ROW_OPS, *GRADIENT_OPS, "scale_")
    }


# operator, the arguments that it writes, the number of tensors that it returns
@pytest.mark.parametrize(
    ("name", "written", "returned"),
    [
        ("forward", [], 3),
        ("forward_backward", [], 4),
        ("forward_backward_", ["student"], 3),
        ("forward_backward_into", ["grad"], 3),
        ("backward", [], 1),
        ("backward_", ["student"], 0),
        ("rescale_", ["grad"], 0),
        ("scale_", ["grad"], 0),
    ],
)
def test_schema(name: str, written: list[str], returned: int) -> None:
    schema = op(name)._schema
    changed = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert changed == written
    assert len(schema.returns) == returned
    assert all(r.alias_info is None for r in schema.returns)
    for key in ("CPU", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, key)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("k", [None, 3])
def test_the_operators_agree(
    k: int | None, dtypes: tuple[torch.dtype, torch.dtype], layout: str
) -> None:
    inputs = rows(dtypes, layout=layout, k=k)
    student = inputs[0]
    assert student is not None
    *plain, grad = op("forward_backward")(*inputs, *numbers())
    versions = [grad, op("backward")(*inputs, plain[2], *numbers())]
    for name in ("forward_backward_", "backward_"):
        over = torch.empty_strided(student.shape, student.stride(), dtype=student.dtype)
        over.copy_(student)
        stats = () if name == "forward_backward_" else (plain[2],)
        again = op(name)(over, *inputs[1:], *stats, *numbers())
        versions.append(over)
        if again is not None:
            identical(again, plain)
    versions.append(logits(dtypes[0], layout))
    again = op("forward_backward_into")(*inputs, *numbers(), versions[-1])
    identical(again, plain)
    identical(op("forward")(*inputs, *numbers()), plain)
    assert not grad.isnan().any()
    for version in versions:
        assert torch.equal(version, grad)
    for scale in (torch.tensor(0.25), torch.tensor(-1.0)):
        into = grad.clone()
        op("scale_")(into, scale)
        assert torch.equal(into, grad * scale)
        again = grad.clone()
        op("rescale_")(*inputs, plain[2], *numbers(), scale, again)
        assert torch.equal(again, into)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
def test_a_rescaled_gradient_is_rounded_once(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    inputs, scale = rows(dtypes), torch.tensor(0.3)
    *_, stats, grad = op("forward_backward")(*inputs, *numbers())
    op("rescale_")(*inputs, stats, *numbers(), scale, grad)
    double = [x.double() if i in (0, 1) else x for i, x in enumerate(inputs)]
    weights = [x * scale for x in inputs[W_HARD:]]
    exact = reference.backward(*double[:TOKEN_IDS], inputs[LABELS], *weights, stats, formula())
    eps = torch.finfo(dtypes[0]).eps
    torch.testing.assert_close(grad.double(), exact, rtol=0.51 * eps, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_gradient_of_16_bits_is_the_rounded_one(
    backend: str, divergence: str, dtype: torch.dtype
) -> None:
    # Bit for bit, with a term that is off, an absent label, and rows that are not finite.
    run = named(backend).forward_backward
    for vocabulary, teacher_dtype in ((5, dtype), (64, torch.float32), (2111, torch.float32)):
        student, teacher = (3 * torch.randn(3, 4, vocabulary) for _ in range(2))
        student[0, 1, ::3] = teacher[0, 1, ::3] = -torch.inf
        student[0, 2, 1] = torch.nan
        labels = torch.randint(vocabulary, (12,))
        labels[1] = 0
        w_hard, w_soft = torch.rand(12), torch.rand(12)
        w_hard[4], w_soft[5], w_hard[6], w_soft[6] = 0, 0, 0, 0
        inputs = (student, teacher.to(teacher_dtype), labels, w_hard, w_soft, formula(divergence))
        *want, grad = run(*inputs)
        memory = torch.full((3, 5, vocabulary + 3), 7.0, dtype=dtype)
        *got, into = run(*inputs, out=memory[:, :-1, 1:-2])
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert into.data_ptr() == memory[0, 0, 1:].data_ptr()
        torch.testing.assert_close(into, grad.to(dtype), rtol=0, atol=0, equal_nan=True)
        memory[:, :-1, 1:-2] = 7
        assert (memory == 7).all(), "something else was written"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_gradient_has_one_place(backend: str) -> None:
    student, teacher, _, *vectors = rows()
    before = student.clone()
    with pytest.raises(ValueError, match=r"inplace=True writes .* got out as well"):
        named(backend).forward_backward(
            student, teacher, *vectors, formula(), inplace=True, out=torch.zeros(B, S, V)
        )
    assert torch.equal(student, before)


def test_no_rows_is_no_error() -> None:
    inputs = [x if x is None else x[:0] for x in rows()]
    hard, soft, stats, grad = op("forward_backward")(*inputs, *numbers())
    assert hard.shape == soft.shape == (0,)
    assert stats.shape == (0, ops.STATS)
    assert grad.shape == (0, S, V)


STUDENT, TEACHER, TOKEN_IDS, LABELS, W_HARD, W_SOFT = range(6)
ELSEWHERE = "must be on one device; got cpu and meta"
# position, value, message
WRONG = {
    "student 2-D": (STUDENT, torch.zeros(N, V), r"student must be \(B, S, V\); got 2"),
    "teacher 4-D": (TEACHER, torch.zeros(1, B, S, V), r"teacher must be \(B, S, V\); got 4"),
    "other B": (TEACHER, torch.zeros(B + 1, S, V), "differ in dimension 0: 2 and 3"),
    "other S": (TEACHER, torch.zeros(B, 1, V), "differ in dimension 1: 3 and 1"),
    "other V": (TEACHER, torch.zeros(B, S, V - 1), "differ in dimension 2: 5 and 4"),
    "student float64": (
        STUDENT,
        torch.zeros(B, S, V).double(),
        "student must be float32, bfloat16",
    ),
    "teacher integer": (TEACHER, torch.zeros(B, S, V).long(), "teacher must be float32, bfloat16"),
    "student last stride": (STUDENT, torch.zeros(B, S, 2 * V)[..., ::2], "last stride 1; got 2"),
    "teacher last stride": (TEACHER, torch.zeros(B, V, S).mT, "last stride 1; got 3"),
    "teacher stride 0": (TEACHER, torch.zeros(B, S, 1).expand(B, S, V), "last stride 1; got 0"),
    "labels int32": (
        LABELS,
        torch.zeros(N, dtype=torch.int32),
        "labels must be a CPU tensor of int64",
    ),
    "labels short": (LABELS, torch.zeros(N - 1).long(), "labels must be contiguous with 6 elem"),
    "labels strided": (LABELS, torch.zeros(2 * N).long()[::2], "labels must be contiguous"),
    "labels missing": (LABELS, None, "a hard term needs labels"),
    "w_hard long": (W_HARD, torch.zeros(N + 1), "w_hard must be contiguous with 6 elements; got 7"),
    "w_hard float64": (W_HARD, torch.zeros(N).double(), "w_hard must be a CPU tensor of float32"),
    "w_soft strided": (W_SOFT, torch.zeros(N, 2)[:, 0], "w_soft must be contiguous"),
    **{
        f"{name} elsewhere": (position, torch.empty(*shape, dtype=dtype, device="meta"), ELSEWHERE)
        for name, position, shape, dtype in (
            ("teacher", TEACHER, (B, S, V), torch.float32),
            ("labels", LABELS, (N,), torch.int64),
            ("w_hard", W_HARD, (N,), torch.float32),
            ("w_soft", W_SOFT, (N,), torch.float32),
        )
    },
    "w_soft bfloat16": (
        W_SOFT,
        torch.zeros(N).bfloat16(),
        "w_soft must be a CPU tensor of float32",
    ),
}


# the same with token_ids: (N, K) with K = 3
WRONG_CLASSES = {
    "token_ids int64": (TOKEN_IDS, torch.zeros(N, 3).long(), "must be a contiguous CPU int32"),
    "token_ids short": (TOKEN_IDS, torch.zeros(N, 2).int(), r"int32 tensor \(6, 3\)"),
    "token_ids strided": (TOKEN_IDS, torch.zeros(3, N).int().T, r"int32 tensor \(6, 3\)"),
    "token_ids elsewhere": (TOKEN_IDS, torch.empty(N, 3, device="meta").int(), ELSEWHERE),
    "classes float16": (TEACHER, torch.zeros(B, S, 4).half(), "the teacher must be float32"),
    "no class": (TEACHER, torch.zeros(B, S, 0), r"the teacher must be float32 \(B, S, K\+1\)"),
    "classes of other rows": (TEACHER, torch.zeros(B, 1, 4), "differ in dimension 1: 3 and 1"),
}


@pytest.mark.parametrize("name", ROW_OPS + GRADIENT_OPS)
@pytest.mark.parametrize("wrong", [*WRONG, *WRONG_CLASSES])
def test_wrong_tensors_are_refused(name: str, wrong: str) -> None:
    position, value, message = (WRONG | WRONG_CLASSES)[wrong]
    good = list(arguments(name, rows(k=3 if wrong in WRONG_CLASSES else None)))
    before = [x.clone() if isinstance(x, Tensor) else x for x in good]
    with pytest.raises(RuntimeError, match=message):
        op(name)(*(value if i == position else x for i, x in enumerate(good)))
    for now, was in zip(good, before, strict=True):
        if isinstance(now, Tensor):
            assert torch.equal(now, was), "something was written"


@pytest.mark.parametrize("name", ROW_OPS + GRADIENT_OPS)
def test_an_empty_vocabulary_is_refused(name: str) -> None:
    good = list(arguments(name, rows()))
    good[:2] = [torch.zeros(B, S, 0)] * 2
    with pytest.raises(RuntimeError, match="the vocabulary is empty"):
        op(name)(*good)


# position in `numbers`, value, message
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, -1, "unknown divergence -1"),
        (0, 5, "unknown divergence 5"),
        (1, torch.tensor(0.0).double(), "temperature must be positive and finite"),
        (1, torch.tensor(-1.0).double(), "temperature must be positive and finite"),
        (1, torch.tensor(float("nan")).double(), "temperature must be positive and finite"),
        (1, torch.tensor(float("inf")).double(), "temperature must be positive and finite"),
        (1, torch.tensor(2.0), "temperature must be one CPU float64"),
        (1, torch.ones(2).double(), "temperature must be one CPU float64"),
    ],
)
def test_wrong_numbers_are_refused(position: int, value: Any, message: str) -> None:
    wrong = list(numbers())
    wrong[position] = value
    with pytest.raises(RuntimeError, match=message):
        op("forward")(*rows(), *wrong)


# operator, position, value, message
GRAD, SCALE, STATISTICS = -1, -2, 6
REFUSED: list[tuple[str, int, Tensor, str]] = [
    *(
        (name, STATISTICS, stats, message)
        for name in GRADIENT_OPS
        for stats, message in (
            (torch.zeros(N, ops.STATS - 1), "stats must be contiguous with 66 elements; got 60"),
            (torch.zeros(N + 1, ops.STATS), "stats must be contiguous with 66 elements; got 77"),
            (torch.zeros(ops.STATS, N).mT, "stats must be contiguous"),
            (torch.zeros(N, ops.STATS).double(), "stats must be a CPU tensor of float32"),
        )
    ),
    ("rescale_", SCALE, torch.ones(2), "scale must be one CPU float32"),
    ("rescale_", GRAD, torch.zeros(B, S, V - 1), "grad must have the student's shape"),
    ("rescale_", GRAD, torch.zeros(B, S + 1, V), "grad must have the student's shape"),
    ("rescale_", GRAD, torch.zeros(B, S, V).half(), "grad must have the student's dtype"),
    ("rescale_", GRAD, torch.zeros(B, V, S).mT, "grad must have last stride 1"),
    ("scale_", 1, torch.ones(2), "factor must be one"),
    ("scale_", 1, torch.tensor(2.0).double(), "factor must be one CPU float32"),
    ("scale_", 0, torch.zeros(B, S, V).double(), "grad must be float32, bfloat16"),
    ("scale_", 0, torch.zeros(S, V), r"grad must be \(B, S, V\)"),
    ("scale_", 0, torch.zeros(B, V, S).mT, "grad must have last stride 1"),
]


@pytest.mark.parametrize(("name", "position", "value", "message"), REFUSED, ids=lambda x: None)
def test_another_gradient_is_refused(name: str, position: int, value: Tensor, message: str) -> None:
    scaled = [torch.zeros(B, S, V), torch.tensor(2.0)]
    good = scaled if name == "scale_" else list(arguments(name, rows()))
    good[position] = value
    with pytest.raises(RuntimeError, match=message):
        op(name)(*good)


BRAIN_ROWS = [torch.zeros(B, S, V).bfloat16()] * 2


def test_a_place_for_the_gradient_is_refused() -> None:
    memory = torch.zeros(2, B, S, V)
    student, _ = memory
    halves = memory.view(torch.bfloat16)[..., :V]  # over the first halves of rows of both
    for both, grad, message in (
        (memory, torch.zeros(B, S, V - 1), "grad must have the student's shape"),
        (memory, torch.zeros(B, S, V).double(), "grad must be float32, bfloat16 or float16"),
        (memory, torch.zeros(B, V, S).mT, "grad must have last stride 1"),
        (memory, torch.zeros(S, V), "grad must have the student's shape|grad must be"),
        (memory, torch.zeros(B, S, V, device="meta"), "must be on one device"),
        (BRAIN_ROWS, torch.zeros(B, S, V), "grad must have the student's dtype, or 16 bits"),
        (BRAIN_ROWS, torch.zeros(B, S, V).half(), "grad must have the student's dtype, or 16"),
        (memory, student, "grad shares memory with student"),
        (memory, halves[0], "grad shares memory with student"),
        (memory, halves[1], "grad shares memory with teacher"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op("forward_backward_into")(*both, *rows()[TOKEN_IDS:], *numbers(), grad)
    assert not memory.any(), "something was written"


def test_a_label_outside_is_never_read() -> None:
    # Python refuses it; the operator itself returns NaN, in that row alone.
    inputs = rows()
    inputs[LABELS] = torch.tensor([0, V, -1, 2**62, -(2**63), 1])
    inputs[W_HARD] = torch.ones(N)
    hard, soft, _, grad = op("forward_backward")(*inputs, *numbers())
    outside = torch.tensor([False, True, True, True, True, False])
    assert torch.equal(hard.isnan(), outside)
    assert not soft.isnan().any()
    assert torch.equal(grad.view(N, V).isnan(), outside[:, None].expand(N, V))


def test_a_token_outside_is_never_read() -> None:
    # Python refuses it; the operator itself takes it for an absent one.
    inputs = rows(k=4)
    token_ids = inputs[TOKEN_IDS]
    assert token_ids is not None
    token_ids[:, 3] = torch.tensor([V, 2**31 - 1, -(2**31), -V, -1, 1_000_000])
    got = op("forward_backward")(*inputs, *numbers())
    token_ids[:, 3] = -1
    identical(got, op("forward_backward")(*inputs, *numbers()))
