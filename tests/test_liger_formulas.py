"""Liger's classes whose own kernels need a GPU: their formulas in float64. Chunks, parts, refusals.

tests/integrations/test_liger.py compares the chunked loss with the installed Liger.
"""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.heads import Heads, make_heads
from torch import Tensor

from fused_kd.integrations import liger
from fused_kd.integrations.liger import functional
from fused_kd.testing import cpu_peak

T, EPS = 1.7, 1e-10
BETAS = [0.0, 0.1, 0.5, 1.0]  # asymmetric ones on purpose
REDUCTIONS = ["batchmean", "mean", "sum"]
CLASSES = [
    liger.LigerFusedLinearJSDLoss,
    liger.LigerFusedLinearJSD,
    liger.LigerFusedLinearKLDivLoss,
    liger.LigerJSD,
    liger.LigerKLDIVLoss,
]


def jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Of student q and teacher p, every row: Liger's letters."""
    q, p = log_q.exp(), log_p.exp()
    if beta == 0.0:
        return (p * (log_p - log_q)).sum(-1)
    if beta == 1.0:
        return (q * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


def divisor(reduction: str, rows: int, vocabulary: int) -> int:
    return {"batchmean": rows, "mean": rows * vocabulary, "sum": 1}[reduction]


def leaves(*tensors: Tensor) -> list[Tensor]:
    """float64 copies that require grad."""
    return [x.detach().double().requires_grad_() for x in tensors]


def check(got: Tensor, inputs: list[Tensor], want: Tensor, exact: list[Tensor]) -> None:
    """Values and gradients, under an upstream gradient that is not 1."""
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    ours, theirs = torch.autograd.grad(3 * got, inputs), torch.autograd.grad(3 * want, exact)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def make() -> Heads:
    """Labels that ignore every third row, the first too."""
    heads = make_heads(rows=12, vocabulary=67)
    heads.labels[::3] = -100
    return heads


def probabilities(*shape: int) -> Tensor:
    """Some entries 0, one row that sums to a half."""
    p = torch.randn(*shape).softmax(-1)
    p[..., :5] = 0
    p /= p.sum(-1, keepdim=True)
    p[1] /= 2
    return p


# ------------------------------------------------------------------------------- from hidden states


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("labelled", [True, False])
def test_fused_linear_jsd_P09(beta: float, labelled: bool) -> None:
    heads = make()
    labels = heads.labels if labelled else None
    student, teacher = [heads.hidden, heads.weight], heads.teacher
    got = liger.LigerFusedLinearJSD(beta, temperature=T)(*student, *teacher, labels)
    exact = leaves(*student)
    log_q = F.log_softmax(F.linear(*exact) / T, -1)
    log_p = F.log_softmax(F.linear(*(x.double() for x in teacher)) / T, -1)
    rows = jsd(log_q, log_p, beta)
    want = rows[heads.labels != -100].mean() if labelled else rows.mean()
    check(got, student, want, exact)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("labelled", [True, False])
def test_fused_linear_kl_from_probabilities_P32(reduction: str, labelled: bool) -> None:
    """The temperature is the student's alone; a target need not sum to 1."""
    heads, target = make(), probabilities(12, 67)
    student = [heads.hidden, heads.weight]
    before = target.clone()
    loss = liger.LigerFusedLinearKLDivLoss(reduction, temperature=T)
    got = loss(*student, target, heads.labels if labelled else None)
    assert torch.equal(target, before)
    exact, q = leaves(*student), target.double()
    log_p = F.log_softmax(F.linear(*exact) / T, -1)
    rows = (q * (q.clamp(min=EPS).log() - log_p)).sum(-1)
    kept = heads.labels != -100 if labelled else torch.ones(12).bool()
    want = rows[kept].sum() / divisor(reduction, int(kept.sum()), 67)
    check(got, student, want, exact)


# --------------------------------------------------------------------------- from log-probabilities


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("labelled", [True, False])
def test_jsd_of_log_probabilities(beta: float, labelled: bool) -> None:
    """The gradients are equal in front of the log_softmax, and both are what Liger's formula says.

    Liger's gradient by log_q is (1-β) q (log q - log m), not that of a function of normalised
    log-probabilities; the backward of log_softmax takes the difference out.
    """
    logits, teacher = torch.randn(6, 31, requires_grad=True), torch.randn(6, 31).log_softmax(-1)
    labels = torch.tensor([-100, 1, 2, 3, -100, 5]) if labelled else None
    got = liger.LigerJSD(beta)(logits.log_softmax(-1), teacher, labels)
    exact = leaves(logits)
    rows = jsd(exact[0].log_softmax(-1), teacher.double(), beta)
    want = rows.mean() if labels is None else rows[labels != -100].mean()
    check(got, [logits], want, exact)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("log_target", [True, False])
def test_kl_of_log_probabilities(reduction: str, log_target: bool) -> None:
    logits, target = torch.randn(6, 31, requires_grad=True), torch.randn(6, 31).log_softmax(-1)
    q = target.double().exp()
    if not log_target:
        target = probabilities(6, 31)
        q = target.double()
    loss = liger.LigerKLDIVLoss(EPS, reduction=reduction, log_target=log_target)
    got = loss(logits.log_softmax(-1), target)
    exact = leaves(logits)
    rows = (q * (q.clamp(min=EPS).log() - exact[0].log_softmax(-1))).sum(-1)
    check(got, [logits], rows.sum() / divisor(reduction, 6, 31), exact)


# -------------------------------------------------------------------------------------- from logits


def test_cross_entropy_and_tvd_of_every_row() -> None:
    """Two losses that a caller weighs row by row, each with its gradient."""
    student, teacher = torch.randn(2, 3, 31, requires_grad=True), torch.randn(2, 3, 31)
    target, weights = torch.tensor([[-100, 1, 2], [3, -100, 30]]), torch.rand(2, 2, 3)
    ce, tvd = liger.LigerFusedCETVDLoss()(student, teacher, target)
    exact = leaves(student)
    p, q = exact[0].softmax(-1), teacher.double().softmax(-1)
    rows = F.cross_entropy(exact[0].view(6, 31), target.view(6), reduction="none").view(2, 3)
    distances = ((p - q).abs().sum(-1) / 2).where(target != -100, 0.0)
    for got, want in ((ce, rows), (tvd, distances)):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    want = (weights[0] * rows + weights[1] * distances).sum()
    check((weights[0] * ce + weights[1] * tvd).sum(), [student], want, exact)


def test_the_functions_are_the_classes() -> None:
    """Liger's orders and defaults: its liger_kl_div divides by N·V, and ignores size_average."""
    heads: Any = make()
    student, teacher, labels = heads[:2], heads.teacher, heads.labels
    target, logs = probabilities(12, 67), torch.randn(12, 67).log_softmax(-1)
    log_p = F.linear(*teacher).log_softmax(-1)
    pairs = (
        (functional.liger_jsd(logs, log_p, labels, 0.1), liger.LigerJSD(0.1)(logs, log_p, labels)),
        (functional.liger_kl_div(logs, target, False, False), liger.LigerKLDIVLoss()(logs, target)),
        (
            functional.liger_fused_linear_jsd(*student, *teacher, labels, 0.1, -100, T),
            liger.LigerFusedLinearJSD(0.1, -100, T)(*student, *teacher, labels),
        ),
        (
            functional.liger_fused_linear_kl_div(*student, target, labels, "sum", -100, T),
            liger.LigerFusedLinearKLDivLoss("sum", -100, T)(*student, target, labels),
        ),
    )
    for found, expected in pairs:
        assert torch.equal(found, expected)
    with pytest.raises(TypeError, match=r"^target must be a torch\.Tensor; got NoneType"):
        functional.liger_jsd(logs, None)


# ------------------------------------------------------------------------------------- what differs


def test_hidden_states_of_three_dimensions_are_chunked_P46() -> None:
    """The peak is that of flat ones, and far below the logits of all rows."""
    heads = make_heads(rows=64, vocabulary=4096)
    loss = liger.LigerFusedLinearJSDLoss(chunk_size=4)

    def peak(*leading: int) -> int:
        hidden, teacher = (x.detach().view(*leading, -1) for x in (heads.hidden, heads[3]))
        hidden.requires_grad_()
        labels = heads.labels.view(leading)
        arguments = (hidden, heads.weight, teacher, heads.teacher_weight, labels)
        loss(*arguments).backward()  # whatever is made once
        return cpu_peak(lambda: loss(*arguments).backward()).highest

    flat, cut = peak(64), peak(4, 16)
    assert abs(cut - flat) <= 4096
    weight_gradient = 2 * heads.weight.numel() * 4
    assert cut <= weight_gradient + 3 * 4 * 4096 * 4


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.3, 0.7)])
def test_parts_in_ligers_order_P41(weights: tuple[float, float]) -> None:
    """(loss, soft, hard), a part of weight 0 too; they carry no gradient that would be zero."""
    heads = make()
    arguments = (heads.hidden, heads.weight, *heads.teacher, heads.labels)
    loss = liger.LigerFusedLinearJSDLoss(*weights, temperature=T, return_soft_hard_loss=True)
    total, soft, hard = loss(*arguments, student_bias=heads.bias)
    logits = F.linear(*heads.student)
    taught = F.linear(*heads.teacher)
    kept = heads.labels != -100
    rows = jsd((logits / T).log_softmax(-1), (taught / T).log_softmax(-1), 0.5)
    torch.testing.assert_close(soft, rows[kept].mean().detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(hard, F.cross_entropy(logits, heads.labels).detach())
    torch.testing.assert_close(total.detach(), weights[0] * hard + weights[1] * soft)
    with pytest.raises(RuntimeError, match="does not require grad"):
        soft.backward()


@pytest.mark.parametrize("fused", [True, False])
def test_no_row_that_counts_P47(fused: bool) -> None:
    heads = make()
    labels = torch.full_like(heads.labels, -100)
    student = [heads.hidden, heads.weight]
    if fused:
        loss = liger.LigerFusedLinearKLDivLoss()(*student, probabilities(12, 67), labels)
    else:
        loss = liger.LigerFusedLinearJSDLoss()(*student, *heads.teacher, labels)
    assert loss.item() == 0.0
    assert all(torch.count_nonzero(g) == 0 for g in torch.autograd.grad(loss, student))


def test_what_is_not_a_number_stays_in_an_ignored_row_P20() -> None:
    heads, target = make(), probabilities(12, 67)
    student = [heads.hidden, heads.weight]
    loss = liger.LigerFusedLinearKLDivLoss()
    want = loss(*student, target, heads.labels)
    target[0] = torch.nan
    got = loss(*student, target, heads.labels)
    assert torch.equal(got, want)
    assert all(g.isfinite().all() for g in torch.autograd.grad(got, student))


def test_equal_models_P03() -> None:
    heads = make()
    student = (heads.hidden, heads.weight)
    loss = liger.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)
    same = loss(*student, *(x.detach() for x in student), heads.labels)
    assert abs(same.item()) < 1e-6


