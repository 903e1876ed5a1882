"""Numbers of both GPU backends: the error rule, real shapes, edge rules, layouts, large offsets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_device import (
    BACKENDS,
    BRAIN,
    HALF,
    REAL,
    SINGLE,
    as_output,
    few_here,
    gradient,
    heavy,
    loss_of,
    make_batch,
    obey,
    obey_on_device,
    size,
)
from torch import Tensor

from fused_kd import divergences, testing

pytestmark = pytest.mark.gpu
DIVERGENCES = few_here(divergences.DIVERGENCES)
REGIMES = few_here(testing.REGIMES)
Types = tuple[torch.dtype, torch.dtype]

# dtypes with kernels of their own, at every kind of temperature (powers 1 and 2 of the softened
# exponential serve the hard term, 3.7 has a separate one); the other dtypes
COMMON = [(SINGLE, SINGLE), (BRAIN, BRAIN), (BRAIN, SINGLE)]
OTHERS = [(HALF, HALF), (SINGLE, BRAIN), (HALF, BRAIN), (SINGLE, HALF), (BRAIN, HALF)]
KINDS = [(d, t) for d in COMMON for t in (1.0, 2.0, 3.7)] + [(d, 2.0) for d in OTHERS]
KINDS = few_here(KINDS)


def short(value: Any) -> str:
    kinds = value if isinstance(value, tuple) else (value,)
    return "-".join(str(k).removeprefix("torch.") for k in kinds)


# several parts of a row in 16 bits, more in 32
@pytest.mark.parametrize(("dtypes", "temperature"), KINDS, ids=short)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_and_temperatures(
    divergence: str, dtypes: Types, temperature: float, backend: str
) -> None:
    shape = (size(4, 2), size(32000, 70))
    obey(backend, "language_model", shape, dtypes, divergence=divergence, temperature=temperature)


# less than a vector; rows that start anywhere; eight and sixteen blocks
@pytest.mark.parametrize("vocabulary", [1, 7, size(50257, 71), size(128256, 96)])
@pytest.mark.parametrize("dtype", few_here([SINGLE, BRAIN]), ids=short)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabularies(divergence: str, dtype: torch.dtype, vocabulary: int, backend: str) -> None:
    keywords = {"divergence": divergence, "temperature": 2.0}
    obey(backend, "language_model", (2, vocabulary), (dtype, dtype), **keywords)


@pytest.mark.parametrize("dtype", few_here([SINGLE, BRAIN]), ids=short)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_regimes(divergence: str, dtype: torch.dtype, backend: str) -> None:
    for regime in REGIMES:
        shape = (3, size(4099, 37))
        obey(backend, regime, shape, (dtype, dtype), divergence=divergence, temperature=2.0)


@pytest.mark.parametrize("dtype", few_here([SINGLE, BRAIN]), ids=short)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows_differ_by_nothing(divergence: str, dtype: torch.dtype, backend: str) -> None:
    student, _, _ = make_batch(3, size(32003, 37), dtype=dtype)
    keywords = {"hard_weight": 0.0, "temperature": 2.0, "backend": backend}
    loss = loss_of(student, student.detach(), divergence=divergence, **keywords)
    assert loss.item() == 0.0
    assert not gradient(loss, student).any()


# the scalar loss: gradient made in the forward (bfloat16), in the backward (float16)
@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=short)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_real_shapes(divergence: str, dtype: torch.dtype, backend: str) -> None:
    n, v = size(2048, 40), size(151936, 80)
    inputs = make_batch(n, v, dtype=dtype)
    keywords: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "beta": 0.3}
    weight = torch.linspace(0.5, 1.5, n, device=inputs[0].device)
    weight = 1024 * weight if dtype == HALF else weight
    with torch.no_grad():
        rows = loss_of(*inputs, reduction="none", backend=backend, **keywords)
    total = loss_of(*inputs, token_weight=weight, reduction="sum", backend=backend, **keywords)
    got = gradient(total, inputs[0])
    torch.testing.assert_close(total, (weight * rows).sum(), rtol=1e-5, atol=0)
    obey_on_device(rows, got, inputs, weight, **keywords)


@pytest.mark.parametrize("backend", BACKENDS)
@heavy
def test_more_than_2_to_the_31_entries_R_12_R_14(backend: str) -> None:
    n, v = size(16400, 40), size(131072, 64)
    student, teacher = (
        torch.empty(n, v, dtype=BRAIN, device=x.device) for x in make_batch(1, 8)[:2]
    )
    for x in (student, teacher):
        for piece in x.split(1024):
            piece.normal_(std=2)
    labels = torch.randint(v, (n,), device=student.device)
    leaf = student.requires_grad_()
    beyond = min(n - 1, 2**31 // v)  # the first row there
    some = [0, beyond - 1, beyond, n - 1]
    these = (student.detach()[some].clone(), teacher[some], labels[some])
    ones = torch.ones(len(some), device=student.device)
    rows = loss_of(leaf, teacher, labels, reduction="none", backend=backend)
    obey_on_device(rows[some], gradient(rows, leaf, torch.ones_like(rows))[some], these, ones)
    total = loss_of(leaf, teacher, labels, reduction="sum", backend=backend)
    obey_on_device(None, gradient(total, leaf)[some], these, ones)
    logits = as_output(leaf)
    loss = loss_of(logits, teacher, labels, reduction="sum", inplace=True, backend=backend)
    got = gradient(loss, logits)
    assert got.data_ptr() == student.data_ptr()
    obey_on_device(None, got[some], these, ones)


# ----------------------------------------------------------------------------------- layouts


def _sliced(x: Tensor) -> Tensor:
    return x[:, :-1]


def _turned(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def _shifted(x: Tensor) -> Tensor:
    """Return a copy with a NaN before each row, so that rows begin at unaligned addresses too."""
    padded = torch.full((*x.shape[:-1], x.shape[-1] + 1), math.nan, dtype=x.dtype, device=x.device)
    padded[..., 1:] = x
    return padded[..., 1:]


@pytest.mark.parametrize("layout", [_sliced, _turned, _shifted])
@pytest.mark.parametrize("dtype", few_here([SINGLE, BRAIN]), ids=short)
@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_labels_at_odd_offsets_R_52_R_54(
    dtype: torch.dtype, layout: Callable[[Tensor], Tensor], backend: str
) -> None:
    student, teacher, _ = make_batch(3, 5, size(24000, 40), dtype=dtype)
    s, t = (layout(x.detach()) for x in (student, teacher))
    v = s.shape[-1]
    count = s.shape[0] * s.shape[1]
    labels = torch.randint(v, (count + 1,), device=s.device)[1:].view(s.shape[:2])
    keywords: dict[str, Any] = {"divergence": "jsd", "temperature": 2.0}
    for reduction in ("none", "sum"):
        leaf = s.requires_grad_()
        loss = loss_of(leaf, t, labels, reduction=reduction, backend=backend, **keywords)
        got = gradient(loss, leaf, torch.ones_like(loss)).reshape(count, v)
        rows = loss.detach().reshape(-1) if reduction == "none" else None
        flat = (s.detach().reshape(count, v), t.reshape(count, v), labels.reshape(-1))
        obey_on_device(rows, got, flat, torch.ones(count, device=s.device), **keywords)


# ---------------------------------------------------------------------------------- edge rules


@pytest.mark.parametrize("dtype", few_here([SINGLE, HALF, BRAIN]), ids=short)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_are_the_references(divergence: str, dtype: torch.dtype, backend: str) -> None:
    v = size(24001, 50)
    student, teacher, labels = make_batch(5, v, dtype=dtype)
    s, t = student.detach().clone(), teacher.clone()
    s[1, v // 3], t[2, v - 1] = -math.inf, -math.inf  # one side alone
    s[3, : v // 2], t[3, : v // 2] = -math.inf, -math.inf  # both: absent
    s[4], t[4] = -math.inf, -math.inf  # nothing is left
    labels[3] = v - 2
    keywords: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "reduction": "none"}
    for smoothing in (0.0, 0.2):
        leaf, exact = s.clone().requires_grad_(), s.double().requires_grad_()
        rows = loss_of(leaf, t, labels, label_smoothing=smoothing, backend=backend, **keywords)
        truth = loss_of(exact, t.double(), labels, label_smoothing=smoothing, backend="reference",
                        **keywords)  # fmt: skip
        torch.testing.assert_close(rows.double(), truth, rtol=1e-5, atol=1e-6, equal_nan=True)
        got, want = (gradient(x, y, torch.ones_like(x)) for x, y in ((rows, leaf), (truth, exact)))
        close = {"rtol": 2 * torch.finfo(dtype).eps + 1e-5, "atol": 1e-7}
        torch.testing.assert_close(got.double(), want, equal_nan=True, **close)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", few_here([SINGLE, BRAIN]), ids=short)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_row_is_nan_and_no_other_R_07(
    divergence: str, dtype: torch.dtype, backend: str
) -> None:
    # Rows: ignored, whole, NaN, +inf, and (on a GPU) labels outside of the vocabulary
    v = size(24000, 50)
    student, teacher, labels = make_batch(8, v, dtype=dtype)
    keywords: dict[str, Any] = {"divergence": divergence, "reduction": "none", "backend": backend}
    rows = loss_of(student, teacher, labels, **keywords)
    want = gradient(rows, student, torch.ones_like(rows))
    broken = student.detach().clone()
    broken[0], broken[2, v // 2], broken[3, -1] = math.nan, math.nan, math.inf
    bad = [2, 3]
    if REAL:  # the CPU refuses them by name
        labels[4:7] = torch.tensor([v, -1, 2 * v])
        bad += [4, 5, 6]
    whole = [i for i in range(8) if i not in bad]
    leaf = broken.requires_grad_()
    got = loss_of(leaf, teacher, labels, **keywords)
    changed = gradient(got, leaf, torch.ones_like(got))
    assert got[bad].isnan().all()
    assert changed[bad].isnan().all()
    assert torch.equal(got[whole], rows[whole])
    assert torch.equal(changed[whole], want[whole])
    assert torch.equal(changed[0], torch.zeros_like(changed[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_debug_names_a_label_out_of_range_R_34(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, labels = make_batch(4, 33)
    labels[2] = 33
    monkeypatch.setenv("FUSED_KD_DEBUG", "1")
    with pytest.raises(ValueError, match=r"labels must be in \[0, 33\).*got 33 at position 2"):
        loss_of(student, teacher, labels, backend=backend)
