"""Bad input raises an error with argument, expectation and value, and nothing is written."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.heads import make_heads
from support.logits import grown
from torch import Tensor

from fused_kd import Head, KDLoss, kd_loss
from fused_kd.testing import cpu_peak

VALUE, TYPE = ValueError, TypeError
S, T, Y = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
ONES = torch.ones(2, 3)
META = torch.device("meta")
Row = tuple[dict[str, Any], type[Exception], str]

# keywords that kd_loss and the constructor refuse, the error, and words of its message
OPTIONS: list[Row] = [
    ({"temperature": 0.0}, VALUE, "temperature must be positive and finite; got 0.0"),
    ({"temperature": -1}, VALUE, "temperature must be positive and finite; got -1.0"),
    ({"temperature": math.nan}, VALUE, "temperature must be positive and finite; got nan"),
    ({"temperature": math.inf}, VALUE, "temperature must be positive and finite; got inf"),
    ({"temperature": 1e30}, VALUE, "temperature must be in [2**-60, 2**60] | got 1e+30"),
    ({"temperature": 10**400}, VALUE, "temperature must be finite; got a number beyond"),
    ({"temperature": "hot"}, TYPE, "temperature must be a Python number; got str"),
    (
        {"temperature": torch.tensor(2.0)},
        TYPE,
        "temperature must be a Python number; got Tensor: pas",
    ),
    ({"temperature": True}, TYPE, "temperature must be a Python number; got bool"),
    ({"divergence": "jsd", "beta": 0.0}, VALUE, "beta must be in (0, 1) for divergence='jsd'"),
    ({"divergence": "jsd", "beta": 1.0}, VALUE, "got 1.0 (the two ends are"),
    ({"divergence": "jsd", "beta": math.nan}, VALUE, "beta must be in (0, 1)"),
    ({"divergence": "kl"}, VALUE, "divergence must be one of 'forward_kl', 'reverse_kl', "),
    ({"divergence": torch.zeros(3)}, VALUE, "divergence must be one of | got Tensor"),
    ({"reduction": "avg"}, VALUE, "reduction must be one of 'mean', 'sum', 'none'; got 'avg'"),
    ({"reduction": "batchmean"}, VALUE, "use reduction='mean'"),
    ({"soft_scale": "t"}, VALUE, "soft_scale must be one of 't2', 'none'; got 't'"),
    ({"backend": "gpu"}, VALUE, "one of 'auto', 'reference', 'cpu', 'triton', 'cuda'; got"),
    ({"hard_weight": -0.1}, VALUE, "hard_weight must be at least 0 and finite; got -0.1"),
    ({"hard_weight": 1e300}, VALUE, "hard_weight must be 0 or in [2**-126, | got 1e+300"),
    ({"soft_weight": -1}, VALUE, "soft_weight must be at least 0 and finite; got -1.0"),
    ({"soft_weight": math.nan}, VALUE, "soft_weight must be at least 0 and finite; got nan"),
    ({"label_smoothing": 1.0}, VALUE, "label_smoothing must be in [0, 1); got 1.0"),
    ({"label_smoothing": -0.1}, VALUE, "label_smoothing must be in [0, 1); got -0.1"),
    ({"label_smoothing": math.nan}, VALUE, "label_smoothing must be in [0, 1); got nan"),
    ({"ignore_index": 1.5}, TYPE, "ignore_index must be an int; got 1.5"),
    ({"ignore_index": 2**70}, VALUE, "ignore_index must fit in 64 bits; got 118059"),
    ({"return_parts": 1}, TYPE, "return_parts must be True or False; got 1"),
    ({"inplace": True, "reduction": "none"}, VALUE, "inplace=True needs reduction='mean'"),
    ({"memory_budget": 2**70}, VALUE, "memory_budget | 64 bits"),
    ({"memory_budget": 0}, VALUE, "memory_budget | at least 1"),
    ({"memory_budget": "1G"}, TYPE, "memory_budget | int | 1G"),
    ({"chunk_rows": 2**63}, VALUE, "chunk_rows | 64 bits"),
    ({"chunk_rows": 0}, VALUE, "chunk_rows | at least 1 | 0"),
    ({"chunk_rows": -3}, VALUE, "chunk_rows | -3"),
    ({"chunk_rows": 2.5}, TYPE, "chunk_rows | int | 2.5"),
    ({"chunk_rows": 2, "memory_budget": 2**30}, VALUE, "chunk_rows | memory_budget"),
    ({"grad_accum_dtype": "float32"}, TYPE, "grad_accum_dtype | torch.dtype"),
]


def changed(x: Tensor, value: float) -> Tensor:
    other = x.clone()
    other[1, 2] = value
    return other


# arguments that replace S, T and Y, or are added
A_SIDE = "must be a torch.Tensor of logits or a fused_kd.Head; got"
A_FLOAT = "must be float32, bfloat16, float16 or float64; got"
AN_INTEGER = "labels must be an integer tensor of class indices; got"
LEADING = "must have the leading shape of student, (2, 3); got"
ON_CPU = "must be on the device of student, cpu; got meta"
WEIGHT = "token_weight must be at least 0 and finite; got"
IN_RANGE = "labels must be in [0, 5) or equal to ignore_index={}; got {} at position (1, 2)"
PARAMETER = torch.nn.Parameter(changed(Y, 99), requires_grad=False)
ITEMS, MEAN = "num_items must be", "num_items is the denominator of reduction='mean'; got it with"
LOGITS_ROWS: list[Row] = [
    ({"student": 1.0}, TYPE, f"student {A_SIDE} float"),
    ({"student": None}, TYPE, f"student {A_SIDE} NoneType"),
    ({"student": SimpleNamespace(logits=S)}, TYPE, f"student {A_SIDE} | (output.logits)"),
    ({"teacher": "lm_head"}, TYPE, f"teacher {A_SIDE} str"),
    ({"student": (S, T)}, TYPE, "got a plain tuple: pass Head(hidden, weight, bias=None, scale=1"),
    ({"teacher": [S, T]}, TYPE, f"teacher {A_SIDE} a plain list: pass Head("),
    ({"memory_budget": 2**20}, VALUE, "memory_budget is for | =1048576 with logits | leave it out"),
    ({"chunk_rows": 3}, VALUE, "chunk_rows is for a student or teacher given as a Head"),
    ({"kept_rows": 6}, VALUE, "kept_rows is for a student or teacher given as a Head"),
    ({"grad_accum_dtype": torch.float32}, VALUE, "grad_accum_dtype is for | got torch.float32"),
    ({"softcap": 30.0}, TYPE, "'softcap': it is a field of Head"),
    ({"student": torch.tensor(1.0)}, VALUE, "student must have shape (..., V) | got 0 dimensions"),
    ({"teacher": None}, VALUE, "teacher must be given when | =0.5 | Head, or soft_weight=0"),
    ({"teacher": T[0]}, VALUE, f"teacher {LEADING} (3,)"),
    ({"teacher": T[:, :2]}, VALUE, f"teacher {LEADING} (2, 2)"),
    ({"teacher": torch.randn(2, 3, 8)}, VALUE, "V = 5 for the student | V = 8 | slice them off"),
    ({"student": S[..., :0]}, VALUE, "student must have at least one vocabulary entry | (2, 3, 0)"),
    ({"student": S.int()}, TYPE, f"student {A_FLOAT} torch.int32"),
    ({"teacher": T.to(torch.complex64)}, TYPE, f"teacher {A_FLOAT} torch.complex64"),
    ({"teacher": T.clone().requires_grad_()}, VALUE, "teacher must not require grad"),
    ({"teacher": T.clone().requires_grad_() * 1}, VALUE, "teacher must not require grad | detach"),
    ({"teacher": T.to(META)}, VALUE, f"teacher {ON_CPU}"),
    ({"labels": Y.to(META)}, VALUE, f"labels {ON_CPU}"),
    ({"student": S.to_sparse()}, TYPE, "student must be a dense, unquantised | torch.sparse_coo"),
    ({"labels": Y.to_sparse()}, TYPE, "labels must be a dense"),
    ({"student": "logits", "labels": Y.to_sparse()}, TYPE, "student must be"),
    ({"num_items": torch.tensor(2.0).to_sparse()}, TYPE, "num_items must be"),
    ({"labels": None}, VALUE, "labels must be given when hard_weight is not 0 | hard_weight=0.5"),
    ({"labels": Y.float()}, TYPE, f"{AN_INTEGER} torch.float32"),
    ({"labels": Y.bool()}, TYPE, f"{AN_INTEGER} torch.bool"),
    ({"labels": Y[:, :2]}, VALUE, f"labels {LEADING} (2, 2)"),
    *(({"labels": changed(Y, x)}, VALUE, IN_RANGE.format(-100, x)) for x in (5, -1, -101, 2**40)),
    ({"labels": changed(Y, -100), "ignore_index": 0}, VALUE, IN_RANGE.format(0, -100)),
    ({"labels": PARAMETER}, VALUE, "got 99 at position (1, 2)"),
    ({"num_items": 1e-50}, VALUE, f"{ITEMS} in [2**-60, 2**60] | got 1e-50"),
    ({"num_items": 0}, VALUE, f"{ITEMS} positive and finite; got 0"),
    ({"num_items": -2.0}, VALUE, f"{ITEMS} positive and finite; got -2.0"),
    ({"num_items": math.nan}, VALUE, f"{ITEMS} positive and finite"),
    ({"num_items": torch.tensor(-3)}, VALUE, f"{ITEMS} 0 or in [2**-60, 2**60] | got -3"),
    ({"num_items": torch.tensor(1e-40)}, VALUE, f"{ITEMS} 0 or in"),
    ({"num_items": torch.tensor([3])}, VALUE, f"{ITEMS} a number or a 0-d | of shape (1,)"),
    ({"num_items": grown()}, TYPE, f"{ITEMS} an int or float tensor without grad"),
    ({"num_items": True}, TYPE, f"{ITEMS} a number or a 0-d tensor; got bool"),
    ({"num_items": torch.tensor(4, device=META)}, VALUE, f"num_items {ON_CPU}"),
    ({"num_items": 3, "reduction": "sum"}, VALUE, f"{MEAN} reduction='sum'"),
    ({"num_items": 3, "reduction": "none"}, VALUE, f"{MEAN} reduction='none'"),
    ({"token_weight": torch.ones(6)}, VALUE, f"token_weight {LEADING} (6,)"),
    ({"token_weight": changed(ONES, -2)}, VALUE, f"{WEIGHT} -2.0 at position (1, 2)"),
    ({"token_weight": changed(ONES, math.nan)}, VALUE, f"{WEIGHT} nan at position (1, 2)"),
    ({"token_weight": ONES.clone().requires_grad_()}, VALUE, "token_weight must not require grad"),
    ({"token_weight": ONES + 0j}, TYPE, "token_weight must be a bool, int | got torch.complex64"),
    ({"token_weight": ONES.to(META)}, VALUE, f"token_weight {ON_CPU}"),
]

HEADS = make_heads(rows=6, vocabulary=19)
GOOD = {"student": HEADS.student_side, "teacher": HEADS.teacher_side, "labels": HEADS.labels}
LOGITS = torch.randn(6, 19)
GROWN = grown(6, 19)
PARTITIONED = torch.nn.Parameter(torch.empty(0))  # as DeepSpeed ZeRO-3 leaves it outside a forward
PARTITIONED.ds_id = 0
QUANTISED = torch.quantize_per_tensor(HEADS.teacher_weight, 0.1, 0, torch.qint8)


def student(**fields: Any) -> dict[str, Any]:
    return {"student": HEADS.student_side._replace(**fields)}


def teacher(**fields: Any) -> dict[str, Any]:
    return {"teacher": HEADS.teacher_side._replace(**fields)}


# arguments that replace those of GOOD, or are added
HEAD_ROWS: list[Row] = [
    (student(weight=torch.randn(19, 25)), VALUE, "student.hidden | H = 24 | H = 25"),
    (student(weight=PARTITIONED), VALUE, "got (0,) | ZeRO-3 | GatheredParameters"),
    (teacher(weight=PARTITIONED), VALUE, "teacher.weight | got (0,) | ZeRO-3"),
    (student(weight=torch.empty(0)), VALUE, "got (0,) | sharded by FSDP"),
    (teacher(hidden=torch.randn(6, 41)), VALUE, "teacher.hidden | H = 41 | H = 40"),
    (teacher(weight=torch.randn(21, 40)), VALUE, "V = 19 | V = 21 | weight[:V]"),
    (teacher(hidden=torch.randn(5, 40)), VALUE, "teacher.hidden | (6,) | (5,)"),
    ({"teacher": None}, VALUE, "teacher | None | soft_weight=0"),
    (teacher(weight=None), TYPE, "teacher.weight | torch.Tensor | NoneType"),
    ({"teacher": torch.randn(6, 18)}, VALUE, "V = 19 | V = 18 | logits[..., :V]"),
    ({"teacher": torch.randn(5, 19)}, VALUE, "teacher must | student.hidden | (5,)"),
    ({"student": torch.randn(5, 19)}, VALUE, "teacher.hidden | of student, | (6,)"),
    ({"teacher": LOGITS.clone().requires_grad_()}, VALUE, "teacher | detach"),
    (student(hidden=None), TYPE, "student.hidden | torch.Tensor | NoneType"),
    (student(weight=None), TYPE, "student.weight | torch.Tensor | NoneType"),
    (student(hidden=LOGITS[:, :0], weight=torch.randn(19, 0)), VALUE, "student.weight | H > 0"),
    (student(hidden=torch.tensor(1.0)), VALUE, "student.hidden | (..., H) | 0 dim"),
    (student(hidden=HEADS.hidden.double()), TYPE, "student.hidden | float64 | float32"),
    (student(bias=torch.randn(18)), VALUE, "student.bias | (19,) | (18,)"),
    (teacher(bias=torch.randn(19, 1)), VALUE, "teacher.bias | (19,) | (19, 1)"),
    ({"memory_budget": 100}, VALUE, "memory_budget | one row | 100"),
    ({"grad_accum_dtype": torch.float16}, VALUE, "grad_accum_dtype | float16"),
    ({"student": LOGITS, "grad_accum_dtype": torch.float32}, VALUE, "student's logits | leave it"),
    ({"kept_rows": 5}, VALUE, "kept_rows | 6 | 5"),
    ({"kept_rows": 5.0}, TYPE, "kept_rows | int"),
    (student(hidden=HEADS.hidden.to(META)), TYPE, "student.hidden | meta"),
    (student(weight=HEADS.weight.to(META)), TYPE, "student.weight | meta"),
    (teacher(weight=QUANTISED), TYPE, "teacher.weight | quantised"),
    ({"teacher": QUANTISED}, TYPE, "teacher must be a dense, unquantised tensor"),
    (student(weight=HEADS.weight.to_sparse()), TYPE, "student.weight | layout"),
    (student(weight="lm_head"), TYPE, "student.weight | torch.Tensor | str"),
    (student(hidden=HEADS.hidden.int()), TYPE, "student.hidden | int32"),
    (student(weight=HEADS.weight.bfloat16()), TYPE, "float32 | bfloat16 | autocast"),
    (teacher(weight=HEADS.teacher_weight.half()), TYPE, "teacher.hidden | float16"),
    (student(weight=HEADS.weight.flatten()), VALUE, "student.weight | inside the forward"),
    (student(weight=HEADS.weight[:0]), VALUE, "student.weight | V > 0"),
    (teacher(hidden=grown(6, 40)), VALUE, "teacher.hidden must not be attached | detach"),
    (teacher(weight=grown(19, 40)), VALUE, "teacher.weight must not be attached"),
    (teacher(bias=grown(19)), VALUE, "teacher.bias must not be attached"),
    ({"labels": HEADS.labels[:5]}, VALUE, "labels | student.hidden | (6,) | (5,)"),
    ({"labels": HEADS.labels + 19}, VALUE, "labels | [0, 19)"),
    ({"labels": None}, VALUE, "labels | hard_weight"),
    ({"token_weight": torch.ones(5)}, VALUE, "token_weight | student.hidden"),
    ({"backend": "cuda"}, RuntimeError, "backend='cuda' | cannot run"),
    ({"inplace": True}, VALUE, "inplace=True | student's logits | as a Head | pass inplace=False"),
    (student(softcap=30.0), VALUE, "student.softcap must be None | got 30.0 | logits"),
    (teacher(softcap=30.0), VALUE, "teacher.softcap must be None | got 30.0"),
    (student(scale=math.inf), VALUE, "student.scale must | finite | got inf"),
    (teacher(scale=math.nan), VALUE, "teacher.scale must | finite | got nan"),
    *(
        (side(scale=scale), VALUE, f"{name}.scale must not be 0 | got {scale}")
        for name, side in (("student", student), ("teacher", teacher))
        for scale in (0.0, 1e-30, -1e-30)
    ),
    (student(scale="2"), TYPE, "student.scale must be a Python number | str"),
    (student(scale=torch.tensor(2.0)), TYPE, "student.scale | Tensor | x.item()"),
    (student(scale=True), TYPE, "student.scale must be a Python number | bool"),
    ({"student": tuple(HEADS.student)}, TYPE, f"student {A_SIDE} | plain tuple | Head("),
    (
        {"student": GROWN, **teacher(weight=GROWN.detach()[:, :4], hidden=torch.randn(6, 4))},
        VALUE,
        "same vocabulary size",
    ),
]


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


# student logits that cannot be written to
STRIDES = "a last stride of 1 and leading dimensions that collapse to two strides"
A_VIEW = "student logits that autograd lets be written to; got a view made by chunk, split"
A_LEAF = "a leaf tensor that requires grad, or a view of one"
INPLACE_ROWS: list[tuple[Tensor, str]] = [
    (torch.randn(2, 3, 5, requires_grad=True), "student logits that a model computed"),
    (torch.randn(6, 5, requires_grad=True).view(2, 3, 5), A_LEAF),
    (grown(2, 1, 5).expand(2, 3, 5), "whose entries do not share memory; got shape"),
    (grown(40).as_strided((2, 3, 5), (15, 4, 1)), "do not share memory"),
    (grown(2, 5, 3).mT, "a last stride of 1 and leading dimensions"),
    (grown(4, 6, 8, 5)[:3, :4, :6], STRIDES),
    (torch._neg_view(grown(2, 3, 5)), "inplace=True needs | negates them lazily"),
    (grown(4, 3, 5).chunk(2)[0], A_VIEW),
    (grown(4, 3, 5).split(2)[1][:1], A_VIEW),
    (grown(4, 3, 5).unbind(1)[2], A_VIEW),
    (_Identity.apply(grown(2, 3, 5)), A_VIEW),
]


def refused(error: type[Exception], words: str, *sides: Any, **keywords: Any) -> None:
    """Assert that kd_loss raises `error` whose message has all of `words`, separated by " | "."""
    with pytest.raises(error) as caught:
        kd_loss(*sides, **keywords)
    for word in words.split(" | "):
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize(("keywords", "error", "words"), OPTIONS, ids=str)
def test_options(keywords: dict[str, Any], error: type[Exception], words: str) -> None:
    of_heads = {"memory_budget", "chunk_rows", "grad_accum_dtype"} & keywords.keys()
    sides = (HEADS.student_side, HEADS.teacher_side, HEADS.labels) if of_heads else (S, T, Y)
    refused(error, words, *sides, **keywords)
    with pytest.raises(error) as caught:
        KDLoss(**keywords)
    assert all(word in str(caught.value) for word in words.split(" | "))


@pytest.mark.parametrize(("arguments", "error", "words"), LOGITS_ROWS, ids=lambda x: None)
def test_message(
    arguments: dict[str, Any], error: type[Exception], words: str, backend: str
) -> None:
    full = {"student": S, "teacher": T, "labels": Y, "backend": backend, **arguments}
    refused(error, words, **full)


@pytest.mark.parametrize(("arguments", "error", "words"), HEAD_ROWS, ids=lambda x: None)
def test_message_of_heads(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    refused(error, words, **{**GOOD, **arguments})


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize(("student", "words"), INPLACE_ROWS, ids=lambda x: None)
def test_inplace_writes_nothing_where_it_cannot(
    student: Tensor, words: str, with_head: bool, backend: str
) -> None:
    before, version = student.detach().clone(), student._version
    leading = student.shape[:-1]
    logits = torch.randn(*leading, 5)
    teacher = Head(torch.randn(*leading, 4), torch.randn(5, 4)) if with_head else logits
    labels = torch.zeros(leading, dtype=torch.int64)
    refused(VALUE, words, student, teacher, labels, inplace=True, backend=backend)
    assert torch.equal(student, before)
    assert student._version == version


def test_nothing_is_written_before_the_checks_have_passed(backend: str) -> None:
    before, version = GROWN.detach().clone(), GROWN._version
    good = HEADS.labels
    for side, labels in (
        (HEADS.teacher_side._replace(weight=torch.randn(21, 40)), good),
        (HEADS.teacher_side._replace(scale=math.nan), good),
        (HEADS.teacher_side, good + 19),
        (LOGITS, good + 19),
    ):
        refused(VALUE, "must", GROWN, side, labels, inplace=True, backend=backend)
    assert torch.equal(GROWN, before)
    assert GROWN._version == version


def test_a_teacher_in_the_memory_that_is_written_is_refused(backend: str) -> None:
    both = grown(19, 19)
    before, labels = both.detach().clone(), torch.zeros(6, dtype=torch.int64)
    for teacher in (
        both.detach()[1:7],
        Head(both.detach()[1:7], torch.randn(19, 19)),
        Head(torch.randn(6, 19), both.detach()),
        Head(torch.randn(6, 3), torch.randn(19, 3), both.detach()[5]),
    ):
        words = "needs a teacher in its own memory"
        refused(VALUE, words, both[:6], teacher, labels, inplace=True, backend=backend)
        assert torch.equal(both, before)
    labels = torch.zeros(19, dtype=torch.int64)  # the same entries are no hazard
    assert kd_loss(both, both.detach(), labels, inplace=True, backend=backend).isfinite()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_labels() -> None:
    refused(TYPE, "labels must be a dense", S, T, torch.nested.nested_tensor([Y]))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("temprature", ": did you mean 'temperature'?"),
        ("token_weigth", ": did you mean 'token_weight'?"),
        ("hard_wieght", ": did you mean 'hard_weight'?"),
        ("nothing_like_it", ": help({}) lists all"),
    ],
)
def test_an_unknown_keyword_names_the_nearest_one_and_the_function(name: str, hint: str) -> None:
    for function, call in (("kd_loss", lambda **k: kd_loss(S, T, Y, **k)), ("KDLoss", KDLoss)):
        with pytest.raises(TypeError) as error:
            call(**{name: 2.0})
        assert str(error.value) == f"{function}() has no keyword {name!r}{hint.format(function)}"


@pytest.mark.parametrize("name", ["token_weight", "num_items", "kept_rows"])
def test_the_module_says_which_keywords_belong_to_its_call(name: str) -> None:
    expected = f"KDLoss.. has no keyword '{name}': it belongs to the call"
    with pytest.raises(TypeError, match=expected):
        KDLoss(**{name: None})


def test_a_head_is_made_with_a_weight() -> None:
    with pytest.raises(TypeError, match="'weight'"):
        Head(HEADS.hidden)


def test_a_budget_that_holds_no_row_says_what_one_needs_and_the_next_byte_works() -> None:
    with pytest.raises(ValueError, match="which needs") as error:
        kd_loss(**GOOD, memory_budget=1)
    needed = int(str(error.value).split("needs ")[1].split(" ")[0].replace(",", ""))
    refused(VALUE, "at least one row", **GOOD, memory_budget=needed - 1)
    kd_loss(**GOOD, memory_budget=needed)
    ignored = torch.where(torch.arange(6) == 2, -100, HEADS.labels)  # rows are gathered
    kd_loss(**{**GOOD, "labels": ignored}, memory_budget=needed)


def test_nothing_is_allocated_before_the_checks_have_passed() -> None:
    weight = torch.empty(1).expand(2**20, 24)  # 4 GiB of logits for a thousand rows
    sides = Head(torch.randn(1000, 24), weight), Head(torch.randn(1000, 40), HEADS.teacher_weight)
    labels = torch.zeros(1000, dtype=torch.int64)
    assert cpu_peak(lambda: refused(VALUE, "same vocabulary size", *sides, labels)).highest < 2**20
