"""The loss of TRL's DistillationTrainer: numbers, shards, older versions, refusals.

On a CPU TRL's own loss runs its torch fallback: the same chunks, without Triton.
"""

from __future__ import annotations

import inspect
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from needs import need
from support.losses import refused
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from trl_training import BETAS, V, same, trained, trainer_of

need("trl")
from trl import DistillationTrainer  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

from fused_kd import Head  # noqa: E402
from fused_kd.integrations.trl import use_fused_kd  # noqa: E402
from fused_kd.integrations.trl.distillation import called, entropies  # noqa: E402
from fused_kd.testing import cpu_peak  # noqa: E402

THEIRS = distillation_trainer._chunked_divergence_loss
OPTIONS: dict[str, Any] = {"backend": "auto", "memory_budget": None}
SIGNATURE = inspect.signature(THEIRS)
OF_1_14 = "chunk_size" in SIGNATURE.parameters  # or older
OURS = partial(called, SIGNATURE, True, OPTIONS)
distillation = partial(trainer_of, "distillation")


def test_without_entropy(tmp_path: Path) -> None:
    own = trained(distillation(tmp_path))
    ours = trained(use_fused_kd(distillation(tmp_path), entropy=False))
    same((*ours[:2], []), (*own[:2], []))
    assert own[2]
    assert ours[2] == [None] * len(own[2])


def tensors(bias: bool = True) -> dict[str, Any]:
    """Return arguments of TRL's function; the student's tensors are leaves that require grad."""
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    arguments: dict[str, Any] = {"completion_mask": mask, **({"chunk_size": 4} if OF_1_14 else {})}
    for model, hidden in (("student", 8), ("teacher", 12)):
        shapes = {"hidden_states": (3, 5, hidden), "lm_head_weight": (V, hidden)}
        for name, shape in (shapes | ({"lm_head_bias": (V,)} if bias else {})).items():
            arguments[f"{model}_{name}"] = torch.randn(shape, requires_grad=model == "student")
    return arguments


