"""KDLoss.like: other frameworks' numbers, by formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.logits import N, V, make, make_ignored
from support.losses import refused
from torch import Tensor

from fused_kd import Head, KDLoss, TopK
from fused_kd.presets import CONVENTIONS, TAILS

NAMES = ("automodel", "distillkit", "fla", "kdflow", "liger", "megatron", "model_optimizer")
NAMES += ("nemo_rl", "swift", "torchdistill", "torchtune", "trl", "verl")
BETA, T = 0.1, 1.7  # asymmetric on purpose
WEIGHTS = {"hard_weight": 0.3, "soft_weight": 0.7}


def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return KL(q ‖ p) of every row."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def mixture(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))


def jsd(q: Tensor, p: Tensor, beta: float) -> Tensor:
    # Liger, TRL: the teacher q has the weight β, in the mixture and outside
    m = mixture(q, p, beta)
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def kdflow(q: Tensor, p: Tensor, beta: float) -> Tensor:
    # KDFlow: the student p has the weight β
    m = mixture(p, q, beta)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


# name, keywords, and the framework's losses of rows from log q, log p (at T) and the cross-entropy
Row = Callable[[Tensor, Tensor, Tensor], Tensor]
FORMULAS: list[tuple[str, dict[str, Any], Row]] = [
    ("automodel", {}, lambda q, p, ce: T**2 * kl(q, p)),
    ("distillkit", {}, lambda q, p, ce: T**2 * kl(q, p)),
    ("distillkit", {"divergence": "jsd"}, lambda q, p, ce: T**2 * jsd(q, p, 0.5)),
    ("kdflow", {}, lambda q, p, ce: 0.5 * ce + 0.5 * kl(q, p)),
    ("kdflow", {"beta": BETA}, lambda q, p, ce: 0.5 * ce + 0.5 * kdflow(q, p, BETA)),
    ("liger", {}, lambda q, p, ce: 0.5 * ce + 0.5 * jsd(q, p, 0.5)),
    ("liger", {"beta": BETA}, lambda q, p, ce: 0.5 * ce + 0.5 * jsd(q, p, BETA)),
    ("liger", {"beta": 0}, lambda q, p, ce: 0.5 * ce + 0.5 * kl(q, p)),
    ("liger", {"beta": 1.0}, lambda q, p, ce: 0.5 * ce + 0.5 * kl(p, q)),
    ("torchdistill", WEIGHTS, lambda q, p, ce: 0.3 * ce + 0.7 * T**2 * kl(q, p)),
    ("trl", {"beta": BETA}, lambda q, p, ce: jsd(q, p, BETA)),
    ("trl", {"beta": 0.0}, lambda q, p, ce: kl(q, p)),
    ("trl", {"beta": 1}, lambda q, p, ce: kl(p, q)),
    ("swift", {"beta": BETA}, lambda q, p, ce: jsd(q, p, BETA)),
    ("swift", {"beta": 1}, lambda q, p, ce: kl(p, q)),
]


def ghost(log_q: Tensor) -> Tensor:
    """Return log-probabilities (N, K+1) of (N, K), the last one of the mass that is left."""
    return torch.cat([log_q, torch.log1p(-log_q.exp().sum(-1, keepdim=True))], -1)


def alone(log_q: Tensor) -> Tensor:
    return log_q.log_softmax(-1)


def with_tail(change: Callable[[Tensor], Tensor], row: Row = lambda q, p, ce: kl(q, p)) -> Row:
    """Return a loss of log q and log p of the teacher's K tokens, both changed before."""
    return lambda q, p, ce: row(change(q), change(p), ce)


# name, keywords, and the framework's losses of rows from log q, log p (at T) of K tokens
TOP_K: list[tuple[str, dict[str, Any], Row]] = [
    ("axolotl", {}, with_tail(alone)),
    ("distillkit", {}, lambda q, p, ce: T**2 * kl(alone(q), p)),
    ("megatron", {}, lambda q, p, ce: 0.5 * ce + 0.5 * kl(ghost(q), ghost(p))),
    ("model_optimizer", {}, lambda q, p, ce: T**2 * kl(alone(q), alone(p))),
    ("nemo_rl", {}, with_tail(alone)),
    ("nemo_rl", {"divergence": "reverse_kl"}, with_tail(alone, lambda q, p, ce: kl(p, q))),
    ("swift", {"beta": BETA}, with_tail(alone, lambda q, p, ce: jsd(q, p, BETA))),
    ("trl", {"beta": BETA}, with_tail(ghost, lambda q, p, ce: jsd(q, p, BETA))),
    ("verl", {}, lambda q, p, ce: kl(alone(q), p)),
]


