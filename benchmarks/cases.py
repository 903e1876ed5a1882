"""What is measured: one loss on one size, and the least that it has to move and to multiply."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from fused_kd.testing import DTYPES

#: States of a token, of its hidden size each, that the layers of a training step hold, about.
LAYER_STATES = 16
#: What the suites measure: a loss of logits, a loss of heads (hidden states and lm_heads), a
#: training step.
LOGITS, HEADS, STEP = "logits", "heads", "step"


@dataclass(frozen=True)
class Case:
    """One loss on one size; models of one dtype, hard and soft term at 0.5 each, no bias."""

    n: int
    v: int
    dtype: str  # a key of DTYPES
    temperature: float = 2.0
    divergence: str = "forward_kl"
    level: str = LOGITS
    student_hidden: int = 0  # with heads, and of a training step
    teacher_hidden: int = 0
    device: str = "cpu"
    regime: str = "randn"  # of the logits, by fused_kd.testing.make_inputs; only for accuracy

    @property
    def keywords(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "divergence": self.divergence}

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def matrix_bytes(self) -> int:
        """Of one (N, V) matrix of logits."""
        return self.n * self.v * self.itemsize

    @property
    def expected_bytes(self) -> dict[str, int]:
        """Return the least possible traffic with main memory."""
        return {"forward_backward": 3 * self.matrix_bytes, "forward": 2 * self.matrix_bytes}

    @property
    def flops(self) -> int:
        """Return the operations of the four products with the heads."""
        return 2 * self.n * self.v * (3 * self.student_hidden + self.teacher_hidden)

    @property
    def teacher_flops(self) -> int:
        """Of the one product among them that a loss without a teacher does not need."""
        return 2 * self.n * self.v * self.teacher_hidden

    @property
    def input_bytes(self) -> int:
        """What has to be there before anything is measured, about."""
        rows, hidden = self.n + self.v, self.student_hidden + self.teacher_hidden
        if self.level == LOGITS:
            return 3 * self.matrix_bytes  # the student's twice, to bring them back
        if self.level == HEADS:  # in float32 too, where the floor of 16 bits needs it
            return rows * hidden * (self.itemsize if self.itemsize == 4 else self.itemsize + 4)
        weights = 2 * self.v * (4 * self.student_hidden + self.teacher_hidden)
        return (weights + LAYER_STATES * self.n * hidden) * self.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Return the bytes of the gradients: of logits, or of hidden states and weight."""
        if self.level == LOGITS:
            return self.matrix_bytes
        return (self.n + self.v) * self.student_hidden * self.itemsize

    @property
    def sizes(self) -> dict[str, Any]:
        """For a line of results; what the level does not have is left out."""
        found = asdict(self)
        if self.level == LOGITS:
            del found["student_hidden"], found["teacher_hidden"]
        return found

    @property
    def name(self) -> str:
        """Unique among cases, for people."""
        hidden = "" if self.level == LOGITS else f" H={self.student_hidden}/{self.teacher_hidden}"
        where = "" if self.device == "cpu" else f" {self.device}"
        kind = "" if self.regime == "randn" else f" {self.regime}"
        return (f"{self.level} {self.dtype} N={self.n} V={self.v}{hidden} T={self.temperature:g} "
                f"{self.divergence}{kind}{where}")  # fmt: skip

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)
