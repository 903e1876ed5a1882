"""The loss curves of every comparison in one picture: the framework's own under ours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from benchmarks.pictures import style

#: Inches of a panel, of the heading; panels in a row.
WIDTH, HEIGHT, MARGIN, COLUMNS = 3.4, 2.4, 0.55, 4
OWN, OURS = style.FAMILIES["eager"], style.FAMILIES["kdloss"]


def curves(lines: Sequence[dict[str, Any]]) -> str:
    """An SVG; it names the digest of what it shows.

    Raises:
        ValueError: there is no matplotlib.
    """
    style.need_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    rows = -(-len(lines) // COLUMNS)
    height = rows * HEIGHT + MARGIN
    with matplotlib.rc_context(style.SETTINGS):
        figure = Figure(figsize=(COLUMNS * WIDTH, height))
        figure.subplots_adjust(left=0.04, right=0.99, top=1 - 0.95 * MARGIN / height - 0.03,
                               bottom=0.5 / height, wspace=0.22, hspace=0.6)  # fmt: skip
        for i, line in enumerate(lines, 1):
            axis = figure.add_subplot(rows, COLUMNS, i)
            steps = range(1, line["steps"] + 1)
            axis.plot(steps, line["losses_own"], color=OWN, linewidth=5, alpha=0.45)
            axis.plot(steps, line["losses_ours"], color=OURS, linewidth=1.4)
            axis.set_title(line["name"], fontsize=8.5)
            axis.set_xlabel(f"at most {line['largest_loss_difference']:.1e} apart", fontsize=8)
        heading = 1 - 0.3 / height
        figure.text(0.012, heading, "Loss by step:", fontsize=12, weight="bold")
        figure.text(0.115, heading, "the framework's own loss (broad)", fontsize=12, color=OWN)
        figure.text(0.34, heading, "fused_kd (narrow)", fontsize=12, color=OURS, weight="bold")
    return style.svg(figure, digest(lines))


def digest(lines: Sequence[dict[str, Any]]) -> str:
    """Of everything that the picture shows."""
    shown = [[line["name"], line["losses_own"], line["losses_ours"]] for line in lines]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()