def _distributions(student: Tensor, teacher: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Return log q of the teacher and log p of the student at temperature t, in float64."""
    s, t_ = student.double() / t, teacher.double() / t
    return F.log_softmax(t_, -1), F.log_softmax(s, -1)


@pytest.mark.parametrize(("name", "keywords", "rows"), FORMULAS)
def test_the_frameworks_number_and_its_gradient_P01_P09(
    name: str, keywords: dict[str, Any], rows: Row
) -> None:
    student, teacher, labels = make_ignored()
    got = KDLoss.like(name, temperature=T, **keywords)(student, teacher, labels)
    exact = student.detach().double().requires_grad_()
    ce = F.cross_entropy(exact, labels, reduction="none")
    kept = labels != -100
    want = rows(*_distributions(exact, teacher, T), ce)[kept].mean()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    got.backward()
    want.backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "keywords", "rows"), TOP_K)
def test_a_top_k_teacher_with_the_frameworks_tail(
    name: str, keywords: dict[str, Any], rows: Row
) -> None:
    student, teacher, labels = make_ignored()
    topk = TopK.from_logits(teacher, 4, T)._replace(tail=TAILS[name])
    # axolotl's loss has no preset: its weights are settings of its recipes
    preset = KDLoss.like("verl" if name == "axolotl" else name, temperature=T, **keywords)
    got = preset(student, topk, labels)
    exact = student.detach().double().requires_grad_()
    ce = F.cross_entropy(exact, labels, reduction="none")
    log_q, log_p = _distributions(exact, teacher, T)
    kept = labels != -100
    terms = rows(*(x.gather(-1, topk.token_ids) for x in (log_q, log_p)), ce)
    want = torch.where(kept, terms, 0) if name == "model_optimizer" else terms[kept].mean()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_what_needs_no_labels() -> None:
    student, teacher, _ = make()
    q, p = _distributions(student, teacher, 1.0)
    fla = KDLoss.like("fla")(student, teacher)
    torch.testing.assert_close(fla.double(), kl(q, p).mean(), rtol=1e-5, atol=1e-6)
    tuned = KDLoss.like("torchtune")(student, teacher)
    soft_cross_entropy, entropy = -(q.exp() * p).sum(-1).mean(), -(q.exp() * q).sum(-1).mean()
    torch.testing.assert_close(tuned.double() + entropy, soft_cross_entropy, rtol=1e-5, atol=1e-6)
    q, p = _distributions(student, teacher, T)
    rows = KDLoss.like("model_optimizer", temperature=T)(student, teacher)
    torch.testing.assert_close(rows.double(), T**2 * kl(q, p), rtol=1e-5, atol=1e-6)


def test_the_names() -> None:
    assert tuple(CONVENTIONS) == NAMES
    assert set(TAILS) - {"axolotl"} <= set(NAMES)
    assert {name for name, _, _ in TOP_K} == set(TAILS)
    assert KDLoss.like.__doc__
    refused(ValueError, r"'automodel', .*'verl'; got 'leger'$", KDLoss.like, "leger")
    message = "got 'axolotl', whose teacher is top-k .* use fused_kd.integrations.axolotl"
    refused(ValueError, message, KDLoss.like, "axolotl")


@pytest.mark.parametrize("name", NAMES)
def test_heads_have_the_convention_of_logits(name: str) -> None:
    loss = KDLoss.like(name, beta=0.4)
    s, t = (Head(torch.randn(N, 4), torch.randn(V, 4)) for _ in range(2))
    _, _, labels = make_ignored()
    logits = (side.hidden @ side.weight.T for side in (s, t))
    torch.testing.assert_close(loss(s, t, labels), loss(*logits, labels))


@pytest.mark.parametrize(
    ("name", "beta", "keywords"),
    [
        ("liger", 0.0, {"hard_weight": 0.0, "soft_scale": "t2", "divergence": "tvd"}),
        ("kdflow", 0.9, {"divergence": "reverse_kl"}),
        ("trl", 0.5, {"chunk_rows": 7}),
        ("trl", 0.5, {"inplace": True}),
    ],
)
def test_the_callers_keywords_come_first(name: str, beta: float, keywords: dict[str, Any]) -> None:
    loss = KDLoss.like(name, **keywords, beta=beta)
    assert keywords.items() <= vars(loss.options).items()
    assert KDLoss.like("liger", hard_weight=0.0).options.soft_weight == 0.5


@pytest.mark.parametrize("name", ["liger", "trl", "kdflow"])
def test_a_beta_outside_its_range_is_shown_as_it_came(name: str) -> None:
    like = partial(KDLoss.like, name)
    refused(ValueError, r"beta must be in \(0, 1\) .*; got 1\.5", like, beta=1.5)
    refused(TypeError, "beta must be a Python number", like, beta="half")
    divergence = {} if name == "kdflow" else {"divergence": "jsd"}  # which has no ends
    refused(ValueError, r"got 0\.0", like, beta=0, **divergence)