def test_attributes_are_the_arguments_and_may_be_changed() -> None:
    heads = make()
    arguments = (heads.hidden, heads.weight, *heads.teacher, heads.labels)
    loss = pickle.loads(pickle.dumps(copy.deepcopy(liger.LigerFusedLinearJSDLoss(beta=0.3))))
    assert loss.state_dict() == {}
    assert "beta=0.3, ignore_index=-100, temperature=1.0, compiled=True" in repr(loss)
    loss.temperature, loss.beta = T, 0.1
    want = liger.LigerFusedLinearJSDLoss(temperature=T, beta=0.1)(*arguments)
    assert torch.equal(loss(*arguments), want)


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_labels_that_only_mask_may_be_any_number(ignore_index: int) -> None:
    heads: Any = make()
    labels = torch.where(heads.labels == -100, ignore_index, heads.labels.clamp(min=1))
    odd = labels.clone()
    odd[1], odd[2] = -1, 67
    student, teacher = heads[:2], heads.teacher
    logits = F.linear(*student).detach()
    arguments: dict[Any, tuple[Tensor, ...]] = {
        liger.LigerFusedLinearJSD: (*student, *teacher),
        liger.LigerFusedLinearKLDivLoss: (*student, F.linear(*teacher).softmax(-1)),
        liger.LigerJSD: (logits.log_softmax(-1), F.linear(*teacher).log_softmax(-1)),
    }
    for kind, tensors in arguments.items():
        loss = kind(ignore_index=ignore_index)
        assert torch.equal(loss(*tensors, odd), kind()(*tensors, heads.labels)), kind
    both = liger.LigerFusedLinearJSDLoss(0.0, 1.0, ignore_index=ignore_index)
    want = liger.LigerFusedLinearJSDLoss(0.0, 1.0)(*student, *teacher, heads.labels)
    assert torch.equal(both(*student, *teacher, odd), want)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 67\)"):
        liger.LigerFusedLinearJSDLoss(ignore_index=ignore_index)(*student, *teacher, odd)


