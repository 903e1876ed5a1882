"""``python -m benchmarks.accuracy [--write docs/numerics.md]``: worst errors against float64.

KDLoss and the eager composition, over the regimes of ``fused_kd.testing`` (if the exact values are
finite), temperatures 1 and 2, hard and soft term at 0.5 each, upstream gradients that are not 1.
The errors are kept in a file of results, for ``compare``. Units are those of the error rule
(``fused_kd.testing.conditioning``), per row:

* loss: eps32·(1 + max|z-m|) of each term, weighted as the term is, plus eps32 of the loss;
* gradient in norm: ‖g-g*‖ over eps32·‖g*‖, or for 16-bit logits over half a unit in the last
  place, (eps16/2)·‖g*‖, plus what float32 arithmetic costs the row at least;
* gradient by element: the largest |g_v-g*_v| over the same with |g*_v| in the 16-bit term: 1 is
  what rounding to the dtype alone may cost.

Entries of "tvd" whose sign is undetermined are left out; their effect on the others is added to the
slack.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fused_kd import kd_loss
from fused_kd.backends import why_not
from fused_kd.divergences import DIVERGENCES
from fused_kd.options import BACKENDS, KDOptions
from fused_kd.testing import REGIMES, Inputs, Result, conditioning, make_inputs, truth_and_eager

from . import records, schema
from .cases import DTYPES, Case
from .device import environment
from .report import Parser, between_markers, markdown_table

NAME, SUITE = "accuracy", "units"  # of its markers, of its records
TEMPERATURES = (1.0, 2.0)
#: Rows and vocabulary: one block and a tail; several blocks and a tail.
SHAPES = ((8, 1009), (4, 32003))
#: The errors, as the table's head names them; its columns.
PARTS = {"loss": "loss", "gradients": "gradient in norm", "element": "gradient by element"}
COLUMNS = [*product(PARTS, ("KDLoss", "eager"))]


def errors_of(
    got: Result, truth: Result, inputs: Inputs, upstream: Tensor, options: KDOptions
) -> dict[str, float]:
    """Return the worst error of the rows whose exact loss and gradient are finite, in units."""
    unit = conditioning(inputs, truth, upstream, options)
    dtype = got.grad.dtype
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    exact = torch.where(unit.clear, truth.grad, 0.0)  # (N, V)
    error = torch.where(unit.clear, got.grad.double() - truth.grad, 0.0).abs()
    # subnormals of float16 are rounded to a fixed step
    step = torch.finfo(dtype).smallest_normal * (torch.finfo(dtype).eps / 2)
    # undetermined signs and steps are per entry: in norm they count root-V times
    per_entry = unit.undetermined + step  # (N,)
    in_norm = unit.grad + per_entry * error.shape[1] ** 0.5
    found = {
        "loss": (got.rows.double() - truth.rows).abs() / unit.loss,
        "gradients": error.norm(dim=1) / (rounding * exact.norm(dim=1) + in_norm),
        "element": (error / (rounding * exact.abs() + (unit.grad + per_entry)[:, None])).amax(1),
    }
    finite = truth.rows.isfinite() & truth.grad.isfinite().all(1)
    return {part: float(rows[finite].max()) for part, rows in found.items() if finite.any()}


def fused_result(inputs: Inputs, upstream: Tensor, **keywords: object) -> Result:
    """Return the rows, and the gradient of Σ upstream·row, the way that training takes it."""
    rows = kd_loss(*inputs, reduction="none", **keywords)
    student = inputs.student.clone().requires_grad_()
    sides = student, inputs.teacher, inputs.labels
    kd_loss(*sides, token_weight=upstream, reduction="sum", **keywords).backward()
    return Result(rows, student.grad)


def measure(case: Case, backend: str, writer: records.Writer) -> None:
    """Write the errors of KDLoss and of the eager composition in a case."""
    inputs = make_inputs(case.regime, case.n, case.v, DTYPES[case.dtype])
    upstream = torch.linspace(0.6, 1.7, case.n)
    truth, eager = truth_and_eager(inputs, upstream, **case.keywords)
    ours = fused_result(inputs, upstream, backend=backend, **case.keywords)
    for key, title, result in (("kdloss", "KDLoss", ours), ("eager", "eager", eager)):
        error = errors_of(result, truth, inputs, upstream, KDOptions(**case.keywords))
        about = key, title, key == "kdloss", "measured"
        if error:
            writer.add(schema.Result(SUITE, case.sizes, *about, error=error))


def accuracy_table(report: records.Report) -> str:
    """Return the worst errors by dtype and divergence in Markdown, and where one is not finite."""
    import pandas

    rows = pandas.DataFrame(
        {**result.case, "title": result.title, **result.error} for result in report.results.values()
    )
    parts = [*PARTS]
    is_finite = rows[parts].map(math.isfinite)
    lost, rows[parts] = rows[~is_finite.all(axis=1)], rows[parts].where(is_finite)
    by = ["dtype", "divergence"]
    worst = rows.groupby([*by, "title"], sort=False)[parts].max().unstack("title", sort=False)
    cells = [[dtype, f"`{divergence}`", *(f"{row[part, title]:.2f}" for part, title in COLUMNS)]
             for (dtype, divergence), row in worst.iterrows()]  # fmt: skip
    head = [
        *by,
        *(PARTS[part] + ("" if title == "KDLoss" else ", eager") for part, title in COLUMNS),
    ]
    table = markdown_table(head, cells, left=2)
    if lost.empty:
        return table
    lines = ["Not finite where the exact value is (left out above):", ""]
    for (dtype, divergence, title), regimes in lost.groupby([*by, "title"], sort=False).regime:
        lines.append(f"* {title}, {dtype} `{divergence}`: `{'`, `'.join(sorted(set(regimes)))}`")
    return "\n".join([table, "", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or write it; return the exit status."""
    parser = Parser(prog="python -m benchmarks.accuracy", description=__doc__)
    add = parser.add_argument
    add("--write", type=Path, metavar="FILE", help="between the markers of this file")
    add("--output", type=Path, metavar="FILE", default=Path("out/accuracy.jsonl"))
    add("--backend", choices=BACKENDS, default="cpu", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if (reason := why_not(options.backend, "cpu")) is not None:
        parser.error(f"the {options.backend} backend cannot run: {reason}")
    torch.set_num_threads(1)
    here = environment()
    grid = product(DTYPES, DIVERGENCES, REGIMES, TEMPERATURES, SHAPES)
    cases = [Case(*shape, dtype, t, name, regime=regime) for dtype, name, regime, t, shape in grid]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w") as file:
        writer = records.Writer(file)
        writer.add(schema.Run(here, {}, ["accuracy", "--backend", options.backend]))
        for case in tqdm(cases, disable=None):
            measure(case, options.backend, writer)
    note = (f"`python -m benchmarks.accuracy`, backend {options.backend}, "
            f"{here['instruction_set']}, torch {here['torch']}")  # fmt: skip
    text = f"{accuracy_table(records.read([options.output]))}\n\n{note}"
    if options.write is None:
        print(text)
    else:
        options.write.write_text(between_markers(options.write.read_text(), text, NAME))
    return 0


if __name__ == "__main__":
    sys.exit(main())
