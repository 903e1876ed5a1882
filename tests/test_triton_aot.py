"""The Triton kernels compiled for GPUs that are not here: spills, shared memory, vector loads."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.triton_resources import Kernel, Variant, compile_variant
from fused_kd.backends.triton import configuration as cut
from fused_kd.divergences import DIVERGENCES

TARGETS = [75, 80, 90, 100, 120, "gfx942"]
#: The most bytes of shared memory. A fold of four sums over a program's warps takes 128; a tensor
#: that changes its layout takes a whole sub-block, 4096 and more.
SHARED_LIMIT = 128
#: The same for rows that begin anywhere: their tiles change their layout to be read by vectors.
SHARED_LIMIT_UNALIGNED = 8192
OPERATORS = ("forward_backward_into", "forward", "backward_", "rescale_")

B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(F32, F32), (B16, B16), (F16, F16), (B16, F32)]


def _kernels(variant: Variant, target: int | str, folder: Path) -> list[Kernel]:
    """Return the kernels of a call; assert that none spills, lacks vector loads or has float64."""
    kernels = compile_variant(variant, target, folder)
    assert kernels
    for i, kernel in enumerate(kernels):
        assert kernel.spills == 0
        assert kernel.shared <= (SHARED_LIMIT if variant.aligned else SHARED_LIMIT_UNALIGNED)
        code = kernel.code["amdgcn" if isinstance(target, str) else "ptx"]
        vector_load = (
            "(?:global|buffer)_load_dwordx4"
            if isinstance(target, str)
            else r"ld\.global\S*\.v4\.b32"
        )
        # where programs do not wait, the last launch of a forward reads sums and no row; AMD's
        # compiler joins the loads of a row's sums, which are neighbours, if there are four
        reads_rows = i == 0 or variant.operator not in ("forward", "measure")
        if variant.operator == "measure":  # after a forward, or two of a top-k teacher's
            reads_rows = i in (0, len(kernels) - 1)
        if reads_rows and (variant.aligned or not isinstance(target, str)):
            assert bool(re.search(vector_load, code)) == variant.aligned
        assert not re.search(r"^\s*(?!\.param|ld\.param)\S*f64", code, re.MULTILINE)
    return kernels


# one of each kind: the oldest and the newest GPU; another vendor's, whose programs do not wait;
# two statistics passes; a teacher of another dtype; rows that vectors cannot read
@pytest.mark.parametrize(
    ("target", "variant", "launches"),
    [
        (75, Variant(), 1),
        (90, Variant(smoothing=True), 1),
        (90, Variant(divergence="jsd", teacher=F32), 1),
        (90, Variant(vocabulary=50257, aligned=False), 1),
        (90, Variant("rescale_"), 2),
        (100, Variant("forward", "mse", student=F32, teacher=F32), 1),
        ("gfx942", Variant(divergence="reverse_kl"), 2),
        (90, Variant(k=64), 1),
        ("gfx942", Variant(divergence="jsd", k=64), 2),
        (90, Variant("measure"), 2),
        (100, Variant("measure", student=F32, teacher=F32), 2),
        ("gfx942", Variant("measure"), 3),
        (80, Variant("measure", k=64), 3),
    ],
    ids=str,
)
def test_some_kernels(target: int | str, variant: Variant, launches: int, tmp_path: Path) -> None:
    assert len(_kernels(variant, target, tmp_path)) == launches


def test_a_spill_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_kd.backends.triton.launch.registers", lambda *_: 40)
    (kernel,) = compile_variant(Variant(), 90, tmp_path)
    assert kernel.registers <= 40
    assert kernel.spills > 0


# of a top-k teacher: after its support's logits were copied, and after the label's gradient too
@pytest.mark.parametrize(("k", "barriers"), [(None, 2), (64, 4)])
def test_barriers_around_the_label(k: int | None, barriers: int, tmp_path: Path) -> None:
    # In place, no warp may store a gradient before all have read the label's logits, nor the
    # label's gradient before all have stored. The interpreter has one thread and finds neither
    (kernel,) = compile_variant(Variant("backward_", k=k), 90, tmp_path)
    assert len(re.findall(r"bar\.sync|barrier\.sync", kernel.code["ptx"])) == barriers


@pytest.mark.parametrize(("divergence", "waits"), [("forward_kl", 2), ("tvd", 3)])
def test_the_memory_order_of_programs_that_wait(
    divergence: str, waits: int, tmp_path: Path
) -> None:
    # Nothing here runs them: what is stored is released, and read from L2 after an acquire.
    # A program waits for the previous row in the ring, then for each statistics pass of its row,
    # and releases its row as often
    (kernel,) = compile_variant(Variant(divergence=divergence), 90, tmp_path)
    kinds = {
        "release": r"red\.global\.gpu\.release\.add\.u32|atom\.global\.gpu\.release\.add\.u32",
        "acquire": r"ld\.global\.gpu\.acquire\.b32|atom\.global\.gpu\.acquire\.add\.u32",
        "sums": r"ld\.global\.cg\.b32",
        "barrier": r"bar\.sync",
    }
    pattern = "|".join(f"(?P<{name}>{form})" for name, form in kinds.items())
    order = [str(match.lastgroup) for match in re.finditer(pattern, kernel.code["ptx"])]
    text = " ".join(order)
    assert order.count("acquire") == waits
    # once more to release the slot in the ring, here and for an ignored row, which reads nothing
    assert order.count("release") == waits - 1 + 2
    # every warp has stored before one thread releases, and waits for the one that acquires
    assert text.count("barrier release") == order.count("release")
    assert text.count("acquire barrier") == waits
    # sums are read after this program has arrived and then waited for the others
    groups = re.findall(r"barrier release barrier acquire barrier(?: sums)+", text)
    assert len(groups) == waits - 1
    assert sum(group.count("sums") for group in groups) == order.count("sums") >= 6
    # and the slot in the ring is released after the last of them
    assert re.search(r"sums(?: barrier)+ release(?: barrier)+$", text)


def test_the_memory_order_of_a_support(tmp_path: Path) -> None:
    # It is marked before the pass, which reads the marks from L2. Its logits, which each program
    # copies from its slice, are read from L2 after all programs have arrived.
    (kernel,) = compile_variant(Variant(k=64), 90, tmp_path)
    kinds = {
        "mark": r"red\.global\.gpu\.relaxed\.or\.b32",
        "marks": r"ld\.global\.cg\.b8",
        "release": r"red\.global\.gpu\.release\.add\.u32|atom\.global\.gpu\.release\.add\.u32",
        "acquire": r"ld\.global\.gpu\.acquire\.b32|atom\.global\.gpu\.acquire\.add\.u32",
        "copy": r"st\.global\.b32",
        "sums": r"ld\.global\.cg\.b32",
        "barrier": r"bar\.sync",
    }
    pattern = "|".join(f"(?P<{name}>{form})" for name, form in kinds.items())
    order = [str(match.lastgroup) for match in re.finditer(pattern, kernel.code["ptx"])]
    text = " ".join(order)
    # the first barrier of the pair after the marks were cleared, the second before they are read
    assert "copy barrier copy mark barrier marks" in text
    last_acquire = max(i for i, kind in enumerate(order) if kind == "acquire")
    assert order.index("mark") < order.index("release") < last_acquire < order.index("sums")
    # three sums of the parts, then a logit in either loop over the support
    assert order[last_acquire:].count("sums") == 5


# the last loads; the second pass of jsd needs the first pass's sums in every program
@pytest.mark.parametrize(("divergence", "loads_of_reports"), [("forward_kl", 6), ("jsd", 2)])
def test_programs_that_report_nothing_read_no_sums(
    divergence: str, loads_of_reports: int, tmp_path: Path
) -> None:
    # Forward only: what another program may not have stored yet is read after waiting for it
    (kernel,) = compile_variant(Variant("forward", divergence), 90, tmp_path)
    code = kernel.code["ttgir"]
    around: list[str] = []  # the lines that open the regions around a line
    loads = []
    for line in code.splitlines():
        if line.strip().startswith("}"):
            around.pop()
        if re.search("cache_?[mM]odifier = cg", line):
            loads.append([opening for opening in around if "scf.if" in opening])
        if line.endswith("{"):
            around.append(line)
    waits = [x for x in re.split(r"(?=scf\.if)", code) if "tt.atomic_rmw add, acquire" in x]
    for regions in loads[-loads_of_reports:]:
        # a kept row, and a program that waits for the others
        assert len(regions) == 2, regions
        condition = regions[-1].split("scf.if")[1].split()[0]
        assert any(x.startswith(f"scf.if {condition} ") for x in waits), condition


def test_a_scale_is_looked_at_first(tmp_path: Path) -> None:
    # If it leaves nothing to do, no program reads anything else
    for kernel in compile_variant(Variant("rescale_"), 90, tmp_path):
        before, condition, _ = kernel.code["ttgir"].partition("scf.if")
        assert condition
        assert len(re.findall(r"tt\.load|tt\.atomic", before)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", [*DIVERGENCES, None])
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel(
    target: int | str,
    divergence: str | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    tmp_path: Path,
) -> None:
    if divergence is None and dtypes[0] != dtypes[1]:
        pytest.skip("no term reads the teacher")
    first = Variant(divergence=divergence, student=dtypes[0], teacher=dtypes[1])
    for variant in [
        *(replace(first, operator=operator) for operator in OPERATORS),
        replace(first, smoothing=True),
        *([replace(first, hard=False)] if divergence else []),
    ]:
        _kernels(variant, target, tmp_path)
    if target == 90:
        with cut.overridden(wait=0):
            _kernels(first, target, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("target", [100, "gfx942"])
def test_every_kernel_of_a_top_k_teacher(
    target: int | str, divergence: str, tmp_path: Path
) -> None:
    first = Variant(divergence=divergence, k=64)
    for operator in OPERATORS:
        _kernels(replace(first, operator=operator), target, tmp_path)
    for changes in ({"smoothing": True}, {"hard": False}, {"student": F32}):
        _kernels(replace(first, **changes), target, tmp_path)
    _kernels(replace(first, vocabulary=50257, aligned=False), target, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_that_measures(
    target: int | str, dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path
) -> None:
    first = Variant("measure", student=dtypes[0], teacher=dtypes[1])
    for variant in (
        *(first, replace(first, k=64)),
        *(replace(first, vocabulary=v, aligned=False) for v in (50257, 128256)),
    ):
        _kernels(variant, target, tmp_path)


# nothing is known of addresses: V = 50257, or a view that begins anywhere
@pytest.mark.slow
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("target", [90, "gfx942"])
def test_every_kernel_of_unaligned_rows(
    target: int | str, divergence: str, dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path
) -> None:
    student, teacher = dtypes
    for vocabulary in (50257, 128256):
        rows = Variant("forward_backward_into", divergence, vocabulary=vocabulary, aligned=False)
        _kernels(replace(rows, student=student, teacher=teacher), target, tmp_path)


# --------------------------------------------------------------------------- configurations, source


# a warp; a tile; one slice and two; the two vocabularies of the goals; the longest of them
@pytest.mark.parametrize(
    ("vocabulary", "warps", "vector", "parts"),
    [(32, 1, 8, 1), (4096, 8, 8, 1), (20480, 8, 8, 1), (32000, 8, 8, 2)]
    + [(50257, 8, 1, 4), (128256, 8, 8, 8), (151936, 8, 8, 8), (262144, 8, 8, 16)],
)
def test_configurations(vocabulary: int, warps: int, vector: int, parts: int) -> None:
    chosen = cut.configuration(vocabulary, B16, B16)
    assert (chosen.warps, chosen.vector, chosen.parts) == (warps, vector, parts)
    assert chosen.vector * chosen.unroll == cut.ENTRIES
    for other in cut.candidates(chosen):
        assert other.parts == chosen.parts


@pytest.mark.parametrize("setting", ["49152", "160000", "0", "-5", "48K", ""])
def test_slices_of_another_size(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_KD_SLICE_BYTES", setting)
    cut._slice_bytes.cache_clear()
    expected = {"49152": 16, "160000": 4}
    try:
        if setting in expected:
            assert cut.configuration(128256, B16, B16).parts == expected[setting]
        else:
            with pytest.raises(ValueError, match="FUSED_KD_SLICE_BYTES must be a positive number"):
                cut.configuration(128256, B16, B16)
    finally:
        cut._slice_bytes.cache_clear()


#: Pointers to what is float32 or an integer already, and those of `load_tile`, whose tensors are
#: widened when they are used.
PLAIN = {"row.label", "w_ptr", "scale_ptr", "row.stats", "ptr", "all_parts", "s_from", "t_from"}
PLAIN |= {f"row.classes.{name}" for name in ("token_ids", "inside", "logits")} | {"marks"}
PLAIN |= {f"{name}_ptr" for name in ("labels", "weight", "hard", "soft")}


def test_logits_are_float32_before_they_are_used() -> None:
    # Else bfloat16 is added as integers by the interpreter, and in 8 bits by a GPU
    folder = Path(cut.__file__).parent
    sources = [
        (folder / name).read_text(encoding="utf-8")
        for name in ("kernels.py", "classes.py", "moments.py")
    ]
    uses = re.findall(r"(.{8})tile\.[st]\[", "".join(sources))
    assert uses == ["widened("] * 9
    nodes = [node for text in sources for node in ast.walk(ast.parse(text))]
    calls = [x for x in nodes if isinstance(x, ast.Call)]
    casts = [x for x in calls if ast.unparse(x).endswith(".to(tl.float32)")]
    cast = {id(x.func.value) for x in casts if isinstance(x.func, ast.Attribute)}
    loads = [call for call in calls if ast.unparse(call.func) == "tl.load"]
    assert len(loads) > 10
    for load in loads:
        assert id(load) in cast or ast.unparse(load.args[0]).split(" ")[0] in PLAIN
    for name in ("elements.py", "formulas.py", "rules.py"):
        assert "tl.load" not in (folder / name).read_text(encoding="utf-8")
    for name in ("elements.py", "formulas.py", "rules.py"):
        assert "tl.load" not in (folder / name).read_text(encoding="utf-8")
