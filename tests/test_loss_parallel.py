"""Inside torch's loss_parallel(): plain tensors as ever, DTensors refused (N-37).

pytorch#190746: within that context the backward of every log_softmax of a DTensor is the identity,
so that a divergence composed of it has a right value and a wrong gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.nn.functional as F
from support.heads import make_heads, ours
from support.logits import identical, make_ignored, scalar_and_gradient
from torch import Tensor

from fused_kd import Head, kd_loss

distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: E402
from torch.distributed.tensor import Shard, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import loss_parallel  # noqa: E402


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Yield a device mesh of this process alone."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_plain_tensors_are_unaffected(backend: str, mesh: DeviceMesh) -> None:
    student, teacher, labels = make_ignored()
    want = scalar_and_gradient(student, teacher, labels, divergence="reverse_kl", backend=backend)
    heads = make_heads()
    from_heads = ours(heads, backend=backend, chunk_rows=5)
    with loss_parallel():
        got = scalar_and_gradient(
            student, teacher, labels, divergence="reverse_kl", backend=backend
        )
        inside = ours(heads, backend=backend, chunk_rows=5)
        # the context is in force: a DTensor's cross-entropy stays sharded, its gradient too
        sharded = distribute_tensor(student.detach(), mesh, [Shard(1)]).requires_grad_()
        F.cross_entropy(sharded, labels.clamp(min=0)).backward()
    assert isinstance(sharded.grad, type(sharded))
    identical((*got, *inside), (*want, *from_heads))


def test_dtensors_are_refused(backend: str, mesh: DeviceMesh) -> None:
    student, teacher, labels = make_ignored()
    heads = make_heads()

    def sharded(x: Tensor) -> Tensor:
        return distribute_tensor(x.detach(), mesh, [Shard(x.dim() - 1)])

    with loss_parallel():
        for arguments in ((sharded(student), sharded(teacher)), (student, sharded(teacher))):
            with pytest.raises(TypeError, match="must be a local tensor; got a DTensor"):
                kd_loss(*arguments, labels, backend=backend)
        tensors = [heads.hidden, heads.weight, *heads.teacher]
        for i in range(4):
            arguments = (*tensors[:i], sharded(tensors[i]), *tensors[i + 1 :])
            with pytest.raises(TypeError, match="must be a local tensor; got a DTensor"):
                kd_loss(Head(*arguments[:2]), Head(*arguments[2:]), heads.labels, backend=backend)
