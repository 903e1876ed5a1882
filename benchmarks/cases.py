"""What is measured: one loss on one size, and the suites of such cases."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import REGIMES

#: What a case gives a method: logits, heads (hidden states and lm_heads), or a training step.
LOGITS, HEADS, STEP = "logits", "heads", "step"


@dataclass(frozen=True)
class Case:
    """One loss on one size; models of one dtype, hard and soft term at 0.5 each, no bias."""

    n: int
    v: int
    dtype: str  # a key of fused_kd.testing.DTYPES
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
    def name(self) -> str:
        """Return a name for people, unique among cases."""
        return f"{self.level} {self.setting('level')}"

    def setting(self, *without: str) -> str:
        """Return the case in words, without some of its sizes and what is usual."""
        words = {
            "level": {HEADS: "hidden states", STEP: "training step"}.get(self.level, self.level),
            "dtype": self.dtype,
            "n": f"N={self.n}",
            "v": f"V={self.v}",
            "hidden": f"H={self.student_hidden}/{self.teacher_hidden}",
            "temperature": f"T={self.temperature:g}",
            "divergence": self.divergence,
            "regime": self.regime,
            "device": self.device,
        }
        usual = "H=0/0", "randn", "cpu"
        return " ".join(x for key, x in words.items() if key not in without and x not in usual)


#: Sizes that the options replace: those of real vocabularies, and heads of small models.
USUAL: dict[str, Any] = {
    "dtype": ("bf16", "fp32"),
    "v": (32000, 128256, 262144),
    "n": (512,),
    "divergence": ("forward_kl",),
    "temperature": (2.0,),
    "hidden": (1024, 2048),
}


def logits(
    options: Namespace, level: str = LOGITS, regime: str = "randn", **own: Any
) -> Iterator[Case]:
    """Yield every combination of the options' sizes, else of the suite's own, else of USUAL."""
    *sizes, hidden = (getattr(options, name) or own.get(name, USUAL[name]) for name in USUAL)
    for dtype, v, n, divergence, t in product(*sizes):
        heads = (0, 0) if level == LOGITS else hidden
        yield Case(n, v, dtype, t, divergence, level, *heads, options.device, regime)


def growth(options: Namespace) -> Iterator[Case]:
    """Yield doubled N at the middle vocabulary, and V at the middle number of rows; both levels."""
    every_n = options.n or (128, 256, 512, 1024)
    every_v = options.v or (32064, 64128, 128256, 256512)
    n, v = every_n[len(every_n) // 2], every_v[len(every_v) // 2]
    for level, sizes in product((LOGITS, HEADS), ((every_n, [v]), ([n], every_v))):
        sweep = Namespace(**{**vars(options), "n": sizes[0], "v": sizes[1]})
        yield from logits(sweep, level, dtype=["fp32"], hidden=(256, 512))


def accuracy(options: Namespace) -> Iterator[Case]:
    """Yield inputs that have broken some implementation."""
    for regime in REGIMES:
        yield from logits(options, regime=regime, v=[8192], n=[16])


def guard(options: Namespace) -> Iterator[Case]:
    """Yield sizes far larger than the caches, and small ones of every divergence."""
    yield from logits(options, n=[128], v=[128256])
    yield from logits(options, dtype=["bf16"], n=[64], v=[32768], divergence=DIVERGENCES)


ACCURACY, GUARD = "accuracy", "guard"
SUITES = {
    "logits": logits,
    "heads": partial(logits, level=HEADS),
    "training-step": partial(logits, level=STEP, dtype=["fp32"], v=[32000], hidden=(512, 1024)),
    "growth": growth,
    ACCURACY: accuracy,  # errors alone, no times
    GUARD: guard,  # only if named
}
