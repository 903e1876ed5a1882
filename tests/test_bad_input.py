"""Bad input: an error that names the argument, what was expected and what came; nothing written."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_kd import KDLoss, kd_loss

S, T, Y = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)

# keywords of kd_loss and the constructor that are refused: error, what its message says
BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"temperature": 0.0}, ValueError, "temperature must be positive and finite; got 0.0"),
    ({"temperature": -1}, ValueError, "temperature must be positive and finite; got -1.0"),
    ({"temperature": math.nan}, ValueError, "temperature must be positive and finite; got nan"),
    ({"temperature": math.inf}, ValueError, "temperature must be positive and finite; got inf"),
    ({"temperature": 1e30}, ValueError, "temperature must be positive and finite, in [9e-19, 1e+"),
    ({"temperature": 10**400}, ValueError, "temperature must be finite; got a number beyond"),
    ({"hard_weight": 1e300}, ValueError, "hard_weight must be at least 0 and finite (0 or in"),
    ({"ignore_index": 2**70}, ValueError, "ignore_index must fit in 64 bits; got 118059"),
    ({"temperature": "hot"}, TypeError, "temperature must be a Python number; got str"),
    ({"temperature": torch.tensor(2.0)}, TypeError, "temperature must be a Python number; got Te"),
    ({"temperature": True}, TypeError, "temperature must be a Python number; got bool"),
    ({"divergence": "jsd", "beta": 0.0}, ValueError, "beta must be in (0, 1) for divergence='jsd'"),
    ({"divergence": "jsd", "beta": 1.0}, ValueError, "got 1.0 (the two ends are"),
    ({"divergence": "jsd", "beta": math.nan}, ValueError, "beta must be in (0, 1)"),
    ({"divergence": "kl"}, ValueError, "divergence must be one of 'forward_kl', 'reverse_kl', "),
    ({"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none'; got 'avg'"),
    ({"reduction": "batchmean"}, ValueError, "use reduction='mean'"),
    ({"soft_scale": "t"}, ValueError, "soft_scale must be one of 't2', 'none'; got 't'"),
    (
        {"backend": "gpu"},
        ValueError,
        "backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda'; got",
    ),
    ({"hard_weight": -0.1}, ValueError, "hard_weight must be at least 0 and finite; got -0.1"),
    ({"soft_weight": -1}, ValueError, "soft_weight must be at least 0 and finite; got -1.0"),
    ({"soft_weight": math.nan}, ValueError, "soft_weight must be at least 0 and finite; got nan"),
    ({"label_smoothing": 1.0}, ValueError, "label_smoothing must be in [0, 1); got 1.0"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be in [0, 1); got -0.1"),
    ({"label_smoothing": math.nan}, ValueError, "label_smoothing must be in [0, 1); got nan"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int; got 1.5"),
    ({"return_parts": 1}, TypeError, "return_parts must be True or False; got 1"),
    ({"inplace": True, "reduction": "none"}, ValueError, "inplace=True needs reduction='mean'"),
]


@pytest.mark.parametrize(
    ("keywords", "error", "message"), BAD_OPTIONS, ids=[str(k) for k, _, _ in BAD_OPTIONS]
)
def test_options(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        kd_loss(S, T, Y, **keywords)
    with pytest.raises(error, match=re.escape(message)):
        KDLoss(**keywords)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("temprature", ": did you mean 'temperature'?"),
        ("token_weigth", ": did you mean 'token_weight'?"),
        ("hard_wieght", ": did you mean 'hard_weight'?"),
        ("nothing_like_it", ""),
    ],
)
def test_an_unknown_keyword_names_the_nearest_one_and_the_function(name: str, hint: str) -> None:
    for function, call in (("kd_loss", lambda **k: kd_loss(S, T, Y, **k)), ("KDLoss", KDLoss)):
        with pytest.raises(TypeError) as error:
            call(**{name: 2.0})
        assert str(error.value) == f"{function}() has no keyword {name!r}{hint}"


@pytest.mark.parametrize("name", ["token_weight", "num_items", "kept_rows"])
def test_the_module_says_which_keywords_belong_to_its_call(name: str) -> None:
    with pytest.raises(
        TypeError, match=f"KDLoss.. has no keyword '{name}': it belongs to the call"
    ):
        KDLoss(**{name: None})  # type: ignore[call-arg]


def changed(labels: Tensor, value: int) -> Tensor:
    other = labels.clone()
    other[1, 2] = value
    return other


# arguments in place of S, T, Y, and keywords
BAD_TENSORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not a tensor": (
        {"student": 1.0},
        TypeError,
        "student must be a torch.Tensor of logits or a fused_kd.Head; got float",
    ),
    "nothing": (
        {"student": None},
        TypeError,
        "student must be a torch.Tensor of logits or a fused_kd.Head; got NoneType",
    ),
    "a teacher that is no side": (
        {"teacher": "lm_head"},
        TypeError,
        "teacher must be a torch.Tensor of logits or a fused_kd.Head; got str",
    ),
    "a plain tuple": (
        {"student": (S, T)},
        TypeError,
        "got a plain tuple: pass Head(hidden, weight, bias=None, scale=1.0)",
    ),
    "a plain list": (
        {"teacher": [S, T]},
        TypeError,
        "teacher must be a torch.Tensor of logits or a fused_kd.Head; got a plain list: pass Head(",
    ),
    "memory_budget without a head": (
        {"memory_budget": 2**20},
        ValueError,
        "memory_budget is for a student or teacher given as a Head, whose logits are computed in "
        "chunks; got memory_budget=1048576 with logits on both sides: leave it out",
    ),
    "chunk_rows without a head": (
        {"chunk_rows": 3},
        ValueError,
        "chunk_rows is for a student or teacher given as a Head",
    ),
    "kept_rows without a head": (
        {"kept_rows": 6},
        ValueError,
        "kept_rows is for a student or teacher given as a Head",
    ),
    "grad_accum_dtype without a head": (
        {"grad_accum_dtype": torch.float32},
        ValueError,
        "grad_accum_dtype is for the weight gradient of a student given as a Head; got "
        "torch.float32 with the student's logits: leave it out",
    ),
    "0-d": (
        {"student": torch.tensor(1.0), "teacher": torch.tensor(1.0)},
        ValueError,
        "student must have shape (..., V) with at least one dimension; got 0 dimensions",
    ),
    "no teacher": (
        {"teacher": None},
        ValueError,
        "teacher must be given when soft_weight is not 0; got teacher=None with soft_weight=0.5: "
        "pass the teacher's logits or Head, or soft_weight=0",
    ),
    "wrong rank": (
        {"teacher": T[0]},
        ValueError,
        "teacher must have the leading shape of student, (2, 3); got (3,)",
    ),
    "leading shape": (
        {"teacher": T[:, :2]},
        ValueError,
        "teacher must have the leading shape of student, (2, 3); got (2, 2)",
    ),
    "different V R-43": (
        {"teacher": torch.randn(2, 3, 8)},
        ValueError,
        "got V = 5 for the student and V = 8 for the teacher: if the larger one only has padding "
        "entries at its end, slice them off",
    ),
    "V = 0 R-39": (
        {"student": S[..., :0], "teacher": T[..., :0]},
        ValueError,
        "student must have at least one vocabulary entry; got (2, 3, 0)",
    ),
    "integer logits": (
        {"student": S.int()},
        TypeError,
        "student must be float32, bfloat16, float16 or float64; got torch.int32",
    ),
    "complex logits": (
        {"teacher": T.to(torch.complex64)},
        TypeError,
        "teacher must be float32, bfloat16, float16 or float64; got torch.complex64",
    ),
    "teacher requires grad": (
        {"teacher": T.clone().requires_grad_()},
        ValueError,
        "teacher must not require grad",
    ),
    "teacher's device": (
        {"teacher": T.to("meta")},
        ValueError,
        "teacher must be on the device of student, cpu; got meta",
    ),
    "labels' device": (
        {"labels": Y.to("meta")},
        ValueError,
        "labels must be on the device of student, cpu; got meta",
    ),
    "sparse": (
        {"student": S.to_sparse()},
        TypeError,
        "student must be a dense, unquantised tensor; got layout torch.sparse_coo",
    ),
    "no labels": (
        {"labels": None},
        ValueError,
        "labels must be given when hard_weight is not 0; got labels=None with hard_weight=0.5",
    ),
    "float labels": (
        {"labels": Y.float()},
        TypeError,
        "labels must be an integer tensor of class indices; got torch.float32",
    ),
    "bool labels": (
        {"labels": Y.bool()},
        TypeError,
        "labels must be an integer tensor of class indices; got torch.bool",
    ),
    "labels' shape": (
        {"labels": Y[:, :2]},
        ValueError,
        "labels must have the leading shape of student, (2, 3); got (2, 2)",
    ),
    "label = V R-34": (
        {"labels": changed(Y, 5)},
        ValueError,
        "labels must be in [0, 5) or equal to ignore_index=-100; got 5 at position (1, 2)",
    ),
    "label = -1 R-34": (
        {"labels": changed(Y, -1)},
        ValueError,
        "labels must be in [0, 5) or equal to ignore_index=-100; got -1 at position (1, 2)",
    ),
    "label = -100 is only ignored by default R-45": (
        {"labels": changed(Y, -100), "ignore_index": 0},
        ValueError,
        "equal to ignore_index=0; got -100 at position (1, 2)",
    ),
    "num_items tiny": ({"num_items": 1e-50}, ValueError, "num_items must be positive and finite, "),
    "num_items elsewhere": (
        {"num_items": torch.tensor(4, device="meta")},
        ValueError,
        "num_items must be on the device of student, cpu; got meta",
    ),
    "num_items = 0": ({"num_items": 0}, ValueError, "num_items must be positive and finite; got 0"),
    "num_items < 0": (
        {"num_items": -2.0},
        ValueError,
        "num_items must be positive and finite; got -2.0",
    ),
    "num_items nan": ({"num_items": math.nan}, ValueError, "num_items must be positive and finite"),
    "num_items tensor < 0": (
        {"num_items": torch.tensor(-3)},
        ValueError,
        "num_items must be 0 or in [9e-19, 1e+18]; got -3",
    ),
    "num_items 1-d": (
        {"num_items": torch.tensor([3])},
        ValueError,
        "num_items must be a number or a 0-d tensor; got a tensor of shape (1,)",
    ),
    "num_items requires grad": (
        {"num_items": torch.tensor(3.0, requires_grad=True)},
        TypeError,
        "num_items must be an int or float tensor without grad",
    ),
    "num_items bool": (
        {"num_items": True},
        TypeError,
        "num_items must be a number or a 0-d tensor; got bool",
    ),
    "num_items with sum": (
        {"num_items": 3, "reduction": "sum"},
        ValueError,
        "num_items is the denominator of reduction='mean'; got it with reduction='sum'",
    ),
    "num_items with none": (
        {"num_items": 3, "reduction": "none"},
        ValueError,
        "num_items is the denominator of reduction='mean'; got it with reduction='none'",
    ),
    "token_weight's shape": (
        {"token_weight": torch.ones(6)},
        ValueError,
        "token_weight must have the leading shape of student, (2, 3); got (6,)",
    ),
    "token_weight negative": (
        {"token_weight": torch.tensor([[1.0, 1, 1], [1, -2, 1]])},
        ValueError,
        "token_weight must be at least 0 and finite; got -2.0 at position (1, 1)",
    ),
    "token_weight nan": (
        {"token_weight": torch.tensor([[1.0, math.nan, 1], [1, 1, 1]])},
        ValueError,
        "token_weight must be at least 0 and finite; got nan at position (0, 1)",
    ),
    "token_weight requires grad": (
        {"token_weight": torch.ones(2, 3, requires_grad=True)},
        ValueError,
        "token_weight must not require grad",
    ),
    "token_weight complex": (
        {"token_weight": torch.ones(2, 3, dtype=torch.complex64)},
        TypeError,
        "token_weight must be a bool, int or float tensor; got torch.complex64",
    ),
    "token_weight's device": (
        {"token_weight": torch.ones(2, 3, device="meta")},
        ValueError,
        "token_weight must be on the device of student, cpu; got meta",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors(case: str, backend: str) -> None:
    arguments, error, message = BAD_TENSORS[case]
    full = {"student": S, "teacher": T, "labels": Y, "backend": backend, **arguments}
    with pytest.raises(error, match=re.escape(message)):
        kd_loss(**full)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_logits() -> None:
    try:
        quantised = torch.quantize_per_tensor(S, 0.1, 0, torch.qint8)
    except (RuntimeError, AttributeError) as error:
        pytest.skip(f"this torch cannot quantise: {error}")
    with pytest.raises(TypeError, match="student must be a dense, unquantised tensor"):
        kd_loss(quantised, T, Y)


def test_a_dtensor_is_refused_R_58() -> None:
    class Distributed(Tensor):
        device_mesh = None

    student = S.as_subclass(Distributed)
    with pytest.raises(TypeError, match="student must be a local tensor; got a DTensor"):
        kd_loss(student, T, Y)


# ------------------------------------------------------------------------------- and what is not


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 2, 5)])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_is_no_error_R_39(
    backend: str, shape: tuple[int, ...], labelled: bool, reduction: str
) -> None:
    student = torch.randn(shape, requires_grad=True)
    labels = torch.zeros(shape[:-1], dtype=torch.int64) if labelled else None
    loss = kd_loss(
        student,
        torch.randn(shape),
        labels,
        hard_weight=0.5 if labelled else 0.0,
        reduction=reduction,
        backend=backend,
    )
    assert isinstance(loss, Tensor)
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    assert loss.sum().item() == 0
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad.shape == shape
