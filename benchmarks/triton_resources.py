"""What the Triton kernels take of a GPU, compiled without one: instructions, registers, spills.

    python -m benchmarks.triton_resources [target ...] [--tables executed resources]
        [--modes mode ...] [--write docs/backends.md]

prints two tables as Markdown: the instructions that are executed per element (sm_90, see
:mod:`.triton_counts`); and for every kernel x divergence x dtypes x target what the compiler
reports, with the configuration that a launch for V = 128256 would take.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fused_kd.backends.triton import launch
from fused_kd.backends.triton.configuration import (
    AMD,
    BLACKWELL,
    NVIDIA,
    Kind,
    configuration,
)
from fused_kd.backends.triton.device import load_kernels
from fused_kd.divergences import DIVERGENCES

#: CUDA compute capabilities and AMD architectures.
from .report import Parser, markdown_table, show, writable_file
from .triton_counts import BUDGETS, executed

#: The tables; `triton_<name>` names their markers.
TABLES = ("executed", "resources")
TARGETS = (75, 80, 90, 100, 120, "gfx942", "gfx90a")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
)
#: What is launched: steps and whether there is a gradient. One launch whose programs wait, its
#: forward only, the same without waiting, and the gradient by itself.
MODES = {
    "forward_backward": ("ALL", True),
    "forward": ("ALL", False),
    "first pass": ("FIRST", False),
    "second pass": ("SECOND", False),
    "last pass": ("LAST", True),
    "backward": ("BACKWARD", True),
    "rescale": ("BACKWARD", True),
}


@dataclass(frozen=True)
class Variant:
    """One compilation of the rows kernel."""

    mode: str = "forward_backward"
    divergence: str | None = "forward_kl"  # None: the hard term alone
    hard: bool = True
    smoothing: bool = False
    student: torch.dtype = torch.bfloat16
    teacher: torch.dtype = torch.bfloat16
    vocabulary: int = 128256
    aligned: bool = True  # pointers and strides are multiples of 16
    scalars: str = "fp32"


@dataclass(frozen=True)
class Resources:
    """What the compiler reports for one kernel."""

    registers: int
    spills: int
    shared: int  # bytes
    code: dict[str, str] = field(repr=False)  # by kind: ttgir, ptx or amdgcn
    cubin: bytes = field(default=b"", repr=False)  # NVIDIA's


def _is_amd(target: int | str) -> bool:
    return isinstance(target, str)


def _kind(target: int | str) -> Kind:
    return AMD if _is_amd(target) else BLACKWELL if target == 100 else NVIDIA


def _code(divergence: str | None) -> int:
    return load_kernels().NONE if divergence is None else DIVERGENCES.index(divergence)


def has_two_passes(divergence: str | None) -> bool:
    """Return whether a divergence takes two statistics passes."""
    return bool(load_kernels().rule_of(_code(divergence)).two_passes)


def compile_rows(variant: Variant, target: int | str) -> Resources:
    """Compile _kd_rows_kernel as a launch would."""
    kernels = load_kernels()
    chosen = configuration(variant.vocabulary, variant.student, variant.teacher, _kind(target))
    step, gradient = MODES[variant.mode]
    constants: dict[str, Any] = {
        "D": _code(variant.divergence),
        "HAS_HARD": variant.hard,
        "SMOOTHING": variant.smoothing,
        "STEP": getattr(kernels, step).value,
        "WAIT": step == "ALL" and chosen.parts > 1 and not _is_amd(target),
        "PARTS": chosen.parts,
        "LANES": chosen.lanes,
        "VECTOR": chosen.vector,
        "UNROLL": chosen.unroll,
        "RING": launch.RING_PARTS // chosen.parts,
        "CUDA": 0 if isinstance(target, str) else target,
    }
    absent = {
        "g_ptr": not gradient,
        "labels_ptr": not variant.hard,
        "w_hard_ptr": not variant.hard,
        "w_soft_ptr": variant.divergence is None,
        "scale_ptr": variant.mode != "rescale",
        "hard_ptr": step == "BACKWARD",
        "soft_ptr": step == "BACKWARD",
        "partial_ptr": chosen.parts == 1 or step == "BACKWARD",
        "counters_ptr": not constants["WAIT"],
    }
    constants.update({name: None for name, is_absent in absent.items() if is_absent})
    types = {
        "s_ptr": "*" + NAMES[variant.student],
        "g_ptr": "*" + NAMES[variant.student],
        "t_ptr": "*" + NAMES[variant.teacher],
        "labels_ptr": "*i64",
        "counters_ptr": "*i32",
    }
    scalars = ("k", "power", "temperature", "beta", "soft_factor", "soft_slope", "smoothing")
    types.update(dict.fromkeys(scalars, variant.scalars))
    types.update(dict.fromkeys(("N", "S", "V"), "i32"))
    strides = [name for name in kernels._kd_rows_kernel.arg_names if "stride" in name]
    types.update(dict.fromkeys(strides, "i64"))
    specialized = ["V"] + strides if variant.aligned else []
    return _compile(
        kernels._kd_rows_kernel,
        types,
        constants,
        specialized,
        variant.aligned,
        target,
        launch._options(
            chosen,
            _kind(target),
            kernels.rule_of(constants["D"]),
            variant.smoothing,
            variant.aligned,
        ),
    )


def _compile(
    kernel: Any,
    types: dict[str, str],  # "*fp32" for what is not named
    constants: dict[str, Any],
    specialized: list[str],  # arguments that are multiples of 16
    aligned: bool,
    target: int | str,
    options: dict[str, Any],
) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32")
        for name in kernel.arg_names
    }
    divisible = [
        (i,)
        for i, name in enumerate(kernel.arg_names)
        if name not in constants
        and (name in specialized or (aligned and signature[name].startswith("*")))
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={position: [["tt.divisibility", 16]] for position in divisible} or None,
    )
    gpu = GPUTarget("hip", target, 64) if _is_amd(target) else GPUTarget("cuda", target, 32)
    compiled = triton.compile(source, target=gpu, options=options)
    return _resources(compiled, _is_amd(target))


def _resources(compiled: Any, is_amd: bool) -> Resources:
    code = {name: text for name, text in compiled.asm.items() if isinstance(text, str)}
    shared = int(compiled.metadata.shared)
    if is_amd:
        text = code["amdgcn"]

        def number(name: str) -> int:
            found = re.search(rf"\.{name}:\s+(\d+)", text)
            assert found is not None, name
            return int(found[1])

        spills = number("vgpr_spill_count") + number("sgpr_spill_count")
        return Resources(number("vgpr_count"), spills, shared, code)
    report = nvidia_tool("cuobjdump", compiled.asm["cubin"], "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert found is not None, report
    spills = int(found[2]) + int(found[3])
    return Resources(int(found[1]), spills, shared, code, compiled.asm["cubin"])


def nvidia_tool(name: str, cubin: bytes, *arguments: str) -> str:
    """Return what a tool of triton's own wheel prints about a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run(
            [str(tool), *arguments, str(file)], capture_output=True, text=True, check=True
        ).stdout


