"""Losses of held-out sequences against plain sums, on one process and on several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import VOCABULARY, SmallLM
from support.processes import failures
from support.runs import DELTA, LOOKS, SEQUENCES, TOKENS, falling, losses_of
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler

from fused_kd import KDLoss, TopK, kd_loss
from fused_kd.integrations._common.convergence import Watch
from fused_kd.integrations.loop import shifted
from fused_kd.objectives import ConvergenceMonitor, HeldOut, LossSchedule, Ramp, evaluate

OPTIONS: dict[str, Any] = {"temperature": 2.0, "divergence": "jsd", "hard_weight": 0.3}


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    torch.manual_seed(5)
    made = []
    for length in range(4, 4 + count):
        ids = torch.randint(VOCABULARY, (2, length))
        made.append({"input_ids": ids, "labels": ids.clone()})
        made[-1]["labels"][0, : length - 2] = -100
    return made


def by_hand(student: SmallLM, teacher: SmallLM, **options: Any) -> HeldOut:
    """Return the sums of each sequence from calls of kd_loss on its logits."""
    rows = []
    for batch in batches():
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            sides = student(ids[None]).logits[0].detach(), teacher(ids[None]).logits[0].detach()
            targets = shifted(labels[None])[0]
            parts = kd_loss(*sides, targets, reduction="sum", return_parts=True, **options)
            rows.append([float(parts.hard), float(parts.soft), float((targets != -100).sum())])
    return HeldOut(*torch.tensor(rows, dtype=torch.float64).T)


@pytest.mark.parametrize("heads", [False, True])
def test_the_sums_of_each_sequence(heads: bool) -> None:
    student, teacher = SmallLM(0).train(), SmallLM(1)
    student.norm.eval()  # a module that its user keeps in evaluation mode
    want = by_hand(student, teacher, **OPTIONS)
    modes = []
    student.blocks[0].register_forward_hook(lambda module, *_: modes.append(module.training))
    for reduction in ("mean", "sum"):
        loss = KDLoss(**OPTIONS, reduction=reduction)
        got = evaluate(loss, student, teacher, batches(), heads=heads)
        for a, b in zip(got[:3], want[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert loss.reduction == reduction
    assert got.measured_with is not None
    assert got.measured_with["temperature"] == 2.0
    assert got.measured_with["divergence"] == "jsd"
    assert (student.training, student.norm.training) == (True, False)
    assert len(modes) >= 6
    assert not any(modes)
    assert all(p.grad is None for p in student.parameters())


def test_a_cached_teacher_and_an_objective_that_is_off() -> None:
    student, teacher = SmallLM(0), SmallLM(1)
    samples: list[dict[str, Any]] = batches()
    for batch in samples:
        logits = teacher(batch["input_ids"]).logits.detach()
        batch["teacher"] = TopK.from_logits(logits, VOCABULARY, 2.0)
    options = {**OPTIONS, "hard_weight": 0.0}
    got = evaluate(KDLoss(**options), student, None, samples)
    assert got.hard is None
    assert got.soft is not None
    want = by_hand(student, teacher, **options)
    torch.testing.assert_close(got.soft, want.soft, rtol=1e-5, atol=1e-6)


def test_loaders_whose_order_changes_are_refused() -> None:
    models, loss = (SmallLM(0), SmallLM(1)), KDLoss()
    rows = batches()
    sampler = {"num_replicas": 2, "rank": 0, "shuffle": False}
    refused = [
        (DataLoader(rows, batch_size=None, shuffle=True), "got a DataLoader with a RandomSampler"),
        (
            DataLoader(rows, batch_sampler=BatchSampler(RandomSampler(rows), 1, False)),
            "got a DataLoader with a RandomSampler",
        ),
        (
            DataLoader(rows, sampler=DistributedSampler(rows, **{**sampler, "shuffle": True})),
            "DistributedSampler that shuffles",
        ),
        (
            DataLoader(rows, sampler=DistributedSampler(rows, **sampler)),
            "fills up 3 sequences for 2 ranks",
        ),
        ([], "at least one batch"),
    ]
    for loader, message in refused:
        with pytest.raises(ValueError, match=message):
            evaluate(loss, *models, loader)


def test_ids_of_the_batches() -> None:
    rows: list[dict[str, Any]] = batches()
    for i, batch in enumerate(rows):
        batch["ids"] = torch.tensor([2 * i, 2 * i + 1])
    got = evaluate(KDLoss(**OPTIONS), SmallLM(0), SmallLM(1), rows)
    assert got.ids is not None
    assert got.ids.tolist() == [*range(6)]
    monitor = ConvergenceMonitor(DELTA, DELTA)
    monitor.update(**got._asdict())
    again = evaluate(KDLoss(**OPTIONS), SmallLM(0), SmallLM(1), rows[::-1])
    with pytest.raises(ValueError, match="got id 4 at position 0, where 0 was"):
        monitor.update(**again._asdict())
    del rows[1]["ids"]
    with pytest.raises(ValueError, match="must yield ids in each batch or in none; got 2 of 3"):
        evaluate(KDLoss(**OPTIONS), SmallLM(0), SmallLM(1), rows)


def test_batches_without_labels_are_refused() -> None:
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.int64)}
    for loader, kind in (([batch], "input_ids"), ([batch["input_ids"]], "Tensor")):
        with pytest.raises(TypeError, match=f"dicts with labels and inputs; got .*{kind}"):
            evaluate(KDLoss(), SmallLM(0), SmallLM(1), loader)


# -------------------------------------------------------------------------------- several ranks


def _ranks_say_what_one_process_says() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    alone = ConvergenceMonitor(DELTA, DELTA, check_finite=False)
    shared = ConvergenceMonitor(DELTA, DELTA, check_finite=False, group=dist.group.WORLD)
    tokens, ids = torch.full((SEQUENCES,), TOKENS), torch.arange(SEQUENCES)
    for k, (hard, soft) in enumerate(losses_of((falling(1), falling(4)), seed=2)):
        if k == 5:
            hard[3] = float("nan")  # of rank 0 or 1: skipped on both
        whole = {"hard": hard, "soft": soft, "tokens": tokens, "ids": ids}
        share = {name: x[rank::ranks] for name, x in whole.items()}
        want, got = alone.update(**whole), shared.update(**share)
        assert got.pair == want.pair
        for a, b in zip(got[5:], want[5:], strict=True):
            assert (a is None) == (b is None)
            assert a is None or a == pytest.approx(b, rel=1e-9, abs=1e-12)
        if k == LOOKS // 2:
            state, shared = (
                shared.state_dict(),
                ConvergenceMonitor(DELTA, DELTA, check_finite=False, group=dist.group.WORLD),
            )
            shared.load_state_dict(state)
    with pytest.raises(ValueError, match="number of ranks must be that of the state, 2"):
        alone.load_state_dict(shared.state_dict())


def _all_ranks_refuse() -> None:
    monitor = ConvergenceMonitor(DELTA, DELTA, group=dist.group.WORLD)
    x, rank = torch.ones(4), dist.get_rank()
    with pytest.raises(ValueError, match="ids must differ; got 0 twice"):
        monitor.update(hard=x, soft=x, tokens=x, ids=torch.arange(4))
    with pytest.raises(ValueError, match="tokens must be finite" if rank else "on rank 1: tokens"):
        monitor.update(hard=x, soft=x, tokens=-x if rank else x)
    with pytest.raises(TypeError, match="soft must be given" if rank else "on rank 1: soft must"):
        monitor.update(hard=x, soft=None if rank else x, tokens=x)
    with pytest.raises(ValueError, match="hard must be finite; got a sum of inf"):
        monitor.update(hard=x / 0, soft=x, tokens=x)
    with pytest.raises(ValueError, match="own sequences; got the same sums on two ranks"):
        monitor.update(hard=x, soft=x, tokens=x)
    monitor.update(hard=x, soft=x, tokens=x, ids=4 * rank + torch.arange(4))


def _a_rank_may_have_fewer_sequences_or_none() -> None:
    # 3 and 7 of 10; 0 and 10
    hard, soft = losses_of((falling(1), falling(4)), seed=2)[..., :10].unbind(1)
    tokens = torch.full((10,), TOKENS)
    for cut in (3, 0):
        mine = slice(cut, None) if dist.get_rank() else slice(cut)
        alone = ConvergenceMonitor(DELTA, DELTA)
        shared = ConvergenceMonitor(DELTA, DELTA, group=dist.group.WORLD)
        for h, s in zip(hard, soft, strict=True):
            want = alone.update(hard=h, soft=s, tokens=tokens)
            got = shared.update(hard=h[mine], soft=s[mine], tokens=tokens[mine])
        assert want.hard_interval is not None
        assert got.hard_interval == pytest.approx(want.hard_interval, rel=1e-9, abs=1e-12)
        assert got.pair == want.pair


def _callbacks_join_the_ranks() -> None:
    # a monitor that is made before the process group cannot have one
    rank, ranks = dist.get_rank(), dist.get_world_size()
    monitor, alone = (ConvergenceMonitor(DELTA, DELTA) for _ in range(2))
    rows = iter(losses_of((falling(1), falling(4)), seed=2))
    tokens, seen = torch.full((SEQUENCES,), TOKENS), []

    def measure() -> HeldOut:
        hard, soft = next(rows)
        seen.append(alone.update(hard=hard, soft=soft, tokens=tokens))
        return HeldOut(hard[rank::ranks], soft[rank::ranks], tokens[rank::ranks])

    watch = Watch(monitor, measure, None)
    watch.join_processes()
    for step in range(LOOKS):
        verdict = watch.look(step, None)
        assert verdict is not None
        assert verdict.pair == seen[-1].pair
    assert verdict.hard_interval == pytest.approx(seen[-1].hard_interval, rel=1e-9)


def test_ranks(tmp_path: Path) -> None:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch without gloo")
    checks = {
        "verdicts": _ranks_say_what_one_process_says,
        "refusals": _all_ranks_refuse,
        "callbacks": _callbacks_join_the_ranks,
        "shares": _a_rank_may_have_fewer_sequences_or_none,
    }
    assert not (failed := failures(checks, 2, tmp_path)), "\n".join(failed)


# ------------------------------------------------------------------------------------- schedules


def test_a_schedule_of_the_loss() -> None:
    loss = KDLoss(temperature=1.0, hard_weight=0.2)
    schedule = LossSchedule(
        loss, temperature=Ramp(4.0, 1.0, 10), soft_weight=Ramp(0.0, 1.0, 4, "cosine")
    )
    seen = []
    for _ in range(12):
        seen.append((loss.temperature, loss.soft_weight))
        schedule.step()
    assert seen[0] == (4.0, 0.0)
    assert seen[1] == pytest.approx((3.7, 0.14644660940672624))
    assert seen[4] == pytest.approx((2.8, 1.0))
    assert seen[11] == (1.0, 1.0)
    assert loss.hard_weight == 0.2
    again = LossSchedule(KDLoss(), temperature=Ramp(4.0, 1.0, 10))
    again.load_state_dict({"steps": 1})
    assert again.loss.temperature == pytest.approx(3.7)
    assert again.state_dict() == {"steps": 1}


@pytest.mark.parametrize(
    ("ramps", "error", "message"),
    [
        ({}, ValueError, "must be a Ramp; got none"),
        ({"temperature": 2.0}, TypeError, "temperature must be a Ramp; got float"),
        ({"temperature": Ramp(1, 2, 3, "step")}, ValueError, "shape must be one of"),
        ({"temperature": Ramp(1, 2, 0)}, ValueError, "steps must be at least 1"),
        ({"temperature": Ramp(1.0, 0.0, 5)}, ValueError, "temperature"),
        ({"hard_weight": Ramp(-1.0, 1.0, 5)}, ValueError, "hard_weight"),
    ],
)
def test_schedules_that_are_refused(
    ramps: dict[str, Any], error: type[Exception], message: str
) -> None:
    loss = KDLoss(temperature=3.0)
    with pytest.raises(error, match=message):
        LossSchedule(loss, **{"soft_weight": Ramp(0.1, 0.9, 5), **ramps} if ramps else {})
    assert (loss.temperature, loss.soft_weight) == (3.0, 0.5)


def test_a_schedule_compiles_nothing_again() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    loss = KDLoss()
    schedule = LossSchedule(loss, temperature=Ramp(4.0, 1.5, 20), hard_weight=Ramp(0.9, 0.1, 20))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(4, 33), torch.randn(4, 33), torch.arange(4)
    for _ in range(8):
        torch.testing.assert_close(
            compiled(student, teacher, labels), loss(student, teacher, labels)
        )
        schedule.step()
    assert counter.frame_count <= 2
