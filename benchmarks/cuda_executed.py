"""``python -m benchmarks.cuda_executed``: what the CUDA kernel that reads each logit once executes.

The compiler's machine code of rows_cluster is run (see :mod:`.sass_machine`) on rows of a training
step, with the parameters and the grid that launch.cu chooses, and every instruction that a warp
executes is counted: prologue, new maxima, merges, exchange, gradient, ends. The losses and
gradients that come out are compared with float64: code that is read wrongly gives wrong ones.
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path

import numpy as np
import torch

from fused_kd import kd_loss
from fused_kd.ops import STATS

from .cuda_resources import DIVERGENCES, compile_with_nvcc, instantiate
from .sass import disassemble, usage
from .sass_machine import GLOBAL_BASE, Launch, Machine

V, ROWS, SEED, SPREAD = 151936, 2, 0, 3.0
NAMES = ("student", "teacher", "grad", "labels", "w_hard", "w_soft", "hard", "soft", "stats")
#: By the way in which the hard term's exponential is computed.
TEMPERATURES = {"1": 1.0, "2": 2.0, "another": 3.0}


class Rows:
    """Rows of logits as an ordinary step has them, in one piece of memory, and what comes out."""

    def __init__(self, divergence: str, temperature: float) -> None:
        self.divergence, self.temperature = divergence, temperature
        random = np.random.default_rng(SEED)
        sides = torch.from_numpy(SPREAD * random.standard_normal((2, ROWS, V))).float().bfloat16()
        labels = torch.from_numpy(random.integers(0, V, ROWS))
        weights, losses = torch.full((ROWS,), 0.5 / ROWS), torch.zeros(ROWS)
        tensors = [*sides, torch.zeros_like(sides[0]), labels, weights, weights, losses, losses]
        self.memory = torch.zeros(4 * sides.nbytes, dtype=torch.uint8)
        #: By name, in the order of captured_launch.cu: tensors, and their addresses.
        self.tensors, self.addresses, begin = {}, {}, 0
        for name, tensor in zip(NAMES, [*tensors, torch.zeros(ROWS, STATS)], strict=True):
            stored = self.memory[begin : begin + tensor.nbytes].view(tensor.dtype)
            self.tensors[name] = stored.view(tensor.shape).copy_(tensor)
            self.addresses[name] = GLOBAL_BASE + begin
            begin += -(-tensor.nbytes // 256) * 256
        if divergence == "none":
            self.addresses["w_soft"] = 0

    def plan(self, library: ctypes.CDLL) -> Launch:
        """Return what launch.cu launches for them."""
        params, shape = ctypes.create_string_buffer(4096), (ctypes.c_int64 * 4)()
        call = ROWS, V, DIVERGENCES.index(self.divergence), self.temperature
        size = library.capture(*call, *self.addresses.values(), params, shape)
        if not size:
            raise RuntimeError("launch.cu does not launch rows_cluster once")
        return Launch(*shape, params.raw[:size])

    def check(self) -> None:
        """Raise unless losses and gradients are those of float64: code was read wrongly."""
        student, labels = self.tensors["student"].double().requires_grad_(), self.tensors["labels"]
        teacher, options = self.tensors["teacher"].double(), {"divergence": self.divergence}
        if self.divergence == "none":
            options = {"soft_weight": 0.0}
        options |= {"temperature": self.temperature, "reduction": "none", "return_parts": True}
        true = kd_loss(student, teacher, labels, **options)
        (gradient,) = torch.autograd.grad(true.loss.mean(), student)
        for name, expected in (("hard", true.hard), ("soft", true.soft)):
            loss = self.tensors[name].double()
            if not torch.allclose(loss, expected.detach(), rtol=1e-4, atol=1e-6):
                raise RuntimeError(f"the {name} loss comes out wrong: {loss}, {expected}")
        # the label's entry is larger than all others together
        is_label = torch.nn.functional.one_hot(labels, V).bool()
        error = self.tensors["grad"].double() - gradient
        for part in (is_label, ~is_label):
            share = (error * part).norm(dim=1) / (gradient * part).norm(dim=1)
            if not (share < 0.01).all():
                raise RuntimeError(f"the gradient comes out wrong, by {share}")


def compile_launcher(folder: Path) -> ctypes.CDLL:
    """Return captured_launch.cu, compiled for the host."""
    source, library = Path(__file__).with_name("captured_launch.cu"), folder / "captured_launch.so"
    compile_with_nvcc(source, library, "90a", "-shared", "-Xcompiler=-fPIC")
    launcher = ctypes.CDLL(str(library))
    numbers = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_double]
    launcher.capture.argtypes = [*numbers, *[ctypes.c_void_p] * (len(NAMES) + 2)]
    return launcher


def compile_cluster(divergence: str, folder: Path) -> Path:
    """Return the cubin of rows_cluster for bfloat16 on both sides and sm_90a."""
    kernel = ("rows_cluster", f"Divergence::{divergence}", "Dtype::bf16", "true")
    source = instantiate(folder / f"{divergence}.cu", [kernel])
    return compile_with_nvcc(source, folder / f"{divergence}.cubin", "90a", "-cubin")


def execute(
    divergence: str, temperature: float, cubin: Path, library: ctypes.CDLL
) -> tuple[float, float]:
    """Run a kernel on rows; return its warp instructions per element, times 32 lanes.

    Then of these exponentials, logarithms and reciprocals: one kind of unit does them all.
    """
    (code,) = disassemble(cubin).values()
    rows = Rows(divergence, temperature)
    counts = Machine(code, rows.plan(library), rows.memory.numpy()).run() * 32 / (ROWS * V)
    rows.check()
    special = [line.opcode.startswith("MUFU") for line in code.instructions]
    return counts.sum(), counts[special].sum()


def main() -> None:
    """Print the table."""
    print("| divergence | hard term at T = | instructions | special | registers |")
    print("| :--- | :--- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        library = compile_launcher(Path(name))
        for divergence in DIVERGENCES:
            cubin = compile_cluster(divergence, Path(name))
            (resources,) = usage(cubin).values()
            matters = divergence not in ("mse", "none")
            for label, temperature in (TEMPERATURES if matters else {"any": 1.0}).items():
                total, special = execute(divergence, temperature, cubin, library)
                cells = f"{total:.1f} | {special:.1f} | {resources.registers}"
                print(f"| {divergence} | {label} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
