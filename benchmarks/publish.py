"""The commands that read results: plot, compare, publish.

README and the picture show the machine whose files come last by name (cpu_avx2, cpu_avx512, gpu);
docs/benchmarks.md shows all machines, the last one first.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas
from pandas import DataFrame

from . import picture, runner, tables
from .cases import HEADS, LOGITS, TOPK
from .methods import DENSE_TEACHER, HARD, IN_PLACE, KDLOSS, WITH_HEADS
from .one_case import Record

ROOT = Path(__file__).resolve().parents[1]
README, DOCUMENT, PICTURE = "README.md", "docs/benchmarks.md", "docs/benchmarks.svg"
#: Methods that README and the picture show of a suite, with the fastest peer and the lower bound.
SHOWN = {LOGITS: [IN_PLACE, KDLOSS, "compile", "eager"], HEADS: [WITH_HEADS, "compile", "eager"]}
USUAL = "n == 512 and temperature == 2.0 and divergence == 'forward_kl'"
SIZE = "v == 128256 and dtype in ('bf16', 'fp32')"
_filled = partial(textwrap.fill, width=120, break_long_words=False, break_on_hyphens=False)


def plot(files: Sequence[Path], output: Path) -> int:
    """Write a page and pictures to `output`, print their paths; ValueError if machines differ."""
    records = runner.read(*files)
    first, *others = [x["environment"] for x in records if x["kind"] == "run"]
    for other in others:
        if different := runner.differences(first, other):
            raise ValueError(f"files of different machines or versions: {'; '.join(different)}")
    output.mkdir(parents=True, exist_ok=True)
    pictures = []
    for suite, rows in tables.frame(records).dropna(subset="seconds").groupby("suite", sort=False):
        size, sweeps = tables.sweeps(rows)
        if sweeps := [x for x in sweeps if x[size].nunique() > 1]:
            pictures.append(output / f"{suite}.svg")
            pictures[-1].write_text(picture.of_sweeps(sweeps, size, machine(records)))
    shown = "\n".join(f"![{path.stem}]({path.name})" for path in pictures)
    (output / "report.md").write_text(f"# Benchmarks\n\n{shown}\n\n{page(records)}\n")
    print(*pictures, output / "report.md", sep="\n")
    return 0


def compare(files: Sequence[Path], tolerance: float) -> int:
    """Print changes since the first file; return 1 if any regressed or nothing is comparable."""
    before, *after = [runner.read(path) for path in files]
    for records in after:
        different = runner.differences(*map(runner.environment, (before, records)))
        print(*(f"not the same: {what}" for what in different), sep="\n")
    frames = tables.frame(before), pandas.concat(map(tables.frame, after))
    table, compared, regressions = tables.compare(*frames, tolerance)
    print(table.to_string(index=False, float_format="{:.3g}".format))
    keys = [set(zip(frame.name, frame.method, strict=True)) for frame in frames]
    for where, only in (("before", keys[0] - keys[1]), ("after", keys[1] - keys[0])):
        print(*(f"only {where}: {name}: {method}" for name, method in sorted(only)), sep="\n")
    print(f"{compared} results compared, {regressions} regressions")
    return int(regressions > 0 or compared == 0)


def publish(root: Path = ROOT) -> int:
    """Replace the tables of README and docs, and the picture, from benchmarks/results; return 0."""
    machines: dict[tuple[str, ...], list[Record]] = {}
    for path in sorted((root / "benchmarks" / "results").glob("*.jsonl")):
        facts = runner.environment(records := runner.read(path))
        key = facts["device"], facts["instruction_set"], facts["threads"]
        machines.setdefault(key, []).extend(records)
    reports = [*machines.values()]
    facts, last = runner.environment(reports[-1]), tables.frame(reports[-1])
    texts = {
        (README, "headline"): headline(last, facts),
        (README, "benchmarks"): readme(last, machine(reports[-1])),
        (DOCUMENT, "benchmarks"): "\n\n".join(map(page, reversed(reports))),
    }
    for (name, marker), text in texts.items():
        before, rest = (root / name).read_text().split(f"{marker}:begin -->\n")
        after = rest.split(f"\n<!-- {marker}:end -->")[1]
        (root / name).write_text(
            f"{before}{marker}:begin -->\n{text}\n<!-- {marker}:end -->{after}"
        )
    sweeps, path = shown_sweeps(last), root / PICTURE
    if picture.digest(sweeps) not in path.read_text():  # other versions of matplotlib draw others
        path.write_text(picture.of_sweeps(sweeps, "v", machine(reports[-1])))
    return 0


def machine(records: Sequence[Record]) -> str:
    """Return a line that names the machine, threads, versions and commits of its records."""
    runs = [x["environment"] for x in records if x["kind"] == "run"]
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
    text = "{device}, {threads} threads, {instruction_set}, torch {torch}, commit {commits}"
    return text.format_map({**runs[-1], "commits": commits})


def page(records: Sequence[Record]) -> str:
    """Return a machine's results in Markdown: every sweep of every suite, and the faster peers."""
    results = tables.frame(records)
    parts = [f"### {machine(records)}"]
    for suite, rows in results.groupby("suite", sort=False):
        parts.append(f"#### {suite}")
        size, sweeps = tables.sweeps(rows[rows.status != "skipped"])
        for sweep in sweeps:
            parts += [f"{sweep.case.iloc[0].setting(size)}:", tables.overview(sweep, size)]
        parts += [tables.faster(rows)]
    return "\n\n".join(filter(None, parts))


