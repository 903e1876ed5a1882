"""Memory beyond the inputs: one gradient out of place, none in place, nothing else that grows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.logits import pair
from support.processes import passes, run_python
from torch import Tensor

from fused_kd import Head, kd_loss
from fused_kd.divergences import DIVERGENCES
from fused_kd.options import MIB
from fused_kd.testing import Peak, cpu_peak

# bytes of a row's own numbers (label, weights, losses, statistics), and of fixed scratch
PER_ROW, SCRATCH = 256, 65536
ROWS, VOCABULARY = 96, 8192
# N and V, doubled one after the other
SHAPES = [(ROWS, VOCABULARY), (2 * ROWS, VOCABULARY), (ROWS, 2 * VOCABULARY)]


def inputs(dtype: torch.dtype, rows: int = ROWS, vocabulary: int = VOCABULARY) -> list[Tensor]:
    """Return student (a leaf that requires grad), teacher, labels."""
    student, teacher = pair(rows, vocabulary, scale=1.0, dtype=dtype)
    return [student.requires_grad_(), teacher, torch.randint(vocabulary, (rows,))]


def loss_of(tensors: list[Tensor], **keywords: Any) -> Tensor:
    return kd_loss(*tensors, temperature=2.0, **keywords)


def small(rows: int) -> int:
    """Return the bytes that may be allocated in addition to gradients."""
    return SCRATCH + PER_ROW * rows


def check(peak: Peak, gradients: int, rows: int, size: int) -> None:
    """Assert that at most `gradients` tensors of `size` bytes exist at once, and little else."""
    assert peak.highest <= gradients * size + small(rows), peak
    assert peak.largest <= (size if gradients else small(rows)), peak


def test_the_probe_reads_a_known_figure() -> None:
    # The recipe reads private attributes of torch: this pins them.
    logits = torch.randn(256, 32000, requires_grad=True)
    labels = torch.randint(32000, (256,))
    size = 256 * 32000 * 4
    peaks = []
    for _ in range(2):
        logits.grad = None
        peaks.append(cpu_peak(lambda: F.cross_entropy(logits, labels).backward()))
    for peak in peaks:
        assert abs(peak.highest - 3 * size) < 4096
        assert abs(peak.left - size) < 4096
        assert peak.largest == size


def test_the_probe_notices_an_upcast() -> None:
    # Known-bad input: a float32 copy must fail the check that the losses pass.
    student, teacher, labels = inputs(torch.bfloat16)

    def upcast() -> Tensor:
        return loss_of([student.float(), teacher, labels])

    with pytest.raises(AssertionError):
        check(cpu_peak(upcast), 1, ROWS, student.nbytes)


@pytest.mark.parametrize(
    ("shape", "divergence"),
    [(SHAPES[0], divergence) for divergence in DIVERGENCES]
    + [(shape, "forward_kl") for shape in SHAPES[1:]],
)
def test_out_of_place_needs_one_gradient(
    fast: str, shape: tuple[int, int], divergence: str, dtype: torch.dtype
) -> None:
    tensors = inputs(dtype, *shape)
    options = {"backend": fast, "divergence": divergence, "label_smoothing": 0.1}

    def step() -> None:
        loss_of(tensors, **options).backward()

    peak = cpu_peak(step)
    check(peak, 1, shape[0], tensors[0].nbytes)
    assert peak.left <= tensors[0].nbytes + 64  # the gradient, as .grad


def test_in_place_needs_less_than_1_MiB(fast: str, divergence: str, dtype: torch.dtype) -> None:
    leaf, teacher, labels = inputs(dtype, 144, 16384)
    student = leaf * 1.0
    assert student.nbytes > 4 * MIB

    def step() -> Tensor:
        loss = loss_of(
            [student, teacher, labels], inplace=True, divergence=divergence, backend=fast
        )
        return torch.autograd.grad(loss, student)[0]

    check(cpu_peak(step), 0, 144, student.nbytes)
    assert small(144) < MIB


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("grad", ["no_grad", "inference_mode", "student without grad"])
def test_the_value_alone_needs_nothing(
    fast: str, grad: str, reduction: str, dtype: torch.dtype
) -> None:
    tensors = inputs(dtype)
    if grad == "student without grad":
        tensors[0] = tensors[0].detach()
    context = torch.inference_mode(grad == "inference_mode")

    def step() -> Tensor:
        with context, torch.set_grad_enabled(grad == "student without grad"):
            return loss_of(tensors, reduction=reduction, backend=fast)

    check(cpu_peak(step), 0, ROWS, tensors[0].nbytes)


def test_rows_need_one_gradient_and_only_in_the_backward(fast: str, dtype: torch.dtype) -> None:
    tensors = inputs(dtype)
    held: list[Tensor] = []
    forward = cpu_peak(lambda: held.append(loss_of(tensors, reduction="none", backend=fast)))
    check(forward, 0, ROWS, tensors[0].nbytes)
    upstream = torch.randn(ROWS)
    backward = cpu_peak(lambda: torch.autograd.grad(held[0], tensors[0], upstream))
    check(backward, 1, ROWS, tensors[0].nbytes)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_second_backward_needs_no_more_than_the_first(
    fast: str, scale: float, dtype: torch.dtype
) -> None:
    tensors = inputs(dtype)

    def step() -> None:
        loss = scale * loss_of(tensors, backend=fast)
        for _ in range(2):  # the first one's gradient is gone when the second is made
            torch.autograd.grad(loss, tensors[0], retain_graph=True)

    check(cpu_peak(step), 1, ROWS, tensors[0].nbytes)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
def test_mixed_dtypes_are_not_converted_whole(fast: str, dtypes: Any) -> None:
    tensors = inputs(dtypes[0])
    tensors[1] = tensors[1].to(dtypes[1])
    peak = cpu_peak(lambda: loss_of(tensors, backend=fast).backward())
    check(peak, 1, ROWS, tensors[0].nbytes)


def test_a_view_of_two_strides_is_not_copied(fast: str) -> None:
    student = torch.randn(4, 33, VOCABULARY)[:, :-1].requires_grad_()
    teacher = torch.randn(4, 33, VOCABULARY)[:, :-1]
    labels = torch.randint(VOCABULARY, (4, 32))

    def step() -> None:
        loss_of([student, teacher, labels], backend=fast).backward()

    check(cpu_peak(step), 1, 128, 128 * VOCABULARY * 4)


RESIDENT = """
import sys, torch
from fused_kd import kd_loss
torch.set_num_threads(1)
rows, vocabulary = 128, 65536
leaf = torch.randn(rows, vocabulary).bfloat16().requires_grad_()
teacher, labels = torch.randn(rows, vocabulary).bfloat16(), torch.randint(vocabulary, (rows,))

