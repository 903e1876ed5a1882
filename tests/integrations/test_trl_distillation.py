"""TRL's DistillationTrainer trains and logs as before, also as its older versions call the loss.

On a CPU TRL's own loss runs its torch fallback: the same chunks, without Triton.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from needs import need
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from trl_training import BETAS, V, models, prompts, same, settings, tokenizer, trained

need("trl")
from trl import DistillationConfig, DistillationTrainer  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

from fused_kd import Head  # noqa: E402
from fused_kd.integrations.trl import restore, use_fused_kd  # noqa: E402
from fused_kd.integrations.trl.distillation import called, entropies  # noqa: E402
from fused_kd.testing import cpu_peak  # noqa: E402

THEIRS = distillation_trainer._chunked_divergence_loss
OPTIONS: dict[str, Any] = {"backend": "auto", "memory_budget": None}
SIGNATURE = inspect.signature(THEIRS)
OF_1_14 = "chunk_size" in SIGNATURE.parameters  # or older
OURS = partial(called, SIGNATURE, True, OPTIONS)


def distillation(
    folder: Path, family: str = "Llama", changes: Any = None, kind: Any = None, **given: Any
) -> DistillationTrainer:
    """Return a trainer whose student, teacher and prompts are always the same."""
    arguments = DistillationConfig(**settings(folder, **{"max_completion_length": 6, **given}))
    data = {"train_dataset": prompts(), "eval_dataset": prompts(4)}
    pair = models(family, **(changes or {}))
    made = kind or DistillationTrainer
    return made(*pair, args=arguments, **data, processing_class=tokenizer())


def entropy_of(trainer: DistillationTrainer) -> list[float | None]:
    return tiny.logged(trainer, "entropy")


# ------------------------------------------------------------------------------ training


@pytest.mark.parametrize(
    ("beta", "accumulation"), [*((beta, 1) for beta in BETAS), (0.5, 4), (1.0, 4)]
)
def test_training(tmp_path: Path, beta: float, accumulation: int) -> None:
    make = partial(distillation, tmp_path, beta=beta, gradient_accumulation_steps=accumulation)
    own, ours = make(), use_fused_kd(make())
    same(trained(ours), trained(own))
    assert entropy_of(ours) == pytest.approx(entropy_of(own), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes"), [("Granite", {"logits_scaling": 3.0}), ("Cohere", {"logit_scale": 0.3})]
)
def test_scaled_logits_and_temperature(tmp_path: Path, kind: str, changes: Any) -> None:
    make = partial(distillation, tmp_path, kind, changes, temperature=0.8)
    same(trained(use_fused_kd(make())), trained(make()))


def test_the_defaults_of_trl(tmp_path: Path) -> None:
    make = partial(distillation, tmp_path, bf16=True, gradient_checkpointing=True, max_steps=1)
    (ours, _), (theirs, _) = trained(use_fused_kd(make())), trained(make())
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)


def test_without_entropy(tmp_path: Path) -> None:
    own, ours = distillation(tmp_path), use_fused_kd(distillation(tmp_path), entropy=False)
    same(trained(ours), trained(own))
    assert entropy_of(ours) == [None] * len(entropy_of(own))


def test_evaluation(tmp_path: Path) -> None:
    scores = []
    for trainer in (use_fused_kd(distillation(tmp_path)), distillation(tmp_path)):
        torch.manual_seed(0)
        scores.append(trainer.evaluate())
    for name in ("eval_loss", "eval_entropy"):
        assert scores[0][name] == pytest.approx(scores[1][name], rel=1e-4)


def test_only_this_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = partial(distillation, tmp_path, max_steps=1)
    trainer, other = use_fused_kd(make()), make()
    assert distillation_trainer._chunked_divergence_loss is THEIRS
    assert "_compute_loss" not in vars(other)

    def never(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("TRL's own loss")

    with monkeypatch.context() as broken:
        broken.setattr(distillation_trainer, "_chunked_divergence_loss", never)
        with pytest.raises(AssertionError, match="own loss"):
            other.train()
        trained(trainer)
    assert "_compute_loss" not in vars(restore(trainer))
    same(trained(restore(use_fused_kd(make()))), trained(make()))


# ------------------------------------------------------------------------------ the loss alone


def tensors(bias: bool = True) -> dict[str, Any]:
    """Return arguments of TRL's function; the student's are leaves."""
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    made: dict[str, Any] = {"completion_mask": mask, **({"chunk_size": 4} if OF_1_14 else {})}
    for model, hidden in (("student", 8), ("teacher", 12)):
        shapes = {"hidden_states": (3, 5, hidden), "lm_head_weight": (V, hidden)}
        for name, shape in (shapes | ({"lm_head_bias": (V,)} if bias else {})).items():
            made[f"{model}_{name}"] = torch.randn(shape, requires_grad=model == "student")
    return made


def outcome(loss: Any, given: dict[str, Any]) -> list[Tensor]:
    """Return loss, entropy, number of tokens and gradients."""
    value, entropy, count = loss(**given)
    leaves = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
    return [value, entropy, count, *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", BETAS)
def test_same_numbers(beta: float, temperature: float) -> None:
    scales = {"student_logit_scale": 0.5, "teacher_logit_scale": 0.3}
    for bias, items, more in (
        (True, None, {}),
        (True, torch.tensor(7), scales),
        (False, 5, scales),
    ):
        given = {**tensors(bias), "beta": beta, "temperature": temperature, **more}
        given["num_items_in_batch"] = items
        ours, theirs = (outcome(loss, given) for loss in (OURS, THEIRS))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_no_token_counts() -> None:
    given = {**tensors(), "beta": 0.5}
    given["completion_mask"] = torch.zeros_like(given["completion_mask"])
    for found in outcome(OURS, given):
        assert not found.count_nonzero()


def test_narrow_hidden_states_of_a_wide_head() -> None:
    given = {**tensors(bias=False), "beta": 0.5}
    for name in ("student_hidden_states", "teacher_hidden_states"):
        given[name] = given[name].detach().bfloat16().requires_grad_(name.startswith("student"))
    given["teacher_lm_head_weight"].requires_grad_()  # TRL does not freeze the teacher
    ours, theirs = (OURS(**given)[0], THEIRS(**given)[0])
    rtol = 2e-3 if OF_1_14 else 1e-5  # 1.14 does not round the weights to 16 bits
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-6)


def test_without_a_copy_of_the_uniform_logits() -> None:
    rows, vocabulary = 512, 8192
    head = Head(torch.randn(1, rows, 16), torch.randn(vocabulary, 16))
    labels = torch.zeros(1, rows, dtype=torch.int64)
    options = {"backend": "auto", "memory_budget": 2**20}
    made = cpu_peak(partial(entropies, head, labels, 1.0, options)).highest
    assert made < rows * vocabulary * 4 / 4
    log_p = (head.hidden @ head.weight.t()).log_softmax(-1)
    torch.testing.assert_close(
        entropies(head, labels, 1.0, options), -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=1e-5
    )


@pytest.fixture
def one_process() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_teachers_shards_are_gathered_and_a_trained_heads_are_refused() -> None:
    """Refuse them: full_tensor()'s backward gives a shard the gradient of its rank's tokens."""
    given = {**tensors(), "beta": 0.1}
    mesh = init_device_mesh("cpu", (1,))

    def sharded(model: str) -> dict[str, Any]:
        names = [name for name in given if name.startswith(f"{model}_lm_head")]
        shards = {n: distribute_tensor(given[n].detach(), mesh, [Shard(0)]) for n in names}
        heads = {n: shards[n].requires_grad_(given[n].requires_grad) for n in names}
        return {**given, **heads}

    torch.testing.assert_close(outcome(OURS, sharded("teacher")), outcome(OURS, given))
    with pytest.raises(TypeError, match=r"student\.weight must be a local tensor; got a DTensor"):
        outcome(OURS, sharded("student"))


# ----------------------------------------------------------------------- versions and bad input


def before_kernels(
    student_hidden_states, teacher_hidden_states, student_lm_head_weight, teacher_lm_head_weight,
    completion_mask, beta, chunk_size, num_items_in_batch=None, student_lm_head_bias=None,
    teacher_lm_head_bias=None, student_logit_scale=1.0, teacher_logit_scale=1.0,
    student_final_logit_softcapping=None, teacher_final_logit_softcapping=None, temperature=1.0,
): ...  # fmt: skip


def before_scales(
    student_hidden, student_lm_head_weight, teacher_hidden, teacher_lm_head_weight, mask, beta,
    chunk_size, num_items_in_batch=None, student_lm_head_bias=None, teacher_lm_head_bias=None,
): ...  # fmt: skip


@pytest.mark.parametrize("version", [before_kernels, before_scales])
def test_arguments_in_the_order_of_other_versions(version: Any) -> None:
    """Use their signatures only: those versions cannot be installed next to this one."""
    given = {**tensors(), "beta": 0.1, "num_items_in_batch": 5}
    signature = inspect.signature(version)
    renamed = {f"{m}_hidden": f"{m}_hidden_states" for m in ("student", "teacher")}
    renamed["mask"] = "completion_mask"
    names = [name for name in signature.parameters][:10]
    values = [{**given, "chunk_size": 256}[renamed.get(name, name)] for name in names]
    loss, _, count = called(signature, False, OPTIONS, *values)
    torch.testing.assert_close((loss, count), THEIRS(**given)[::2], rtol=1e-5, atol=1e-6)


def test_unknown_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = distillation(tmp_path)

    def newer(student_hidden_states: Tensor, skew: float) -> None: ...

    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", newer)
    with pytest.raises(TypeError, match=r"has \['skew'\] and lacks \['beta', .*works with trl 1"):
        use_fused_kd(trainer)
    monkeypatch.delattr(distillation_trainer, "_chunked_divergence_loss")
    with pytest.raises(TypeError, match="does not call _chunked_divergence_loss"):
        use_fused_kd(trainer)
    monkeypatch.delattr(DistillationTrainer, "_compute_loss")  # before TRL 1.10
    with pytest.raises(TypeError, match=r"has no _compute_loss in trl 1\..*trl 1\.10\.0 to 1\."):
        use_fused_kd(trainer)


def test_a_scale_that_an_older_version_drops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = distillation(tmp_path, "Granite", {"logits_scaling": 3.0})
    plain = distillation(tmp_path)
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", before_scales)
    use_fused_kd(plain)
    with pytest.raises(ValueError, match=r"the student scales its logits .*upgrade trl"):
        use_fused_kd(scaled)


def test_soft_capped_logits(tmp_path: Path) -> None:
    capped = {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
    with pytest.raises(ValueError, match=r"student soft-caps .*=2\.0.*use TRL's own loss"):
        use_fused_kd(distillation(tmp_path, "Gemma2", capped))
    given = {**tensors(), "beta": 0.5, "teacher_final_logit_softcapping": 3.0}
    with pytest.raises(ValueError, match="teacher soft-caps"):
        OURS(**given)


def test_heads_are_measured_regardless_of_their_configuration(tmp_path: Path) -> None:
    """Check models that TRL would not: it reads some names of a soft-cap, but not all."""
    trainer = distillation(tmp_path)
    student = trainer.model
    capped = {"logits_soft_cap": 0.5, "lru_width": 16, "num_hidden_layers": 3}
    trainer.model = tiny.of("RecurrentGemma", 1, **capped)
    with pytest.raises(ValueError, match=r"the student: RecurrentGemma.*changes its logits.*GKD"):
        use_fused_kd(trainer)
    trainer.model = student
    trainer.teacher_model.config.logit_scale = 2.0  # which Llama does not
    with pytest.raises(ValueError, match=r"teacher scales its logits by 1, .* by 2: upgrade trl"):
        use_fused_kd(trainer)


class OwnLoss(DistillationTrainer):
    def _compute_loss(self, *arguments: Any) -> Any:
        loss, *rest = super()._compute_loss(*arguments)
        return 2 * loss, *rest


def test_wrong_trainers_and_options(tmp_path: Path) -> None:
    trainer = distillation(tmp_path)
    with pytest.raises(ValueError, match="heads of a DistillationTrainer must be True"):
        use_fused_kd(trainer, heads=False)
    with pytest.raises(ValueError, match="memory_budget must be at least 1"):
        use_fused_kd(trainer, memory_budget=0)
    message = r"must not override DistillationTrainer\._compute_loss.*got OwnLoss\._compute_loss"
    with pytest.raises(TypeError, match=message):
        use_fused_kd(distillation(tmp_path, kind=OwnLoss))
    trainer.teacher_model = None
    with pytest.raises(TypeError, match="must have a teacher_model"):
        use_fused_kd(trainer)
    assert "_compute_loss" not in vars(trainer)
    assert math.isnan(called(SIGNATURE, False, OPTIONS, **tensors(), beta=0.5)[1])
