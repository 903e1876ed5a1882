"""An lm_head is bypassed only if the logits are a multiple of its output."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import tiny
import torch
import transformers
from support.losses import refused
from torch import Tensor, nn

from fused_kd import KDLoss
from fused_kd.integrations._common import heads
from fused_kd.integrations._common.labels import shifted
from fused_kd.integrations._common.models import check_models
from fused_kd.integrations.student_teacher import StudentTeacherLoss
from fused_kd.integrations.transformers import DistillationLoss

IDS = torch.randint(3, tiny.VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
_model = partial(tiny.of, seed=0)


@pytest.mark.parametrize(
    ("kind", "changes", "scale"),
    [
        ("Llama", {}, 1.0),
        ("Qwen3", {"tie_word_embeddings": True}, 1.0),
        ("Cohere", {"logit_scale": 16.0}, 16.0),
        ("Granite", {"logits_scaling": 8.0}, 0.125),
        ("Gemma2", {"final_logit_softcapping": None}, 1.0),
    ],
)
def test_a_bypassed_head_applied_to_the_output_gives_the_logits(
    kind: str, changes: dict[str, object], scale: float
) -> None:
    model = _model(kind, **changes)
    assert heads.scale_of(model) == pytest.approx(scale, rel=1e-6)
    logits = model(input_ids=IDS).logits
    with heads.headless(model):
        hidden = model(input_ids=IDS).logits
    assert hidden.shape[-1] == 16
    torch.testing.assert_close(heads.head_of(model)(hidden), logits, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=0, atol=0)
    assert heads.scale_of(model.half()) == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_soft_capped_head_is_refused_even_if_the_logits_are_small_P04(dtype: torch.dtype) -> None:
    model = _model("Gemma2", final_logit_softcapping=30.0).to(dtype)
    nn.init.normal_(heads.head_of(model).weight, std=5e-4)
    message = r"Gemma2ForCausalLM must be .* times a factor.*heads=False"
    refused(ValueError, message, heads.scale_of, model)
    assert "forward" not in heads.head_of(model).__dict__


class _Changed(nn.Module):
    """A model whose logits are `change` of its lm_head's output."""

    def __init__(self, change: object, bias: bool = False) -> None:
        super().__init__()
        self.head, self.change = nn.Linear(8, 12, bias=bias), change

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> object:
        logits = self.change(self.head(torch.ones(*input_ids.shape, 8)))  # type: ignore[operator]
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


CHANGES = {
    "added": lambda x: x + 1.0,
    "cut": lambda x: x[..., :-1],
    "clamped": lambda x: x.clamp(max=100.0),
    "absolute": lambda x: -x.abs(),
    "normalized": lambda x: x.log_softmax(-1),
    "by column": lambda x: x * torch.arange(12),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change_but_a_factor_is_refused(change: object) -> None:
    refused(ValueError, "times a factor", heads.scale_of, _Changed(change))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_bias_is_scaled_with_the_product(scale: float) -> None:
    model = _Changed(lambda x: scale * x, bias=True)
    logits = model(IDS).logits
    with heads.headless(model):
        hidden = model(IDS).logits
    side = heads.side_of(model, hidden, heads.scale_of(model))
    assert side.scale == 1.0  # the hidden states have it
    torch.testing.assert_close(nn.functional.linear(*side[:3]), logits)
    weights = list(model.head.parameters())
    want = torch.autograd.grad(logits.square().sum(), weights)
    got = torch.autograd.grad(nn.functional.linear(*side[:3]).square().sum(), weights)
    torch.testing.assert_close(got, want)


def test_training_mode_survives_the_probe() -> None:
    model = tiny.llama(0).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    heads.scale_of(model)
    assert [module.training for module in model.modules()] == before


class _Adapted(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + 1.0


def test_a_head_that_does_more_is_refused_by_name() -> None:
    model = tiny.llama(0)
    model.lm_head = _Adapted(16, tiny.VOCABULARY, bias=False)
    message = r"plain nn.Linear for a Head; got a test_lm_heads\._Adapted.*heads=False"
    refused(TypeError, message, heads.head_of, model)
    refused(TypeError, "got none", heads.head_of, nn.Linear(2, 2))


def test_the_weight_of_a_bypassed_head_stays_in_the_graph() -> None:
    # otherwise DistributedDataParallel would treat it as unused
    model = tiny.llama(0)
    with heads.headless(model):
        hidden = model(input_ids=IDS).logits
    nodes, leaves = [hidden.grad_fn], set()
    while nodes:
        node = nodes.pop()
        leaves.add(getattr(node, "variable", None))
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert model.lm_head.weight in leaves
    hidden.sum().backward()
    assert model.lm_head.weight.grad is None


def test_a_deep_copy_bypasses_its_own_head_in_its_own_mode() -> None:
    # for example of averaged weights, which are evaluated while the model trains
    model = tiny.llama(0)
    undo = heads.bypass_head(model)
    copy = deepcopy(model)
    with torch.no_grad():
        copy.lm_head.weight.mul_(2)
    model.train()
    expected = 2 * tiny.llama(0)(input_ids=IDS).logits
    logits = copy(input_ids=IDS).logits
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert copy.lm_head.weight.grad is not None
    assert model.lm_head.weight.grad is None
    assert model(input_ids=IDS).logits.shape[-1] == 16
    assert copy.train()(input_ids=IDS).logits.shape[-1] == 16
    for bypassed in (model, copy):
        message = r"already bypassed.*loss\.remove\(\)"
        refused(ValueError, message, check_models, bypassed, tiny.llama(1), shift=True)
    undo()
    check_models(model, tiny.llama(1), shift=True)
    assert "forward" not in model.lm_head.__dict__


def test_labels_are_shifted_and_the_last_position_is_ignored() -> None:
    labels = torch.tensor([[5, 6, 7], [8, -100, 9]])
    assert shifted(labels).tolist() == [[6, 7, -100], [-100, 9, -100]]


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("Gemma2", "final_logit_softcapping", 0.5),
        ("Cohere", "logit_scale", 0.25),
        ("Granite", "logits_scaling", 4.0),
    ],
)
def test_caps_and_scales_of_logits_are_never_dropped_P04(
    family: str, name: str, value: float
) -> None:
    student, teacher = (tiny.of(family, seed, **{name: value}) for seed in (0, 1))
    batch = tiny.padded(tiny.ragged(3))
    inputs, labels = tiny.split(batch)
    want = KDLoss()(student(**inputs).logits, teacher(**inputs).logits.detach(), shifted(labels))
    for kind in (StudentTeacherLoss, DistillationLoss):
        for is_head in (False,) if family == "Gemma2" else tiny.BOTH:
            adapter = kind(student.train(), teacher, heads=is_head)
            torch.testing.assert_close(tiny.loss_of(adapter, student, batch), want)
        if family == "Gemma2":
            for pair in ((student, tiny.llama(1)), (tiny.llama(0), teacher)):
                refused(ValueError, "soft-capping", kind, *pair, heads=True)