def resident(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key)) * 1024

for measured in (False, True):
    student = leaf * 1.0
    torch.ones(rows, 1).expand(rows, 2).sum()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = resident("VmRSS")
    loss = kd_loss(student, teacher, labels, temperature=2.0, inplace=True, backend=sys.argv[1])
    torch.autograd.grad(loss, student)
    peak = resident("VmHWM") - before
print(peak)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_scratch_outside_torchs_allocator_is_small_too(fast: str) -> None:
    # Resident pages of a whole process: a gradient would be 16 MiB.
    assert int(passes(run_python("-c", RESIDENT, fast))) < MIB


def _asks_for_huge_pages() -> bool:
    """Return False on a virtual machine whose host takes back freed memory."""
    devices = Path("/sys/bus/virtio/devices")
    balloons = [x for x in devices.glob("*") if (x / "device").read_text().strip() == "0x0005"]
    return all((x / "features").read_text()[5] == "0" for x in balloons)


def _flags_of(address: int) -> list[str]:
    """Return the kernel's flags of the mapping that holds an address of this process."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and ":" not in first:
            begin, end = (int(x, 16) for x in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return rest
    raise AssertionError("no mapping holds the address")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no transparent huge pages"
)
@pytest.mark.parametrize("level", ["logits", "heads"])
def test_huge_pages_where_they_are_cheap(level: str) -> None:
    # 72 MiB, above every threshold of the allocator: a mapping of its own.
    pytest.importorskip("fused_kd._C")
    if level == "logits":
        leaf, teacher, labels = inputs(torch.float32, 72, 2**18)
        loss_of([leaf, teacher, labels]).backward()
    else:
        leaf = torch.randn(2**18, 72).requires_grad_()
        teacher = Head(torch.randn(4, 8), torch.randn(2**18, 8))
        kd_loss(
            Head(torch.randn(4, 72), leaf), teacher, torch.zeros(4, dtype=torch.long)
        ).backward()
    assert leaf.grad is not None
    middle = leaf.grad.data_ptr() + leaf.grad.nbytes // 2
    assert ("hg" in _flags_of(middle)) == _asks_for_huge_pages()
