"""What is measured: one loss on one size, and the suites of such cases."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from fused_kd.divergences import DIVERGENCES

#: The levels: a loss of logits or of heads (hidden states and lm_heads), or a training step.
LOGITS, HEADS, STEP = "logits", "heads", "step"


@dataclass(frozen=True)
class Case:
    """One loss on one size; both sides have one dtype and no bias, both terms weigh 0.5."""

    n: int  # rows
    v: int  # vocabulary entries
    dtype: str  # a key of fused_kd.testing.DTYPES
    temperature: float = 2.0
    divergence: str = "forward_kl"
    level: str = LOGITS  # or HEADS, STEP
    student_hidden: int = 0  # hidden size; 0 at level LOGITS
    teacher_hidden: int = 0
    device: str = "cpu"

    @property
    def keywords(self) -> dict[str, Any]:
        """Return the keyword arguments of KDLoss for this case."""
        return {"temperature": self.temperature, "divergence": self.divergence}

    @property
    def name(self) -> str:
        """Return a readable name that no other case has."""
        return self.setting()

    def setting(self, *without: str) -> str:
        """Return the case in words without these parts ("level", "n", ...); nor a device "cpu"."""
        hidden = f"H={self.student_hidden} (student) / {self.teacher_hidden} (teacher)"
        words = {
            "level": {HEADS: "hidden states", STEP: "training step"}.get(self.level, self.level),
            "dtype": self.dtype,
            "n": f"N={self.n}",
            "v": f"V={self.v}",
            "hidden": hidden if self.level != LOGITS else "",
            "temperature": f"T={self.temperature:g}",
            "divergence": self.divergence,
            "device": self.device if self.device != "cpu" else "",
        }
        return ", ".join(word for key, word in words.items() if word and key not in without)


#: Sizes unless options or a suite give others: real vocabularies, and heads of small models.
USUAL: dict[str, Any] = {
    "dtype": ("bf16", "fp32"),
    "v": (32000, 128256, 262144),
    "n": (512,),
    "divergence": ("forward_kl",),
    "temperature": (2.0,),
    "hidden": (1024, 2048),
}


def logits(options: Namespace, level: str = LOGITS, **own: Any) -> Iterator[Case]:
    """Yield every combination of sizes: each from the options, else from `own`, else from USUAL."""
    *sizes, hidden = (getattr(options, name) or own.get(name, USUAL[name]) for name in USUAL)
    for dtype, v, n, divergence, t in product(*sizes):
        heads = (0, 0) if level == LOGITS else hidden
        yield Case(n, v, dtype, t, divergence, level, *heads, options.device)


def guard(options: Namespace) -> Iterator[Case]:
    """Yield cases far larger than the caches, and small ones of every divergence."""
    yield from logits(options, n=[128], v=[128256])
    yield from logits(options, dtype=["bf16"], n=[64], v=[32768], divergence=DIVERGENCES)


STEPS = partial(logits, level=STEP, dtype=["fp32"], v=[32000], hidden=(512, 1024))
GUARD = "guard"
#: By suite: a function that yields the cases for given options, and a line of help.
SUITES = {
    "logits": (logits, "losses on logits, over dtype and vocabulary"),
    "heads": (partial(logits, level=HEADS), "losses on hidden states and lm_heads"),
    "training-step": (STEPS, "a step of a small model: forward, loss, backward, AdamW"),
    GUARD: (guard, "what `make bench-guard` compares with a baseline; only if named"),
}
