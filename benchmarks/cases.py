"""What is measured: one loss on one size, and the least that it has to move and to multiply."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from fused_kd.testing import DTYPES

#: What a case gives a method: logits, heads (hidden states and lm_heads), or a training step.
LOGITS, HEADS, STEP = "logits", "heads", "step"
#: Hidden states for each token that the layers of a training step hold, about.
LAYER_STATES = 16


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
        """Return the keywords of KDLoss."""
        return {"temperature": self.temperature, "divergence": self.divergence}

    @property
    def itemsize(self) -> int:
        """Return the bytes of an element."""
        return DTYPES[self.dtype].itemsize

    @property
    def matrix_bytes(self) -> int:
        """Return the bytes of one (N, V) matrix of logits."""
        return self.n * self.v * self.itemsize

    @property
    def flops(self) -> int:
        """Return the operations of the four products with the heads."""
        return 2 * self.n * self.v * (3 * self.student_hidden + self.teacher_hidden)

    @property
    def input_bytes(self) -> int:
        """Return about how many bytes are allocated before anything is measured."""
        rows, hidden = self.n + self.v, self.student_hidden + self.teacher_hidden
        if self.level == LOGITS:
            return 3 * self.matrix_bytes  # the student's twice, to restore them
        if self.level == HEADS:  # in float32 too, if the lower bound of 16 bits needs it
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
        """Return the fields for a record."""
        return asdict(self)

    @property
    def name(self) -> str:
        """Return a name for people, unique among cases."""
        return f"{self.level} {self.setting('level')}"

    def setting(self, *without: str) -> str:
        """Return the case in words, without some of its sizes."""
        words = {
            "level": {LOGITS: "logits", HEADS: "hidden states"}.get(self.level, "training step"),
            "dtype": self.dtype,
            "n": f"N={self.n}",
            "v": f"V={self.v}",
            "hidden": f"H={self.student_hidden}/{self.teacher_hidden}",
            "temperature": f"T={self.temperature:g}",
            "divergence": self.divergence,
            "regime": self.regime,
            "device": self.device,
        }
        usual = {"hidden": "H=0/0", "regime": "randn", "device": "cpu"}
        return " ".join(
            word for key, word in words.items() if key not in without and word != usual.get(key)
        )

    def with_(self, **changes: Any) -> Case:
        """Return the case with other sizes."""
        return replace(self, **changes)