def headline(results: DataFrame, facts: dict[str, Any]) -> str:
    """Return README's sentence on KDLoss and plain torch in bf16; KeyError if one is missing."""
    rows = results.query(f"suite == '{LOGITS}' and {USUAL} and {SIZE} and dtype == 'bf16'")
    rows = rows.set_index("method").loc[SHOWN[LOGITS]]
    units = [(x, *tables.unit_of(x)) for x in rows.seconds]
    times = [f"{tables.figure(x / scale)} {unit}" for x, unit, scale in units]
    peaks = [f"{tables.mebibytes(x)} MiB" for x in rows.memory]
    is_cpu = rows.device.iloc[0] == "cpu"
    device = f"{facts['threads']} threads of {facts['processor']}" if is_cpu else facts["device"]
    return _filled(
        f"On {device} ({facts['instruction_set']}; 512 × 128256 logits, bf16, forward + backward): "
        f"**{times[0]}** with `inplace=True` ({times[1]} without) against {times[2]} for "
        f"`torch.compile` and {times[3]} for eager torch; memory beyond the inputs: {peaks[0]} "
        f"({peaks[1]} without) against {peaks[2]} and {peaks[3]}."
    )


def readme(results: DataFrame, note: str) -> str:
    """Return README's table of each suite: ours, plain torch, fastest peer; `note`: machine."""
    about = "Forward + backward, `forward_kl` + cross-entropy, T = 2; MiB: the peak beyond the"
    parts = [_filled(f"{note}. {about} inputs.")]
    for suite, title in ((LOGITS, "From logits"), (HEADS, "From hidden states")):
        rows = results.query(f"suite == '{suite}' and {USUAL} and {SIZE}")
        if len(rows):
            setting = rows.case.iloc[0].setting("level", "dtype", "temperature", "divergence")
            shown = [*SHOWN[suite], *best_peer(rows)]
            parts += [f"{title}, {setting}:", tables.overview(rows, "dtype", shown)]
            parts += [tables.faster(rows)]
    return "\n\n".join(filter(None, [*parts, top_k(results)]))


def top_k(results: DataFrame) -> str:
    """Return README's sentence on a top-64 teacher in bf16; "" without results."""
    rows = results.query(f"suite == '{TOPK}' and k == 64 and temperature == 1 and {SIZE}")
    rows = rows.query("dtype == 'bf16' and divergence == 'forward_kl'")
    if rows.empty:
        return ""
    times = rows.set_index("method").seconds.map(lambda x: f"{tables.figure(1e3 * x)} ms")
    peer = "".join(
        f", {times[key]} for {title}"
        for key in best_peer(rows)
        for title in rows[rows.method == key].title
    )
    return _filled(
        f"With a top-64 teacher (bf16, T = 1), in place: **{times[IN_PLACE]}**; {times[HARD]} for "
        f"our hard term alone, {times[DENSE_TEACHER]} with the dense teacher, {times['compile']} "
        f"for `torch.compile`{peer}."
    )


def best_peer(results: DataFrame) -> list[str]:
    """Return [key] of the fastest peer with the same loss, in float32 if possible; else []."""
    peers = results.query("not is_ours and nearest == '' and seconds == seconds")
    peers = peers[~peers.method.isin(("eager", "compile", "checkpoint"))]
    return list(peers.sort_values(["dtype", "seconds"], ascending=[False, True]).method[:1])


def shown_sweeps(results: DataFrame) -> list[DataFrame]:
    """Return the results that the picture shows: of each suite the sweep with the most times."""
    shown = []
    for suite, keys in SHOWN.items():
        rows = results.query(f"suite == '{suite}' and {USUAL}").dropna(subset="seconds")
        if len(rows):
            sweep = max(tables.sweeps(rows)[1], key=len)
            shown.append(sweep[sweep.method.isin([*keys, *best_peer(rows.query(SIZE))])])
    return shown
