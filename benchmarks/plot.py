"""One picture per suite: medians as bars, the spread over the rounds as a line on each."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.sides import SUITES

if TYPE_CHECKING:
    from benchmarks.report import Figures

PANELS: dict[str, tuple[tuple[str, str, str | None], ...]] = {
    "embed": (
        ("c32_rps", "requests/s, 32 connections", "rps"),
        ("c32_p99_ms", "p99 in ms, 32 connections", None),
        ("c1_p50_ms", "p50 in ms, 1 connection", "alone_p50_ms"),
    ),
    "generate": (
        ("s16_tokens_per_s", "tokens/s, 16 streams", "s16_tokens_per_s"),
        ("s1_tokens_per_s", "tokens/s, 1 stream", "s1_tokens_per_s"),
        ("alone_ttft_p50_ms", "first token in ms, 1 stream", "prefill_p50_ms"),
    ),
    "ingress": (
        ("c32_rps", "embeddings: requests/s, 32 connections", None),
        ("sse_ttft_p50_ms", "64 streams: first token p50, ms", None),
        ("sse_gap_p99_ms", "64 streams: gap p99, ms", None),
    ),
    "edge": (
        ("c32_rps", "requests/s, 32 connections", None),
        ("c1_p50_ms", "p50 in ms, 1 connection", "c1_p50_ms"),
        ("sse_ttft_p50_ms", "64 streams: first token p50, ms", "sse_ttft_p50_ms"),
    ),
    "replicas": (
        ("l60_p99_ms", "p99 in ms at 60 % of capacity", None),
        ("l80_p99_ms", "p99 in ms at 80 %", None),
        ("l80_p50_ms", "p50 in ms at 80 %", None),
    ),
}
"""Per suite: figure, title, and the limit's figure, drawn as a dashed line."""


def plot(suite: str, figures: Figures, file: Path) -> None:
    """Write the suite's picture as an SVG of the same bytes for the same figures."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = suite
    from matplotlib import pyplot

    sides = [s for s in SUITES[suite] if figures.values(s.name, PANELS[suite][0][0])]
    panels = PANELS[suite]
    size = (4.2 * len(panels) + 2.4, 0.36 * len(sides) + 1.4)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True)
    for axis, (key, title, limit_key) in zip(axes, panels, strict=True):
        for row, side in enumerate(sides):
            values = figures.values(side.name, key)
            middle = statistics.median(values)
            spread = [[middle - min(values)], [max(values) - middle]]
            colour = "#2b6cb0" if side.ours else "#b8bec6"
            axis.barh(row, middle, xerr=spread, color=colour, ecolor="#444444", height=0.7)
            axis.annotate(
                f"{middle:,.0f}" if middle >= 100 else f"{middle:.1f}",
                (max(values), row), xytext=(4, 0), textcoords="offset points", va="center",
                fontsize=8,
            )  # fmt: skip
        limit = figures.median("limit", limit_key) if limit_key else None
        if limit is not None:
            axis.axvline(limit, color="#c05621", linestyle="--", linewidth=1, label="limit")
            axis.legend(fontsize=8, loc="lower right", frameon=False)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(sides)), [side.title for side in sides])
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