def test_a_target_of_probabilities_is_checked_by_its_name() -> None:
    heads: Any = make()
    target, loss = probabilities(12, 67), liger.LigerFusedLinearKLDivLoss()

    def refused(error: type[Exception], message: str, target: Any, labels: Any = None) -> None:
        with pytest.raises(error, match=message):
            loss(*heads[:2], target, labels)

    refused(TypeError, r"^target must be a torch\.Tensor; got NoneType", None)
    refused(TypeError, r"^target must be float32, .*; got torch\.int64", target.long())
    refused(TypeError, r"^shift_labels must be a torch\.Tensor; got list", target, [1] * 12)
    refused(ValueError, r"^target must have .* vocabulary, \(12, 67\); got \(12, 66\)",
            target[:, 1:])  # fmt: skip
    refused(ValueError, r"^target must not require grad", target.clone().requires_grad_())
    negative = target.clone()
    negative[0, 3] = -0.25
    refused(
        ValueError,
        r"^target must hold probabilities, .*; got -0\.25: if these are logits",
        negative,
    )
    loss(*heads[:2], negative, heads.labels)  # that row does not count
    log_q = torch.randn(12, 67).log_softmax(-1)
    for log_target in (False, True):
        kl = liger.LigerKLDIVLoss(log_target=log_target)
        with pytest.raises(TypeError, match=r"^y_true must be a torch\.Tensor"):
            kl(log_q, None)
        with pytest.raises(ValueError, match=r"^y_true must have .*\(12, 67\); got \(12, 66\)"):
            kl(log_q, target[:, 1:])
        with pytest.raises(ValueError, match=r"^y_true must not require grad"):
            kl(log_q, target.clone().requires_grad_())