def outcome(loss: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Return loss, entropy, number of tokens, gradients w.r.t. the inputs that require grad."""
    value, entropy, count = loss(**inputs)
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    return [value, entropy, count, *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", BETAS)
def test_same_numbers(beta: float, temperature: float) -> None:
    scales = {"student_logit_scale": 0.5, "teacher_logit_scale": 0.3}
    cases = (True, None, {}), (True, torch.tensor(7), scales), (False, 5, scales)
    for bias, items, more in cases:
        inputs = {**tensors(bias), "beta": beta, "temperature": temperature, **more}
        inputs["num_items_in_batch"] = items
        ours, theirs = (outcome(loss, inputs) for loss in (OURS, THEIRS))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_no_token_counts() -> None:
    inputs = {**tensors(), "beta": 0.5}
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    assert not any(x.count_nonzero() for x in outcome(OURS, inputs))


def test_bfloat16_hidden_states_of_a_float32_head() -> None:
    inputs = {**tensors(bias=False), "beta": 0.5}
    for name in ("student_hidden_states", "teacher_hidden_states"):
        inputs[name] = inputs[name].detach().bfloat16().requires_grad_(name.startswith("student"))
    inputs["teacher_lm_head_weight"].requires_grad_()  # TRL does not freeze the teacher
    ours, theirs = (OURS(**inputs)[0], THEIRS(**inputs)[0])
    rtol = 2e-3 if OF_1_14 else 1e-5  # 1.14 does not round the weights to 16 bits
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-6)


def test_without_a_copy_of_the_uniform_logits() -> None:
    rows, vocabulary = 512, 8192
    head = Head(torch.randn(1, rows, 16), torch.randn(vocabulary, 16))
    labels = torch.zeros(1, rows, dtype=torch.int64)
    options = {"backend": "auto", "memory_budget": 2**20}
    call = partial(entropies, head, labels, 1.0, options)
    assert cpu_peak(call).highest < rows * vocabulary * 4 / 4
    log_p = (head.hidden @ head.weight.t()).log_softmax(-1)
    torch.testing.assert_close(call(), -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("one_process")
def test_a_teachers_shards_are_gathered_and_a_trained_heads_are_refused() -> None:
    """Refuse a student's: full_tensor()'s backward gives a shard only its rank's gradient."""
    inputs = {**tensors(), "beta": 0.1}
    mesh = init_device_mesh("cpu", (1,))

    def sharded(model: str) -> dict[str, Any]:
        names = [name for name in inputs if name.startswith(f"{model}_lm_head")]
        shards = {n: distribute_tensor(inputs[n].detach(), mesh, [Shard(0)]) for n in names}
        heads = {n: shards[n].requires_grad_(inputs[n].requires_grad) for n in names}
        return {**inputs, **heads}

    torch.testing.assert_close(outcome(OURS, sharded("teacher")), outcome(OURS, inputs))
    with pytest.raises(TypeError, match=r"student\.weight must be a local tensor; got a DTensor"):
        outcome(OURS, sharded("student"))


#: Parameters of other versions: in another order, the older ones with other names.
BEFORE_KERNELS = """
    student_hidden_states, teacher_hidden_states, student_lm_head_weight, teacher_lm_head_weight,
    completion_mask, beta, chunk_size, num_items_in_batch=None, student_lm_head_bias=None,
    teacher_lm_head_bias=None, student_logit_scale=1.0, teacher_logit_scale=1.0,
    student_final_logit_softcapping=None, teacher_final_logit_softcapping=None, temperature=1.0"""
BEFORE_SCALES = """
    student_hidden, student_lm_head_weight, teacher_hidden, teacher_lm_head_weight, mask, beta,
    chunk_size, num_items_in_batch=None, student_lm_head_bias=None, teacher_lm_head_bias=None"""


def function_of(parameters: str) -> Any:
    """Return a function with this list of parameters; only its signature matters."""
    return eval(f"lambda {' '.join(parameters.split())}: None")


@pytest.mark.parametrize("version", [BEFORE_KERNELS, BEFORE_SCALES])
def test_arguments_in_the_order_of_other_versions(version: str) -> None:
    # only their signatures: those versions cannot be installed next to this one
    inputs = {**tensors(), "beta": 0.1, "num_items_in_batch": 5, "chunk_size": 256}
    inputs |= {
        f"{model}_hidden": inputs[f"{model}_hidden_states"] for model in ("student", "teacher")
    }
    inputs["mask"] = inputs["completion_mask"]
    signature = inspect.signature(function_of(version))
    values = [inputs[name] for name in [*signature.parameters][:10]]
    loss, _, count = called(signature, False, OPTIONS, *values)
    own = {name: x for name, x in inputs.items() if name in SIGNATURE.parameters}
    torch.testing.assert_close((loss, count), THEIRS(**own)[::2], rtol=1e-5, atol=1e-6)


def test_unknown_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = distillation(tmp_path)
    newer = function_of("student_hidden_states, skew")
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", newer)
    message = r"has \['skew'\] and lacks \['beta', .*works with trl 1"
    refused(TypeError, message, use_fused_kd, trainer)
    monkeypatch.delattr(distillation_trainer, "_chunked_divergence_loss")
    refused(TypeError, "does not call _chunked_divergence_loss", use_fused_kd, trainer)
    monkeypatch.delattr(DistillationTrainer, "_compute_loss")  # before TRL 1.10
    message = r"has no _compute_loss in trl 1\..*trl 1\.10\.0 to 1\."
    refused(TypeError, message, use_fused_kd, trainer)


def test_a_scale_that_an_older_version_drops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = distillation(tmp_path, "Granite", {"logits_scaling": 3.0})
    older = function_of(BEFORE_SCALES)
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", older)
    use_fused_kd(distillation(tmp_path))
    message = r"the student scales its logits .*upgrade trl"
    refused(ValueError, message, use_fused_kd, scaled)


def test_soft_capped_logits(tmp_path: Path) -> None:
    capped = {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
    message = r"student soft-caps .*=2\.0.*use TRL's own loss"
    refused(ValueError, message, use_fused_kd, distillation(tmp_path, "Gemma2", capped))
    inputs = {**tensors(), "beta": 0.5, "teacher_final_logit_softcapping": 3.0}
    refused(ValueError, "teacher soft-caps", OURS, **inputs)


def test_heads_are_measured_regardless_of_their_configuration(tmp_path: Path) -> None:
    # TRL reads some names of a soft-cap, but not all
    trainer = distillation(tmp_path)
    student = trainer.model
    capped = {"logits_soft_cap": 0.5, "lru_width": 16, "num_hidden_layers": 3}
    trainer.model = tiny.of("RecurrentGemma", 1, **capped)
    message = r"the student cannot be used with .* \(the logits of Rec.*\): use a GKDTrainer"
    refused(ValueError, message, use_fused_kd, trainer)
    trainer.model = student
    trainer.teacher_model.config.logit_scale = 2.0  # which Llama does not
    message = r"teacher scales its logits by 1, .* by 2: upgrade trl"
    refused(ValueError, message, use_fused_kd, trainer)


class OwnLoss(DistillationTrainer):
    def _compute_loss(self, *arguments: Any) -> Any:
        loss, *rest = super()._compute_loss(*arguments)
        return 2 * loss, *rest


def test_wrong_trainers_and_options(tmp_path: Path) -> None:
    message = r"must not override DistillationTrainer\._compute_loss.*got OwnLoss\._compute_loss"
    refused(TypeError, message, use_fused_kd, distillation(tmp_path, kind=OwnLoss))
    message = "heads of a DistillationTrainer must be True"
    refused(ValueError, message, use_fused_kd, distillation(tmp_path), heads=False)
    assert math.isnan(called(SIGNATURE, False, OPTIONS, **tensors(), beta=0.5)[1])  # no entropy