def compile_scale(dtype: torch.dtype, target: int | str) -> Resources:
    """Compile _kd_scale_kernel as a launch would."""
    kernel = load_kernels()._kd_scale_kernel
    types = {"g_ptr": "*" + NAMES[dtype]}
    types.update(dict.fromkeys(("N", "S", "V"), "i32"))
    types.update(dict.fromkeys(("stride_b", "stride_s"), "i64"))
    constants = {"ANY": True, "BLOCK": 4096}
    return _compile(
        kernel,
        types,
        constants,
        ["V", "stride_b", "stride_s"],
        True,
        target,
        {**launch._EXACT, "num_warps": 8},
    )


#: What is counted: a name, the kernel, T.
COUNTED = [
    *((name, Variant(divergence=name), "2") for name in DIVERGENCES),
    ("forward_kl", Variant(), "1.5"),
    ("forward_kl, label smoothing", Variant(smoothing=True), "2"),
    ("forward_kl, forward only", Variant("forward"), "2"),
    ("forward_kl, fp32", Variant(student=torch.float32, teacher=torch.float32), "2"),
]
VOCABULARIES = (128256, 151936)


def _count(task: tuple[Variant, str]) -> list[str]:
    variant, temperature = task
    chosen = configuration(variant.vocabulary, variant.student, variant.teacher)
    passes = 1 + has_two_passes(variant.divergence) + MODES[variant.mode][1]
    found = executed(
        compile_rows(variant, 90).cubin, variant.vocabulary, chosen, passes, temperature == "2"
    )
    return [f"{x:.1f}" for x in (found.instructions, found.around, found.special)]