def test_options_are_refused_by_ligers_names() -> None:
    heads: Any = make()
    for size in (0, "many"):
        with pytest.raises(ValueError, match=r"^chunk_size must be an int of at least 1; got"):
            liger.LigerFusedLinearJSDLoss(chunk_size=size)
    tensors = (*heads[:2], *heads.teacher, heads.labels)
    for loss in (liger.LigerFusedLinearJSD, liger.LigerFusedLinearKLDivLoss):
        with pytest.raises(TypeError, match=r"^accum_dtype must be None or a torch\.dtype"):
            loss(accum_dtype="float32")
    with pytest.raises(ValueError, match=r"^accum_dtype must be .* torch\.float32; got .*bfloat16"):
        liger.LigerFusedLinearJSD(accum_dtype=torch.bfloat16)(*tensors)
    with pytest.raises(ValueError, match=r"^accum_dtype must be .* torch\.float32; got .*bfloat16"):
        liger.LigerFusedLinearKLDivLoss(accum_dtype=torch.bfloat16)(
            *heads[:2], probabilities(12, 67)
        )


@pytest.mark.parametrize("kind", [liger.LigerFusedLinearJSD, liger.LigerFusedLinearKLDivLoss])
def test_accum_dtype_is_that_of_the_sum_of_weight_gradients(kind: Any) -> None:
    """What is summed in which dtype is tested with the loss itself."""
    for given, used in ((None, None), *((x, x) for x in (torch.float32, torch.bfloat16))):
        assert kind(accum_dtype=given)._loss().grad_accum_dtype == used


def test_refusals() -> None:
    for loss in CLASSES[:3]:
        with pytest.raises(ValueError, match="temperature must be positive"):
            loss(temperature=0.0)
    for loss in (liger.LigerFusedLinearKLDivLoss, liger.LigerKLDIVLoss):
        with pytest.raises(ValueError, match=r"reduction must be one of .*; got 'none'"):
            loss(reduction="none")
    for loss, name in zip(CLASSES[:2], ("beta", "jsd_beta"), strict=True):
        with pytest.raises(ValueError, match=rf"^{name} must be in \[0, 1\]; got 1\.5"):
            loss(**{name: 1.5})
    heads: Any = make()
    with pytest.raises(ValueError, match=r"labels must have .*, \(12,\); got \(11,\)"):
        CLASSES[2]()(*heads[:2], probabilities(12, 67), heads.labels[1:])
    larger = torch.randn(70, heads.teacher_weight.shape[1])
    with pytest.raises(ValueError, match="V = 67 for the student and V = 70 for the teacher"):
        liger.LigerFusedLinearJSDLoss()(*heads[:2], heads.teacher_hidden, larger, heads.labels)
