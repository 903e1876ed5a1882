"""What is measured: the sizes, the calls, and the goals that they are held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_kd import KDLoss
from fused_kd.testing import eager_kd_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One loss on one size; student and teacher of one dtype, hard and soft term at 0.5 each."""

    n: int
    v: int
    dtype: str  # a key of DTYPES
    temperature: float = 2.0
    divergence: str = "forward_kl"

    @property
    def keywords(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "divergence": self.divergence}

    @property
    def matrix_bytes(self) -> int:
        """Of one (N, V) matrix of logits."""
        return self.n * self.v * DTYPES[self.dtype].itemsize

    @property
    def expected_bytes(self) -> dict[str, int]:
        """What the least possible traffic with far memory is."""
        return {"forward_backward": 3 * self.matrix_bytes, "forward": 2 * self.matrix_bytes}

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)


@dataclass(frozen=True)
class Goal:
    """A ratio of two times of one run, and what it must be."""

    what: str
    numerator: str
    denominator: str
    limit: dict[str, float]  # by dtype
    at_least: bool  # else at most
    factor: float = 1.0  # of the denominator

    def reached(self, value: float, dtype: str) -> bool:
        return value >= self.limit[dtype] if self.at_least else value <= self.limit[dtype]


IN_PLACE, OUT_OF_PLACE, FORWARD = "KDLoss, in place", "KDLoss, out of place", "KDLoss, forward only"
EAGER, COMPILED, COPY = "eager", "torch.compile", "b.copy_(a)"


def _goal(what: str, a: str, b: str, bf16: float, fp32: float, at_least: bool, k: float) -> Goal:
    return Goal(what, a, b, {"bf16": bf16, "fp16": bf16, "fp32": fp32}, at_least, k)


GOALS = (
    _goal("torch.compile / in place", COMPILED, IN_PLACE, 18, 18, True, 1),
    _goal("torch.compile / out of place", COMPILED, OUT_OF_PLACE, 10, 8, True, 1),
    _goal("eager / in place", EAGER, IN_PLACE, 80, 80, True, 1),
    _goal("eager / out of place", EAGER, OUT_OF_PLACE, 50, 50, True, 1),
    _goal("in place / 1.5 copies", IN_PLACE, COPY, 1.6, 1.2, False, 1.5),
    _goal("forward only / 1 copy", FORWARD, COPY, 1.3, 1.3, False, 1),
)
#: Time of a divergence, at any temperature, over that of forward_kl at T = 2.
DIVERGENCE_LIMIT = {"forward_kl": 2.0, "reverse_kl": 2.0, "mse": 2.0, "jsd": 3.0, "tvd": 3.0}
TEMPERATURES = (1.0, 2.0, 3.7)
#: Time after N or V is doubled, over the time before.
GROWTH, GROWTH_TOLERANCE = 2.0, 0.1
#: Bytes beyond inputs and gradient.
MEMORY_SLACK = 2**20


class Bench:
    """The tensors of one dtype, big enough for every case that is run on them.

    The student's logits lie in one buffer that in-place calls overwrite; :meth:`restore` brings
    them back. They are the output of an autograd node, as a model's are, which drops the
    gradient that it gets, as a model's last layer does once it has used it.
    """

    def __init__(
        self, entries: int, dtype: str, rows: int = 1024, seed: int = 0, device: str = "cpu"
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        kind = DTYPES[dtype]
        self.dtype = dtype
        self._original, self._teacher = (_random(entries, kind, generator) for _ in range(2))
        self._student = self._original.clone()
        self._labels = torch.randint(2**31, (rows,), generator=generator, device=device)
        self._weight = torch.ones((), device=device, requires_grad=True)

    @property
    def bytes(self) -> int:
        """Of the largest matrix that there is room for."""
        return self._student.numel() * self._student.itemsize

    def views(self, case: Case) -> tuple[Tensor, Tensor, Tensor]:
        """Student and teacher (N, V), labels (N,): the first entries of the buffers."""
        assert case.dtype == self.dtype, (case.dtype, self.dtype)
        size = case.n * case.v
        student, teacher = (x[:size].view(case.n, case.v) for x in (self._student, self._teacher))
        return student, teacher, self._labels[: case.n] % case.v

    def restore(self, case: Case) -> Callable[[], None]:
        """Puts the student's logits back."""
        size = case.n * case.v

        def run() -> None:
            self._student[:size].copy_(self._original[:size])

        return run

    def step(self, loss: Callable[..., Tensor], case: Case) -> Callable[[], None]:
        """The whole call, forward and backward."""
        buffer, teacher, labels = self.views(case)

        def run() -> None:
            logits = _LastLayer.apply(self._weight, buffer)  # type: ignore[no-untyped-call]
            loss(logits, teacher, labels).backward()  # type: ignore[no-untyped-call]

        return run

    def forward(self, loss: Callable[..., Tensor], case: Case) -> Callable[[], None]:
        """Without gradients."""
        student, teacher, labels = self.views(case)

        def run() -> None:
            with torch.no_grad():
                loss(student, teacher, labels)

        return run

    def copy(self, case: Case) -> Callable[[], None]:
        """The floor: one (N, V) matrix read, one written, both touched before."""
        student, teacher, _ = self.views(case)
        return lambda: student.copy_(teacher)  # type: ignore[return-value]


def _random(entries: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal logits of standard deviation 2, made in pieces so that no large float32 copy is."""
    result = torch.empty(entries, dtype=dtype, device=generator.device)
    for piece in torch.split(result, 2**22 if result.is_cpu else 2**28):
        piece.copy_(2 * torch.randn(len(piece), generator=generator, device=generator.device))
    return result


class _LastLayer(torch.autograd.Function):
    """Hands out logits that lie ready, and takes their gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()  # no view: what a layer computed is none

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        assert gradient[0] is not None
        return None, None


def fused(case: Case, inplace: bool, backend: str = "auto") -> Callable[..., Tensor]:
    """KDLoss as a user calls it."""
    return KDLoss(inplace=inplace, backend=backend, **case.keywords)


def eager(case: Case) -> Callable[..., Tensor]:
    """The baseline."""
    keywords = case.keywords

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return eager_kd_loss(student, teacher, labels, **keywords)

    return loss


def compiled(case: Case) -> Callable[..., Tensor]:
    """``torch.compile`` of the baseline, for this size alone."""
    return torch.compile(eager(case), dynamic=False)
