"""``python -m benchmarks.gpu_counters``: what three kernels do with the chip, by Nsight Compute.

Occupancy, share of the memory's bandwidth, share of issue slots and executed instructions of: loss
and gradient in bfloat16 and in float32, and the gradient from statistics. Clocks are left as they
are. Skipped if there is no ncu, or if the driver does not give its counters to users.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import gpu_operators, records
from .gpu_options import make_parser, parse, usable
from .report import table
from .sass import find_tool

ROOT = Path(__file__).resolve().parents[1]
#: Title of a column, the counter, and what its value is divided by.
COUNTERS = {
    "ms": ("gpu__time_duration.sum", 1e6),
    "occupancy %": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1.0),
    "memory %": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 1.0),
    "TB/s": ("dram__bytes.sum.per_second", 1e12),
    "issue slots %": ("sm__inst_issued.avg.pct_of_peak_sustained_active", 1.0),
    "registers": ("launch__registers_per_thread", 1.0),
    "10^9 warp instructions": ("smsp__inst_executed.sum", 1e9),
}
#: What ncu says where counters are kept from users.
FORBIDDEN = "ERR_NVGPUCTRPERM"
#: Units that ncu was asked for, and what it is divided by in them.
UNITS = ("--print-units", "base")


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile; return 1 if ncu failed."""
    options = parse(make_parser("gpu_counters", __doc__, writes=True), arguments)
    tool = find_tool("ncu")
    if options.device == "cpu" or tool is None:
        why = "there is no GPU here" if options.device == "cpu" else "no ncu (PATH, CUDA_HOME)"
        print(f"SKIPPED the counters: {why}", flush=True)
        return 0
    failed = 0
    with options.output.open("w") as file:
        writer = records.Writer(file)
        for backend in usable(options):
            failed += _profile(tool, backend, options.seconds, writer)
    return 1 if failed else 0


def _profile(tool: str, backend: str, seconds: float, writer: records.Writer) -> bool:
    """Whether it failed."""
    metrics = ",".join(name for name, _ in COUNTERS.values())
    command = [tool, "--csv", *UNITS, "--metrics", metrics, "--clock-control", "none",
               "--profile-from-start", "off", sys.executable, "-m", gpu_operators.__name__,
               "--backends", backend, "--launch"]  # fmt: skip
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"LEFT OUT counters of {backend}: no end within {seconds:.0f} s", flush=True)
        return False
    if FORBIDDEN in done.stdout + done.stderr:
        print("SKIPPED the counters: the driver keeps them from users (ERR_NVGPUCTRPERM)",
              flush=True)  # fmt: skip
        return False
    kernels = read(done.stdout)
    if done.returncode != 0 or not kernels:
        words = " ".join((done.stdout + done.stderr).split())[-300:]
        print(
            f"FAILED counters of {backend}: ncu ended with {done.returncode}: {words}", flush=True
        )
        return True
    rows = []
    for kernel, found in kernels:
        values = {title: found.get(name) for title, (name, _) in COUNTERS.items()}
        shown = {title: None if value is None else value / COUNTERS[title][1]
                 for title, value in values.items()}  # fmt: skip
        writer.write("counters", backend=backend, kernel=kernel, **shown)
        rows.append([kernel[:60], *("" if x is None else f"{x:.4g}" for x in shown.values())])
    print(table([backend, *COUNTERS], rows), flush=True)
    return False


def read(text: str) -> list[tuple[str, dict[str, float]]]:
    """Return each kernel that ncu's CSV tells of, in order, with its counters by name."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(lines[first:]):
        if not (row.get("Metric Name") and row.get("Metric Value")):
            continue
        _, counters = kernels.setdefault(row["ID"], (row["Kernel Name"], {}))
        try:
            counters[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
        except ValueError:  # "n/a"
            continue
    return list(kernels.values())


if __name__ == "__main__":
    sys.exit(main())
