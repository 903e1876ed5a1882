"""The losses with Liger's signatures: chunks, parts, masks.

test_adapter_messages.py has the refusals; tests/integrations/test_liger.py compares the numbers
with the installed Liger.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.heads import Heads, make_heads
from support.losses import outcome, refused
from torch import Tensor, nn

from fused_kd.integrations import liger
from fused_kd.integrations.liger import functional
from fused_kd.testing import cpu_peak

T = 1.7


def make() -> Heads:
    """Return heads with labels that ignore every third row, the first included."""
    heads = make_heads(rows=12, vocabulary=67)
    heads.labels[::3] = -100
    return heads


def probabilities(*shape: int) -> Tensor:
    """Return rows of probabilities, five of them 0 in each; the second row sums to a half."""
    p = torch.randn(*shape).softmax(-1)
    p[..., :5] = 0
    p /= p.sum(-1, keepdim=True)
    p[1] /= 2
    return p


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("log_target", [True, False])
def test_kl_div_is_that_of_torch(reduction: str, log_target: bool) -> None:
    """Compare with the class that Liger's derives from; Liger's kernel needs a GPU."""
    target = torch.randn(6, 31).log_softmax(-1) if log_target else probabilities(6, 31)
    options, logits = {"reduction": reduction, "log_target": log_target}, torch.randn(6, 31)
    ours, exact = (
        outcome(lambda x, q, kind=kind: kind(**options)(x.log_softmax(-1), q), [x], q)
        for kind, x, q in (
            (liger.LigerKLDIVLoss, logits, target),
            (nn.KLDivLoss, logits.double(), target.double()),
        )
    )
    torch.testing.assert_close([x.double() for x in ours], exact, rtol=1e-5, atol=1e-6)


def test_the_functions_are_the_classes() -> None:
    """Check orders and defaults of arguments: liger_kl_div divides by N·V, ignores size_average."""
    heads: Any = make()
    tensors, labels = (*heads[:2], *heads.teacher), heads.labels
    target, logs = probabilities(12, 67), torch.randn(12, 67).log_softmax(-1)
    log_p = F.linear(*heads.teacher).log_softmax(-1)
    jsd = functional.liger_fused_linear_jsd, liger.LigerFusedLinearJSD(0.1, -100, T)
    kl = functional.liger_fused_linear_kl_div, liger.LigerFusedLinearKLDivLoss("sum", -100, T)
    for function, loss, inputs, options in (
        (functional.liger_jsd, liger.LigerJSD(0.1), (logs, log_p, labels), (0.1,)),
        (functional.liger_kl_div, liger.LigerKLDIVLoss(), (logs, target), (False, False)),
        (*jsd, (*tensors, labels), (0.1, -100, T)),
        (*kl, (*heads[:2], target, labels), ("sum", -100, T)),
    ):
        assert torch.equal(function(*inputs, *options), loss(*inputs))


# ------------------------------------------------------------------------------------- what differs


def test_hidden_states_of_three_dimensions_are_chunked_P46() -> None:
    """Compare peaks of memory: that of flat hidden states, far below the logits of all rows."""
    heads = make_heads(rows=64, vocabulary=4096)
    loss = liger.LigerFusedLinearJSDLoss(chunk_size=4)

    def peak(*leading: int) -> int:
        hidden, teacher = (x.detach().view(*leading, -1) for x in (heads.hidden, heads[3]))
        hidden.requires_grad_()
        labels = heads.labels.view(leading)
        arguments = (hidden, heads.weight, teacher, heads.teacher_weight, labels)
        loss(*arguments).backward()  # makes what is cached
        return cpu_peak(lambda: loss(*arguments).backward()).highest

    flat, cut = peak(64), peak(4, 16)
    assert abs(cut - flat) <= 4096
    weight_gradient = 2 * heads.weight.numel() * 4
    assert cut <= weight_gradient + 3 * 4 * 4096 * 4


def test_parts_carry_no_gradient_P41() -> None:
    """Assert that the backward of a part raises; in Liger its gradient is 0."""
    heads = make()
    arguments = (heads.hidden, heads.weight, *heads.teacher, heads.labels)
    _, soft, hard = liger.LigerFusedLinearJSDLoss(return_soft_hard_loss=True)(*arguments)
    for part in (soft, hard):
        refused(RuntimeError, "does not require grad", part.backward)


def test_an_ignored_row_may_hold_anything_P20() -> None:
    heads, target = make(), probabilities(12, 67)
    student = [heads.hidden, heads.weight]
    loss = liger.LigerFusedLinearKLDivLoss()
    want = loss(*student, target, heads.labels)
    for anything in (torch.nan, -1.0):
        target[0] = anything
        got = loss(*student, target, heads.labels)
        assert torch.equal(got, want)
        assert all(g.isfinite().all() for g in torch.autograd.grad(got, student))


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
        kept = [x[heads.labels != -100] if len(x) == 12 else x for x in tensors]
        torch.testing.assert_close(loss(*tensors, odd), kind()(*kept, None), msg=str(kind))
    both = liger.LigerFusedLinearJSDLoss(0.0, 1.0, ignore_index=ignore_index)
    want = liger.LigerFusedLinearJSDLoss(0.0, 1.0)(*student, *teacher, heads.labels)
    assert torch.equal(both(*student, *teacher, odd), want)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 67\)"):
        liger.LigerFusedLinearJSDLoss(ignore_index=ignore_index)(*student, *teacher, odd)


@pytest.mark.parametrize("kind", [liger.LigerFusedLinearJSD, liger.LigerFusedLinearKLDivLoss])
def test_accum_dtype_is_that_of_the_sum_of_weight_gradients(kind: Any) -> None:
    """Check that the option is passed on; test_heads.py checks the sums."""
    for dtype, used in ((None, None), *((x, x) for x in (torch.float32, torch.bfloat16))):
        assert kind(accum_dtype=dtype)._loss().grad_accum_dtype == used
