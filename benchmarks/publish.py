"""``python -m benchmarks.publish [--check]``: documents from the committed results.

Writes README's headline and tables, the picture, and the tables of docs/benchmarks.md. With
``--check`` nothing is written: the differences are printed, and the exit status is then 1.

README and the picture are of the last machine by the names of its files, cpu_avx2 before
cpu_avx512 before gpu; docs/benchmarks.md has all of them, the last one first.
"""

from __future__ import annotations

import difflib
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import goals, picture, records, tables
from .cases import HEADS, LOGITS
from .methods.ours import IN_PLACE, KDLOSS, WITH_HEADS
from .records import Report
from .report import Parser, between_markers
from .tables import mebibytes, time_text

if TYPE_CHECKING:
    from pandas import DataFrame

WIDTH = 120  # of a line of text
ROOT = Path(__file__).resolve().parents[1]
README, DOCUMENT, PICTURE = "README.md", "docs/benchmarks.md", "docs/benchmarks.svg"
#: What README and the picture show of both suites, next to the fastest peer and the lower bound.
SHOWN = {LOGITS: [IN_PLACE, KDLOSS, "compile", "eager"], HEADS: [WITH_HEADS, "compile", "eager"]}
USUAL = "n == 512 and temperature == 2.0 and divergence == 'forward_kl'"
SIZE = "v == 128256 and dtype in ('bf16', 'fp32')"


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write or check; return the exit status."""
    parser = Parser(prog="python -m benchmarks.publish", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, print differences")
    is_check, differences = parser.parse_args(arguments).check, []
    try:
        reports = read_all(root)
        last, note = tables.frame(reports[-1]), tables.machine(reports[-1].environment)
        texts = {
            README: {"headline": headline(reports[-1]), "benchmarks": readme(last, note)},
            DOCUMENT: {"benchmarks": "\n\n".join(map(page, reversed(reports)))},
        }
        for name, parts in texts.items():
            old = new = (root / name).read_text()
            for marker, text in parts.items():
                new = between_markers(new, text, marker)
            lines = old.split("\n"), new.split("\n")
            differences += difflib.unified_diff(*lines, name, "the results", n=0, lineterm="")
            if not is_check:
                (root / name).write_text(new)
        path, sweeps = root / PICTURE, shown_sweeps(last)
        if not path.exists() or picture.digest(sweeps) not in path.read_text():
            differences.append(f"{PICTURE} was not made from these results")
        if not is_check:
            path.write_text(picture.of_sweeps(sweeps, "v", note))
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    for line in differences if is_check else [f"written: {README}, {DOCUMENT}, {PICTURE}"]:
        print(line)
    return 1 if is_check and differences else 0


def read_all(root: Path) -> list[Report]:
    """Return the committed results, a report for each machine, in the order of the files' names."""
    machines: dict[tuple[object, ...], list[Path]] = {}
    for path in sorted((root / "benchmarks" / "results").glob("*.jsonl")):
        facts = records.read([path]).environment
        key = tuple(facts.get(name) for name in ("device", "instruction_set", "threads"))
        machines.setdefault(key, []).append(path)
    if not machines:
        raise ValueError("benchmarks/results: there are no results (*.jsonl)")
    return [records.read(paths) for paths in machines.values()]


def page(report: Report) -> str:
    """Return everything about a machine's results in Markdown."""
    found = tables.frame(report)
    parts = [f"### {tables.machine(report.environment)}"]
    for suite, rows in found.groupby("suite", sort=False):
        parts.append(f"#### {suite}")
        for title, table in tables.overviews(rows):
            parts += [f"{title}:", table]
        if lines := tables.faster(rows) + tables.left_out(rows):
            parts.append("\n".join(lines))
    checked = goals.check(found, report.environment.get("memory_bytes"))
    return "\n\n".join(
        [*parts, *(["#### Goals", tables.markdown(checked)] if len(checked) else [])]
    )


def headline(report: Report) -> str:
    """Return a sentence: ours in place against plain torch, in bfloat16."""
    rows = tables.frame(report).query(f"suite == '{LOGITS}' and {USUAL} and {SIZE}")
    rows = rows[rows.dtype == "bf16"].dropna(subset="seconds").set_index("method")
    names = {IN_PLACE: "ours", "compile": "`torch.compile`", "eager": "eager torch"}
    if not all(key in rows.index for key in names):
        return "There are no results of this size."
    (time, *times), (peak, *peaks) = (
        [show(rows.loc[key]) for key in names]
        for show in (lambda row: time_text(row.seconds), lambda row: f"{mebibytes(row.memory)} MiB")
    )
    facts = report.environment
    device = str(facts["device"]).removeprefix("CPU: ")
    threads = f"{facts['threads']} threads of " if rows.device.iloc[0] == "cpu" else ""
    return _filled(
        f"On {threads}{device} ({facts['instruction_set']}; 512 × 128256 logits, bf16, forward + "
        f"backward): **{time}** in place against {times[0]} for `torch.compile` and {times[1]} for "
        f"eager torch; memory beyond the logits: {peak} against {peaks[0]} and {peaks[1]}."
    )


def readme(found: DataFrame, note: str) -> str:
    """Return a table for each suite: ours, plain torch, the fastest peer and the lower bound."""
    about = (
        "Forward + backward, `forward_kl` + cross-entropy, T = 2; MiB: the peak beyond the inputs"
    )
    parts = [_filled(f"{note}. {about}.")]
    for suite, title in ((LOGITS, "From logits"), (HEADS, "From hidden states")):
        rows = found.query(f"suite == '{suite}' and {USUAL} and {SIZE}")
        if len(rows):
            setting = rows.case.iloc[0].setting("level", "dtype", "temperature", "divergence")
            parts.append(f"{title}, {setting}:")
            parts.append(tables.overview(rows, "dtype", [*SHOWN[suite], *best_peer(rows)]))
            parts += tables.faster(rows)
    return "\n\n".join(parts)


def best_peer(found: DataFrame) -> list[str]:
    """Return the fastest that is not plain torch and computes the same, in float32 if there is."""
    plain_torch = found.method.isin(("eager", "compile", "checkpoint"))
    peers = found[~found.is_ours & ~plain_torch & (found.nearest == "")].dropna(subset="seconds")
    return list(peers.sort_values(["dtype", "seconds"], ascending=[False, True]).method[:1])


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def shown_sweeps(found: DataFrame) -> list[DataFrame]:
    """Return what the picture shows: by suite the sweep over V with most times.

    Raises:
        ValueError: If there is no such sweep.
    """
    shown = []
    for suite, keys in SHOWN.items():
        rows = found.query(f"suite == '{suite}' and {USUAL}").dropna(subset="seconds")
        if len(rows):
            sweep = max(tables.sweeps(rows, "v"), key=len)
            shown.append(sweep[sweep.method.isin([*keys, *best_peer(rows.query(SIZE))])])
    if not shown:
        raise ValueError("the results have no cases over the vocabulary to draw")
    return shown


if __name__ == "__main__":
    sys.exit(main())
