"""The choice of a backend: argument over variable over automatic, and why not."""

from __future__ import annotations

import pytest
import torch
from support.backends import needs_cpu
from support.processes import run_python

from fused_kd import Head, kd_loss
from fused_kd.backends import choose_name, why_not

S, T, Y = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)


def test_a_backend_asked_for_by_name_that_cannot_run_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meta = S.to("meta")
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run: "):
        choose_name("cpu", meta, meta)
    monkeypatch.setenv("FUSED_KD_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="FUSED_KD_BACKEND='cpu' cannot run: "):
        choose_name("auto", meta, meta)


@needs_cpu
def test_float64_asked_of_a_float32_backend_raises() -> None:
    with pytest.raises(RuntimeError, match="float64 logits run on backend='reference' only"):
        kd_loss(S.double(), T, Y, backend="cpu")


def test_the_environment_variable_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_KD_BACKEND", "gpu")
    with pytest.raises(ValueError, match="FUSED_KD_BACKEND must be 'auto' or one of 'reference'"):
        kd_loss(S, T, Y)


def test_the_argument_wins_over_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_KD_BACKEND", "cpu")
    assert choose_name("reference", S, T) == "reference"
    monkeypatch.setenv("FUSED_KD_BACKEND", "reference")
    assert choose_name("auto", S, T) == "reference"


def test_why_not_of_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of 'reference', .*; got 'tpu'"):
        why_not("tpu")


#: Makes the calls named as arguments, without the compiled modules and triton; prints warnings.
FIRST_CALLS = """
import sys, warnings
for missing in ("fused_kd._C", "fused_kd._cuda", "triton"):
    sys.modules[missing] = None
import torch
from fused_kd import Head, KDLoss
student, teacher = torch.randn(2, 5), torch.randn(2, 5)
labels, head = torch.tensor([1, 2]), Head(torch.randn(2, 3), torch.randn(5, 3))
calls = {
    "float64": lambda: KDLoss()(student.double(), teacher.double(), labels),
    "named": lambda: KDLoss(backend="reference")(student, teacher, labels),
    "compiled": lambda: torch.compile(KDLoss(), fullgraph=True, backend="eager")(
        student, teacher, labels
    ),
    "eager": lambda: KDLoss()(student, teacher, labels),
    "again": lambda: KDLoss()(student, teacher, labels),
    "heads": lambda: KDLoss()(head, head, labels),
}
for name in sys.argv[1:]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calls[name]()
    for found in caught:
        if found.category is UserWarning and "fused_kd" in str(found.message):
            print(name, found.message)
"""


@pytest.mark.parametrize("calls", ["eager again heads", "compiled eager", "heads again"])
def test_the_first_automatic_choice_of_the_reference_is_warned_about(calls: str) -> None:
    first = calls.split()[0]
    done = run_python("-c", FIRST_CALLS, "float64", "named", *calls.split())
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{first} fused_kd uses backend='reference' for cpu tensors, ")
    assert "slower than eager torch" in line
    assert "cpu: the compiled module " in line
    assert "pip install --force-reinstall --no-deps --no-cache-dir fused_kd" in line


@needs_cpu
@pytest.mark.parametrize("sides", ["heads", "a head and logits", "logits and a head"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_reference_multiplies_with_torch_and_cpu_with_its_own_product(
    reduction: str, sides: str
) -> None:
    def compiled_operators(backend: str) -> set[str]:
        head = Head(torch.randn(4, 3, requires_grad=True), torch.randn(5, 3))
        logits = torch.randn(4, 5, requires_grad=True)
        student = logits if sides == "logits and a head" else head
        teacher = logits.detach() if sides == "a head and logits" else Head(*head[:2])
        labels = torch.tensor([1, 2, 3, 4])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss = kd_loss(
                student, teacher, labels, chunk_rows=3, reduction=reduction, backend=backend
            )
            loss.sum().backward()
        names = {event.name for event in profile.events() or ()}
        of_ours = {name.removeprefix("fused_kd::") for name in names if "fused_kd::" in name}
        return of_ours - {"chunked_losses", "chunked_gradients", "chunked_gradients_"}

    assert compiled_operators("reference") == set()
    assert {"product_"} < compiled_operators("cpu")
