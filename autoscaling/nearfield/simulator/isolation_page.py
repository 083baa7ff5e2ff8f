"""A comparison of layouts as one page: cost against p99, and the table. Needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nearfield.simulator.report import document, round_step, table

WIDTH, HEIGHT = 960, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 16, 40
COLOURS = 8


def page(found: Mapping[str, Any]) -> str:
    """The page of what `nearfield pools plan --json` prints."""
    now, choice = found["now"], found["choice"]
    figures = [f"{what}: {whence}" for what, whence in found["figures"].items()] + [
        f"{layout}: with an engine that serves products in turn, as generate does"
        for layout in found["needs_turns"]
    ]
    if choice is None:
        verdict = "No layout that was looked at keeps the promises."
    else:
        verdict = (
            f"{choice['layout']} ({choice['pools']}): p99 of the others "
            f"{_time(now['others']['p99_ms'])} → {_time(choice['others']['p99_ms'])} for "
            f"{100 * choice['cost_over_now']:+.0f} % of the cost."
        )
    header = (
        f"<p>{html.escape(verdict)}</p>\n"
        f"<p>The others are protected from {html.escape(found['noisy'])}.</p>"
    )
    body = _BODY.format(
        plot=_plot(found),
        rows=_rows(found),
        figures="\n".join(f"<li>{html.escape(text)}</li>" for text in figures),
    )
    return document(found["simulation"], "pools", header, body)


def _rows(found: Mapping[str, Any]) -> str:
    products = list(found["now"]["products"])
    head = ["layout", "pools", "", "USD/month", "over now", "others p99", "over 2 s, peak"]
    head += [f"{name} p99" for name in products] + ["ms saved per USD/h"]
    rows = []
    for row in found["rows"]:
        saved = row["p99_ms_saved_per_usd_per_hour"]
        words = (
            [] if row["pools"] != found["now"]["pools"] or row["layout"] != "shared" else ["now"]
        )
        if row["needs_turns"]:
            words.append("in turn")
        elif not row["offered"]:
            words.append("refuses too many")
        if row["promises_kept"]:
            words.append("keeps the promises")
        if row["dominated_by"] is not None:
            words.append(f"dominated by {row['dominated_by_layout']}, {row['dominated_by']}")
        rows.append(
            [
                row["layout"],
                row["pools"],
                ", ".join(words),
                f"{row['usd_per_month']:,.0f}",
                f"{100 * row['cost_over_now']:+.0f} %",
                _time(row["others"]["p99_ms"]),
                f"{100 * row['others']['over_2_s_at_peak']:.1f} %",
                *(_time(row["products"][name]["p99_ms"]) for name in products),
                "" if saved is None else f"{saved:,.0f}",
            ]
        )
    return table(head, rows, numbers_from=3)


def _plot(found: Mapping[str, Any]) -> str:
    """Each layout's sizes as a line, the frontier as steps; both axes begin at nothing."""
    rows = [row for row in found["rows"] if row["others"]["p99_ms"] is not None]
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    most_usd: float = 1.08 * max(row["usd_per_month"] for row in rows)
    least_usd: float = 0.92 * min(row["usd_per_month"] for row in rows)
    most_ms: float = 1.1 * max(row["others"]["p99_ms"] for row in rows)

    def x(usd: float) -> float:
        share = (usd - least_usd) / (most_usd - least_usd)
        return LEFT + (WIDTH - LEFT - RIGHT) * share

    def y(ms: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - ms / most_ms)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>Cost against p99</title>']
    for ms in _ticks(0, most_ms):
        parts.append(f'<path class="grid" d="M{LEFT} {y(ms):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 8}" y="{y(ms) + 4:.1f}">{ms:,.0f}</text>')
    for usd in _ticks(least_usd, most_usd):
        parts.append(f'<text class="x" x="{x(usd):.1f}" y="{HEIGHT - 20}">{usd:,.0f}</text>')
    parts.append(
        f'<text class="x" x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 4}">USD a month</text>'
    )
    frontier = [
        row
        for row in rows
        if row["dominated_by"] is None and (row["offered"] or row == found["now"])
    ]
    steps = ""
    for row in frontier:
        at_x, at_y = x(row["usd_per_month"]), y(row["others"]["p99_ms"])
        steps += f"H{at_x:.1f}V{at_y:.1f}" if steps else f"M{at_x:.1f} {at_y:.1f}"
    parts.append(f'<path class="line quiet" stroke-dasharray="5 4" d="{steps}"/>')
    for i, layout in enumerate(layouts):
        kind = f"c{min(i, COLOURS - 1)}"
        own = [row for row in rows if row["layout"] == layout]
        spots = [(x(row["usd_per_month"]), y(row["others"]["p99_ms"]), row) for row in own]
        path = "L".join(f"{at_x:.1f} {at_y:.1f}" for at_x, at_y, _ in spots)
        parts.append(f'<path class="line {kind}" d="M{path}"/>')
        for at_x, at_y, row in spots:
            words = f"{layout}, {row['pools']}: {_time(row['others']['p99_ms'])}"
            parts.append(
                f'<circle class="area {kind}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="5">'
                f"<title>{html.escape(words)}</title></circle>"
            )
    goal = min(found["promised_p99_ms"].values(), default=None)
    if goal is not None and goal < most_ms:
        parts.append(f'<path class="slo" d="M{LEFT} {y(goal):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="slo" x="{WIDTH - RIGHT - 4}" y="{y(goal) - 5:.1f}">promised</text>'
        )
    legend = "".join(
        f'<li class="c{min(i, COLOURS - 1)}"><i></i>{html.escape(layout)}</li>'
        for i, layout in enumerate(layouts)
    )
    return (
        "<figure><figcaption><h3>First token, p99 of the others <small>ms, simulated</small></h3>"
        f'<ul>{legend}<li class="quiet"><i></i>frontier</li></ul></figcaption>'
        f"{''.join(parts)}</svg></figure>"
    )


def _ticks(low: float, high: float) -> Sequence[float]:
    step = round_step(high - low, 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _time(ms: float | None) -> str:
    return "failed" if ms is None else f"{ms:,.0f} ms"


_BODY = """<section class="plots">
{plot}
</section>
<section><h2>Layouts</h2>{rows}</section>
<footer><h2>Where the figures are from</h2><ul>
{figures}
</ul><p>Made by <code>nearfield pools plan</code>.</p></footer>
"""
