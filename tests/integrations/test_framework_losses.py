"""Compare with the losses of Automodel, axolotl, ms-swift and verl, from their installed files.

The packages need training stacks that CI does not install, so only these files are loaded. Values
and gradients, theirs and ours, are compared with float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from needs import need_file, need_functions
from support.losses import outcome, parameters
from torch import Tensor

from fused_kd import KDLoss
from fused_kd.integrations import automodel, axolotl, verl
from fused_kd.teachers.servers import from_axolotl, from_swift

own_automodel = need_file("nemo-automodel", "nemo_automodel/components/loss/kd_loss.py")
own_axolotl = need_file("axolotl", "axolotl/integrations/kd/topk_logprob/forward_kl.py")
own_swift = need_file("ms-swift", "swift/rlhf_trainers/gkd_loss.py")

B, S, V, K = 2, 6, 31, 4
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
TEMPERATURES = pytest.mark.parametrize("temperature", [1.0, 1.7])
Loss = Callable[[Tensor], Tensor]


def logits(dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(B, S, V)).to(dtype)


def check(own: Loss, ours: Loss, exact: Loss, student: Tensor) -> None:
    """Assert that both losses and their gradients are those of `exact` on float64 logits."""
    want = outcome(exact, [student.double()])
    rounding = torch.finfo(student.dtype).eps / 2  # of the gradient
    for loss in (own, ours):
        got = [x.double() for x in outcome(loss, [student])]
        torch.testing.assert_close(got, want, rtol=max(2e-5, rounding), atol=1e-6)


def test_the_signatures_are_the_same() -> None:
    assert parameters(axolotl.loss) == parameters(own_axolotl.loss)
    for ours, own in (
        (automodel.KDLoss, own_automodel.KDLoss),
        (axolotl.ChunkedTopKKDLoss, own_axolotl.ChunkedTopKKDLoss),
    ):
        for name in ("__init__", "forward"):
            assert parameters(getattr(ours, name)) == parameters(getattr(own, name))


# ------------------------------------------------------------------------------- a dense teacher


@DTYPES
@TEMPERATURES
@pytest.mark.parametrize("count", [None, 11])
@pytest.mark.parametrize("chunk_size", [0, 3])
def test_automodel(
    dtype: torch.dtype, temperature: float, count: int | None, chunk_size: int
) -> None:
    student, teacher, labels = logits(dtype), logits(dtype), torch.randint(V, (B, S))
    labels[0, :2] = -100
    kept = labels != -100

    def exact(student: Tensor) -> Tensor:
        p, q = ((x[kept] / temperature).log_softmax(-1) for x in (student, teacher.double()))
        total = temperature**2 * (q.exp() * (q - p)).sum()
        return total / (kept.sum() if count is None else count)

    keywords = {"teacher_logits": teacher, "labels": labels, "num_batch_labels": count}
    own, ours = (
        partial(module.KDLoss(temperature=temperature, chunk_size=chunk_size), **keywords)
        for module in (own_automodel, automodel)
    )
    check(own, ours, exact, student)
    preset = KDLoss.like("automodel", temperature=temperature)
    check(own, lambda s: preset(s, teacher, labels, num_items=count), exact, student)


@TEMPERATURES
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_ms_swift_by_the_preset_of_trl(temperature: float, beta: float) -> None:
    student, teacher, labels = logits(), logits(), torch.randint(V, (B, S))
    labels[0, :2] = -100

    def own(student: Tensor) -> Tensor:  # computes in the logits' dtype: exact in float64
        signal = own_swift.TeacherOutput(full_logits=teacher.to(student.dtype))
        total, count = own_swift.gkd_loss(student, signal, labels, beta, temperature)
        return total / count

    ours = KDLoss.like("trl", beta=beta, temperature=temperature)
    check(own, lambda s: ours(s, teacher, labels), own, student)


# ------------------------------------------------------------------------------- a top-k teacher


@TEMPERATURES
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_ms_swift_with_a_top_k_teacher(temperature: float, beta: float) -> None:
    student, labels = logits(), torch.randint(V, (B, S))
    labels[0, :2] = -100
    logs, ids = logits().log_softmax(-1).topk(K)
    logs[1, 1] = -torch.inf  # ms-swift leaves the row out of the mean: its label must be -100
    own_labels, labels[1, 1] = labels.clone(), -100

    def own(student: Tensor) -> Tensor:
        signal = own_swift.TeacherOutput(topk_logprobs=logs.to(student.dtype), topk_indices=ids)
        total, count = own_swift.gkd_loss(student, signal, own_labels, beta, temperature)
        return total / count

    ours = KDLoss.like("swift", beta=beta, temperature=temperature)
    teacher = from_swift(ids, logs)
    check(own, lambda s: ours(s, teacher, labels), own, student)


@DTYPES
def test_verl(dtype: torch.dtype) -> None:
    used: dict[str, Any] = {"F": torch.nn.functional}
    used["get_ulysses_sequence_parallel_world_size"] = lambda: 1
    path = "verl/trainer/distillation/fsdp/losses.py"
    functions = "kl_divergence", "compute_forward_kl_topk"
    kl_divergence, _ = need_functions("verl", path, *functions, **used).values()
    used["kl_divergence"] = kl_divergence
    own_verl = need_functions("verl", path, functions[1], **used)[functions[1]]
    logs, ids = (x.flatten(0, 1) for x in logits().log_softmax(-1).topk(K))
    jagged = partial(torch.nested.nested_tensor, layout=torch.jagged)
    sizes = [5, B * S - 5]
    teacher = [jagged(list(x.split(sizes))) for x in (logs, ids)]
    config = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=None))
    kept = torch.ones(B * S, dtype=torch.bool)
    kept[[4, -1]] = False  # the last row of each sequence is padding

    def own(student: Tensor) -> Tensor:
        rows = student.flatten(0, 1)[None]
        values = own_verl(rows, *teacher, config, "thd")["distillation_losses"]
        return values[0][kept]

    def exact(student: Tensor) -> Tensor:
        log_p = student.flatten(0, 1).log_softmax(-1).gather(-1, ids)
        return (logs.double().exp() * (logs.double() - log_p)).sum(-1)[kept]

    def ours(student: Tensor) -> Tensor:
        return verl.forward_kl_topk(student.flatten(0, 1)[None], *teacher)[0][kept]

    # verl's log-probabilities have the dtype of the logits
    check(ours if dtype == torch.bfloat16 else own, ours, exact, logits(dtype))


@TEMPERATURES
def test_the_trainer_of_axolotl(temperature: float) -> None:
    """Compare with its loss of renormalised tokens, whose value and gradient differ by T²."""
    utils = need_file("axolotl", "axolotl/integrations/kd/utils.py")
    (own_kl,) = need_functions(
        "axolotl",
        "axolotl/integrations/kd/kernels/liger.py",
        "distillation_loss_fn",
        normalize_logprobs=utils.normalize_logprobs,
    ).values()
    student = logits()
    logs, ids = (logits() / temperature).log_softmax(-1).topk(K)
    logs = logs.log_softmax(-1)  # as kd_normalize_topk
    mask = torch.ones(B, S, K).int()
    mask[0, 1] = 0

    def own(student: Tensor) -> Tensor:
        rows = student.flatten(0, 1) / temperature
        return own_kl(rows, *(x.flatten(0, 1) for x in (ids, logs, mask)))

    def exact(student: Tensor) -> Tensor:
        log_p = (student / temperature).gather(-1, ids).log_softmax(-1)
        return (logs.double().exp() * (logs.double() - log_p) * mask).sum()

    teacher = from_axolotl(ids, logs, mask, temperature=temperature)
    options = {"hard_weight": 0.0, "soft_weight": 1.0, "soft_scale": "none", "reduction": "sum"}
    ours = KDLoss(temperature=temperature, **options)
    check(own, lambda s: ours(s, teacher), exact, student)


@DTYPES
@TEMPERATURES
@pytest.mark.parametrize("count", [-1, 9])
@pytest.mark.parametrize("chunks", [0, 1, 3, 8])
@pytest.mark.parametrize("repeated", [False, True])
def test_axolotl(
    dtype: torch.dtype, temperature: float, count: int, chunks: int, repeated: bool
) -> None:
    """Compare on log-probabilities that do not sum to 1, and on a row without entries."""
    student = logits(dtype)
    logs, ids = logits()[:, : S - 1].log_softmax(-1).topk(K)  # a teacher of fewer tokens
    mask = torch.rand(B, S - 1, K) > 0.3
    mask[0, 1] = False
    if repeated:
        ids[..., 1] = ids[..., 0]
        ids[1] = ids[1, :, :1]  # some entries of that token are masked
    teacher = ids.where(mask, 0), logs, mask.long()

    def exact(student: Tensor) -> Tensor:
        p = (student[:, : S - 1] / temperature).log_softmax(-1).gather(-1, teacher[0])
        terms = (logs.double().exp() * (logs.double() - p))[mask]
        return terms.sum() / (count if count > 0 else len(terms))

    def loss(module: Any, student: Tensor) -> Any:
        if chunks:
            return module.ChunkedTopKKDLoss(chunks, temperature)(student, *teacher, count)
        return module.loss(student, *teacher, count, temperature)

    ours = partial(loss, axolotl)
    check(partial(loss, own_axolotl), ours, exact, student)