def executed_table() -> str:
    """Return the instructions that are executed per element, in Markdown."""
    import triton

    tasks = [(replace(v, vocabulary=n), t) for _, v, t in COUNTED for n in VOCABULARIES]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        cells = pool.map(_count, tasks)
        lines = [
            [name, temperature, *(x for _ in VOCABULARIES for x in next(cells))]
            for name, _, temperature in COUNTED
        ]
    head = ["forward and backward, with the hard term", "T"]
    for n in VOCABULARIES:
        head += [f"V = {n}", "of these around the loops", "special functions"]
    budgets = ", ".join(f"{card} {i:g} and {s:g}" for card, (i, s) in BUDGETS.items())
    return "\n\n".join(
        (
            "Instructions executed per element, bfloat16, sm_90. In the time that memory takes for "
            "two reads and one write of 16 bits, a card has time for this many instructions "
            f"and special functions: {budgets}; for float32 twice that.",
            markdown_table(head, lines, left=1),
            "`python -m benchmarks.triton_resources --tables executed`, "
            f"triton {triton.__version__}",
        )
    )


def _cell(task: tuple[Variant | torch.dtype, int | str]) -> str:
    what, target = task
    if isinstance(what, torch.dtype):
        found = compile_scale(what, target)
    else:
        # where programs do not wait for each other, the last of several launches
        split = _is_amd(target) and what.mode == "forward_backward"
        found = compile_rows(replace(what, mode="last pass") if split else what, target)
    return f"{found.registers} / {found.spills} / {found.shared}"


def report(targets: Sequence[int | str], modes: Sequence[str]) -> str:
    """Return what the compiler reports, in Markdown."""
    import triton

    rows: list[tuple[str, str, str, Variant | torch.dtype]] = [
        (
            mode,
            divergence,
            f"{NAMES[s]}, {NAMES[t]}",
            Variant(mode, divergence, student=s, teacher=t),
        )
        for mode in modes
        for divergence in DIVERGENCES
        if mode != "second pass" or has_two_passes(divergence)
        for s, t in DTYPES
    ]
    rows += [("scale", "", name, dtype) for dtype, name in NAMES.items()]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        cells = pool.map(_cell, [(what, target) for *_, what in rows for target in targets])
        lines = [[*names, *(next(cells) for _ in targets)] for *names, _ in rows]
    head = ["kernel", "divergence", "student, teacher"]
    head += [t if isinstance(t, str) else f"sm_{t}" for t in targets]
    return "\n\n".join(
        (
            "Registers / bytes spilled / bytes of shared memory of a program; V = 128256, with the "
            "hard term. AMD: the last of several launches.",
            markdown_table(head, lines, left=3),
            f"`python -m benchmarks.triton_resources {' '.join(map(str, targets))} --tables "
            f"resources`, triton {triton.__version__}",
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or write them; return the exit status."""
    parser = Parser(prog="python -m benchmarks.triton_resources", description=__doc__)
    add = parser.add_argument
    add("targets", nargs="*", help="75 80 90 100 120 gfx942 gfx90a; default: all")
    add("--tables", nargs="*", default=list(TABLES), choices=TABLES)
    add("--modes", nargs="*", default=["forward_backward"], choices=list(MODES))
    add("--write", type=writable_file, metavar="FILE", help="between the markers of this file")
    options = parser.parse_args(arguments)
    for name in options.tables:
        parser.check_markers(options.write, f"triton_{name}")
    targets = [int(t) if t.isdigit() else t for t in options.targets] or list(TARGETS)
    if "executed" in options.tables:
        show(executed_table(), options.write, "triton_executed")
    if "resources" in options.tables:
        show(report(targets, options.modes), options.write, "triton_resources")
    return 0


if __name__ == "__main__":
    sys.exit(main())
