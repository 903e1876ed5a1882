"""Data parallel and sharded training on several real processes: the same as on one."""

from __future__ import annotations

import pytest
import torch
from support.distributed import DDP_CHECKS, FSDP_CHECKS
from support.processes import failures
from torch import distributed as dist

from fused_kd.integrations.loop import divide_gradients, global_num_items

pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
    ),
    pytest.mark.xdist_group("ranks"),  # one worker starts them for all of these tests
]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def failed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Run all checks on one group of ranks; return the failures, which begin with DDP or FSDP."""
    checks = {f"DDP, {name}": check for name, check in DDP_CHECKS.items()}
    checks |= {f"FSDP, {name}": check for name, check in FSDP_CHECKS.items()}
    return failures(checks, request.param, tmp_path_factory.mktemp("ranks"))


def test_distributed_data_parallel(failed: list[str]) -> None:
    # P10, P47, P50: the gradient's size, hangs, local counts.
    assert not (own := [x for x in failed if x.startswith("DDP")]), "\n".join(own)


def test_fully_shard(failed: list[str]) -> None:
    # P57: the lm_head is a DTensor, except within the forward of a sharded module.
    assert not (own := [x for x in failed if x.startswith("FSDP")]), "\n".join(own)


def test_the_count_of_one_process() -> None:
    labels = torch.tensor([[3, -100], [-100, 5]]), torch.tensor([7, 8, -100])
    count = global_num_items(*labels)
    assert count.shape == ()
    assert count.dtype == torch.float64
    assert count == 4
    assert global_num_items(labels[1], ignore_index=7) == 2
    with pytest.raises(ValueError, match="labels must be those of every micro-batch of the update"):
        global_num_items()
    for bad, kind in ((None, "NoneType"), (torch.ones(2), r"torch\.float32")):
        with pytest.raises(TypeError, match=f"labels must be tensors of integers; got {kind}"):
            global_num_items(bad)


def test_gradients_are_divided_in_place() -> None:
    with_one, without = torch.nn.Parameter(torch.ones(2).bfloat16()), torch.nn.Parameter()
    with_one.grad = torch.tensor([2.0, 6.0]).bfloat16()
    before = with_one.grad
    divide_gradients([with_one, without], torch.tensor(4.0, dtype=torch.float64))
    assert with_one.grad is before
    assert before.tolist() == [0.5, 1.5]
    divide_gradients([with_one], 2)
    assert before.tolist() == [0.25, 0.75]
    for nothing in (torch.tensor(0.0, dtype=torch.float64), 0):
        before[0] = torch.inf
        divide_gradients([with_one], nothing)
        assert before.tolist() == [0.0, 0.0]
    assert without.grad is None
    with pytest.raises(TypeError, match=r"num_items must be a number or a 0-d .*got NoneType"):
        divide_gradients([with_one], None)
    with pytest.raises(ValueError, match=r"num_items must be a number.*shape \(2,\): pass its"):
        divide_gradients([with_one], torch.ones(2))
