"""A run as one page: figures, plots and every decision with its reason. Needs nothing else.

The plots are SVG that is drawn here; a few lines of script show the numbers under the pointer.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

from nearfield.simulator.result import Plain

WIDTH, HEIGHT = 960, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 24
COLOURS = 8
"""How many series get a colour of their own; those beyond are one, called "others"."""
MOST_ROWS = 400
MARKS = ("region lost", "region back", "slow", "lost")
MOST_MARKS = 40

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot over time.

    Attributes:
        series: name, values by window. stacked: on top of each other.
        line: a level to keep below, and what it is called.
    """

    title: str
    unit: str
    series: Sequence[tuple[str, Values]]
    stacked: bool = False
    log: bool = False
    line: tuple[float, str] | None = None
    digits: int = 1
    classes: Sequence[str] = field(default_factory=list)


def page(result: Plain) -> str:
    """The whole report."""
    windows = result["windows"]
    clock = Clock(result["start_s"], result["duration_s"], windows["window_s"], windows["count"])
    marks = [
        (change["at_s"], f"{change['kind']}: {change['subject']}")
        for change in result["history"]
        if change["kind"] in MARKS
    ][:MOST_MARKS]
    plots = _plots(result)
    drawn = "\n".join(_figure(plot, i, clock, marks) for i, plot in enumerate(plots))
    data = {
        "times": [clock.text(clock.middle_s(i)) for i in range(clock.count)],
        "plots": [
            {
                "unit": plot.unit,
                "digits": plot.digits,
                "names": [name for name, _ in plot.series],
                "values": [list(values) for _, values in plot.series],
            }
            for plot in plots
        ],
        "frame": [WIDTH, LEFT, RIGHT],
    }
    header = f"<p>{html.escape(_subtitle(result))}</p>"
    body = _BODY.format(
        js=_static("report.js"),
        data=json.dumps(data, separators=(",", ":")).replace("</", "<\\/"),
        tiles="\n".join(_tiles(result)),
        plots=drawn,
        models=_models(result),
        pools=_pools(result),
        traffic=_traffic(result),
        history=_history(result, clock),
        assumed="\n".join(f"<li>{html.escape(text)}</li>" for text in result["assumed"]),
    )
    return document(result["simulation"], "simulated", header, body)


def document(name: str, what: str, header: str, body: str) -> str:
    """A page of its own, of simulated figures.

    Args:
        header, body: HTML.
    """
    title = html.escape(name)
    return _PAGE.format(name=title, what=what, css=_static("report.css"), header=header, body=body)


def _static(name: str) -> str:
    folder = resources.files("nearfield.simulator") / "static"
    return (folder / name).read_text(encoding="utf-8")


# ---- what is shown -------------------------------------------------------------------------------


def _plots(result: Plain) -> list[Plot]:
    windows = result["windows"]
    several = len(result["models"]) > 1
    by = "origin" if len({stream["origin"] for stream in windows["offered"]}) > 1 else "traffic"
    streams: dict[str, list[Values]] = {}
    for stream in windows["offered"]:
        streams.setdefault(stream[by], []).append(stream["rps"])
    title = f"Offered load, by {'where it comes from' if by == 'origin' else 'traffic'}"
    plots = [Plot(title, "requests/s", _most(_sums(streams)), stacked=True)]
    by_pool: dict[str, list[Values]] = {}
    starting: list[Values] = []
    for pool in windows["replicas"]:
        name = f"{pool['region']}/{pool['pool']}" if len(_regions(result)) > 1 else pool["pool"]
        by_pool.setdefault(name, []).append(pool["ready"])
        starting.append(pool["starting"])
    series = [*_most(_sums(by_pool)), ("starting", _sum(starting))]
    classes = [f"c{i}" for i in range(len(series) - 1)] + ["quiet"]
    plots.append(Plot("Replicas, by pool", "replicas", series, stacked=True, classes=classes))
    for latency, model in zip(windows["latency"], result["models"], strict=True):
        of = f" of {model['model']}" if several else ""
        plots.append(
            Plot(
                f"Time to the first token{of}",
                "s",
                [(q, latency[f"ttft_{q}_s"]) for q in ("p50", "p95", "p99")],
                log=True,
                line=(model["slo"]["ttft_s"], "SLO"),
                digits=3,
                classes=["ramp0", "ramp1", "ramp2"],
            )
        )
    late = [(m["model"], [100 * v if v is not None else None for v in m["late_fraction"]])
            for m in windows["latency"]]  # fmt: skip
    plots.append(Plot("Late or failed", "% of requests", late, digits=2))
    cost: dict[str, list[Values]] = {"on demand": [], "spot": []}
    for pool in windows["replicas"]:
        kind = "spot" if pool["capacity"] == "spot" else "on demand"
        cost[kind].append(pool["usd_per_hour"])
    plots.append(
        Plot(
            "Cost, by capacity",
            "USD an hour",
            _sums({kind: parts for kind, parts in cost.items() if parts}),
            stacked=True,
            digits=2,
        )
    )
    return plots


def _regions(result: Plain) -> set[str]:
    return {pool["region"] for pool in result["pools"]}


def _sum(parts: Sequence[Values]) -> Values:
    return [sum(value or 0.0 for value in values) for values in zip(*parts, strict=True)]


def _sums(named: Mapping[str, Sequence[Values]]) -> list[tuple[str, Values]]:
    return [(name, _sum(parts)) for name, parts in named.items()]


def _most(series: list[tuple[str, Values]]) -> list[tuple[str, Values]]:
    """The largest by name, the rest as one."""
    if len(series) <= COLOURS:
        return series
    order = sorted(series, key=lambda pair: -sum(value or 0.0 for value in pair[1]))
    kept = {name for name, _ in order[: COLOURS - 1]}
    rest = [values for name, values in series if name not in kept]
    shown = [pair for pair in series if pair[0] in kept]
    return [*shown, (f"{len(rest)} others", _sum(rest))]


def _subtitle(result: Plain) -> str:
    mode = {"events": "event by event", "fluid": "fluid"}[result["mode"]]
    arrived = result["requests"]["arrived"]
    return (
        f"{arrived:,} requests in {_span(result['duration_s'])}, {mode}, seed {result['seed']}. "
        "Every figure on this page is simulated."
    )


def _tiles(result: Plain) -> list[str]:
    requests, cost = result["requests"], result["cost"]
    kept = all(model["slo_kept"] for model in result["models"])
    attainment = requests["attainment"]
    worst = max(
        (m["ttft_s"]["p99"] for m in result["models"] if m["ttft_s"]["p99"] is not None),
        default=None,
    )
    spot = cost["usd_by_capacity"]["spot"]
    failed = requests["refused"] + requests["expired"] + requests["lost"]
    return [
        _tile(
            "SLO attainment",
            "–" if attainment is None else f"{100 * attainment:.2f} %",
            "kept" if kept else "missed",
            "good" if kept else "bad",
        ),
        _tile("first token, p99", "–" if worst is None else f"{worst:.3g} s", "of the slowest model"
              if len(result["models"]) > 1 else "all requests"),
        _tile("refused, expired, lost", f"{failed:,}", f"{requests['replayed']:,} sent again"),
        _tile("cost", _usd(cost["usd"]), f"{_usd(cost['usd_per_hour'])} an hour"),
        _tile(
            "a thousand requests",
            "–" if cost["usd_per_1000_requests"] is None
            else f"${cost['usd_per_1000_requests']:.3g}",
            f"{100 * spot / cost['usd']:.0f} % of it on spot" if cost["usd"] else "",
        ),
        _tile("replica hours", f"{cost['replica_seconds'] / 3600:,.1f}",
              f"{result['decisions']['that_changed_something']:,} changes"),
    ]  # fmt: skip


def _tile(title: str, value: str, below: str, kind: str = "") -> str:
    return (
        f'<div class="tile {kind}"><span>{html.escape(title)}</span><b>{html.escape(value)}</b>'
        f"<small>{html.escape(below)}</small></div>"
    )


# ---- tables --------------------------------------------------------------------------------------


def _models(result: Plain) -> str:
    return table(
        ("model", "policy", "requests", "late", "SLO", "p50", "p95", "p99", "USD"),
        [
            (
                model["model"],
                model["policy"],
                f"{model['arrived']:,}",
                percent(model["late_fraction"]),
                "kept" if model["slo_kept"] else "missed",
                *(latency(model["ttft_s"][q]) for q in ("p50", "p95", "p99")),
                f"{model['usd']:,.2f}",
            )
            for model in result["models"]
        ],
        numbers_from=2,
    )


def _pools(result: Plain) -> str:
    return table(
        (
            "region",
            "pool",
            "capacity",
            "served",
            "ready h",
            "starting h",
            "launched",
            "lost",
            "USD",
        ),
        [
            (
                pool["region"],
                pool["pool"],
                pool["capacity"].replace("_", " "),
                f"{pool['served']:,}",
                f"{pool['replica_seconds']['ready'] / 3600:,.2f}",
                f"{pool['replica_seconds']['starting'] / 3600:,.2f}",
                f"{pool['launched']:,}",
                f"{pool['lost']:,}",
                f"{pool['usd']:,.2f}",
            )
            for pool in result["pools"]
        ],
        numbers_from=3,
    )


def _traffic(result: Plain) -> str:
    return table(
        ("traffic", "from", "requests", "late", "abroad", "refused", "expired", "lost", "p99"),
        [
            (
                each["traffic"],
                each["origin"],
                f"{each['arrived']:,}",
                percent(each["late_fraction"]),
                f"{each['abroad']:,}",
                f"{each['refused']:,}",
                f"{each['expired']:,}",
                f"{each['lost']:,}",
                latency(each["ttft_s"]["p99"]),
            )
            for each in result["traffic"]
        ],
        numbers_from=2,
    )


def _history(result: Plain, clock: Clock) -> str:
    rows = []
    for change in result["history"][:MOST_ROWS]:
        targets = ", ".join(
            f"{name} {before} → {after}"
            for name, (before, after) in change.get("targets", {}).items()
        )
        rows.append(
            (
                clock.text(change["at_s"]),
                change["kind"],
                change["region"],
                targets or change["subject"],
                change["reason"],
            )
        )
    left = len(result["history"]) - len(rows) + result["history_left_out"]
    more = f"<p>{left:,} more are in the JSON.</p>" if left > 0 else ""
    shown = table(("when", "what", "where", "change", "why"), rows, numbers_from=99)
    return _HISTORY.format(table=shown, count=f"{len(rows):,}", more=more)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int) -> str:
    def cell(tag: str, i: int, text: str) -> str:
        number = ' class="n"' if i >= numbers_from else ""
        return f"<{tag}{number}>{html.escape(text)}</{tag}>"

    lines = ["<table><thead><tr>"]
    lines += [cell("th", i, text) for i, text in enumerate(head)]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        lines.append("<tr>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>")
    lines.append("</tbody></table>")
    return "".join(lines)


def _usd(usd: float) -> str:
    return f"${usd:,.2f}" if usd < 1000 else f"${usd:,.0f}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def latency(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _span(seconds: float) -> str:
    """In the two largest units that it has."""
    parts = []
    for size, unit in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count:.0f} {unit}{'' if count == 1 else 's'}")
    if seconds:
        parts.append(f"{seconds:g} s")
    return " ".join(parts[:2])


# ---- drawing -------------------------------------------------------------------------------------


class Clock:
    """The horizontal axis."""

    def __init__(self, start_s: float, duration_s: float, window_s: float, count: int) -> None:
        self.start_s = start_s
        self.duration_s = duration_s
        self.window_s = window_s
        self.count = count

    def middle_s(self, i: int) -> float:
        return (i + 0.5) * self.window_s

    def x(self, at_s: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * at_s / self.duration_s

    @property
    def _short(self) -> bool:
        return self.duration_s < 7200

    @property
    def axis(self) -> str:
        """What is along it."""
        return "minutes since the start" if self._short else "time of day, UTC"

    def text(self, at_s: float) -> str:
        """The time of day, UTC; minutes and seconds where the run is short."""
        if self._short:
            minutes, seconds = divmod(at_s, 60)
            return f"{minutes:02.0f}:{int(seconds):02d}" if minutes >= 1 else f"{at_s:.0f} s"
        days, rest = divmod(self.start_s + at_s, 86_400)
        day = f"day {days + 1:.0f}, " if self.start_s + self.duration_s > 86_400 + 1 else ""
        return f"{day}{int(rest // 3600):02d}:{int(rest % 3600 // 60):02d}"

    def ticks(self) -> list[float]:
        steps = (1, 5, 10, 30, 60, 300, 600, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400)
        step = next((s for s in steps if self.duration_s / s <= 10), 7 * 86_400)
        return [i * step for i in range(int(self.duration_s / step) + 1)]


def _figure(plot: Plot, index: int, clock: Clock, marks: Sequence[tuple[float, str]]) -> str:
    classes = list(plot.classes) or [f"c{i}" for i in range(len(plot.series))]
    legend = "".join(
        f'<li class="{kind}"><i></i>{html.escape(name)}</li>'
        for (name, _), kind in zip(plot.series, classes, strict=True)
    )
    if marks:
        legend += '<li class="marks"><i></i>faults and losses</li>'
    scale, ticks = _scale(plot)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-plot="{index}">'
        f"<title>{html.escape(plot.title)}</title>"
    ]
    for value in ticks:
        y = scale(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
    for at_s in clock.ticks():
        x = clock.x(at_s)
        end = " last" if x > WIDTH - RIGHT - 24 else ""
        parts.append(f'<text class="x{end}" x="{x:.1f}" y="{HEIGHT - 6}">{clock.text(at_s)}</text>')
    for at_s, words in marks:
        x = clock.x(at_s)
        parts.append(
            f'<path class="mark" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}">'
            f"<title>{html.escape(words)}</title></path>"
        )
    xs = [clock.x(clock.middle_s(i)) for i in range(clock.count)]
    if plot.stacked:
        below = [0.0] * clock.count
        for (_, values), kind in zip(plot.series, classes, strict=True):
            above = [low + (value or 0.0) for low, value in zip(below, values, strict=True)]
            top = " ".join(f"{x:.1f},{scale(v):.1f}" for x, v in zip(xs, above, strict=True))
            base = " ".join(
                f"{x:.1f},{scale(v):.1f}" for x, v in reversed(list(zip(xs, below, strict=True)))
            )
            parts.append(f'<polygon class="area {kind}" points="{top} {base}"/>')
            below = above
    else:
        for (_, values), kind in zip(plot.series, classes, strict=True):
            parts.append(f'<path class="line {kind}" d="{_path(xs, values, scale)}"/>')
    for value in ticks:  # above the areas: on a narrow screen they stand inside
        y = scale(value) + 4
        parts.append(f'<text class="y" x="{LEFT - 8}" y="{y:.1f}">{_number(value)}</text>')
    if plot.line is not None:
        y = scale(plot.line[0])
        parts.append(f'<path class="slo" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="slo" x="{WIDTH - RIGHT - 4}" y="{y - 5:.1f}">'
            f"{html.escape(plot.line[1])} {_number(plot.line[0])} {plot.unit}</text>"
        )
    parts.append(f'<path class="cross" d="M0 {TOP}V{HEIGHT - BOTTOM}"/></svg>')
    return (
        f"<figure><figcaption><h3>{html.escape(plot.title)} <small>{html.escape(plot.unit)}, by "
        f"{clock.axis}</small></h3><ul>{legend}</ul></figcaption>"
        f'<div class="plot">{"".join(parts)}</div></figure>'
    )


def _path(xs: Sequence[float], values: Values, scale: Callable[[float], float]) -> str:
    drawn, pen = [], "M"
    for x, value in zip(xs, values, strict=True):
        if value is None:
            pen = "M"
            continue
        drawn.append(f"{pen}{x:.1f} {scale(value):.1f}")
        pen = "L"
    return "".join(drawn)


def _scale(plot: Plot) -> tuple[Callable[[float], float], list[float]]:
    """From values to heights, and the values to name."""
    totals: list[float | None] = [v for _, values in plot.series for v in values]
    if plot.stacked:
        totals = list(_sum([values for _, values in plot.series]))
    if plot.line is not None:
        totals.append(plot.line[0])
    known = [value for value in totals if value is not None]
    most = max(known, default=0.0) or 1.0
    span = HEIGHT - TOP - BOTTOM
    if plot.log:
        least = min((v for v in known if v > 0), default=0.01)
        low = math.floor(math.log10(least) * 2) / 2
        high = max(low + 0.5, math.ceil(math.log10(most) * 2) / 2)

        def logarithmic(value: float) -> float:
            share = (math.log10(max(value, 1e-9)) - low) / (high - low)
            return TOP + span * (1.0 - min(1.0, max(0.0, share)))

        decades = [10.0**k for k in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)]
        return logarithmic, decades
    step = round_step(most, 5)
    top = step * math.ceil(most / step - 1e-9)

    def linear(value: float) -> float:
        return TOP + span * (1.0 - min(1.0, value / top))

    return linear, [i * step for i in range(round(top / step) + 1)]


def round_step(span: float, most: int) -> float:
    """Between the values that an axis names: at most so many in its span."""
    step = 10.0 ** math.floor(math.log10(span / 4))
    return step * next(k for k in (1, 2, 2.5, 5, 10) if span / (k * step) <= most)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: {what}</title>
<style>
{css}</style>
</head>
<body>
<header>
<p class="badge">simulated</p>
<h1>{name}</h1>
{header}
</header>
{body}</body>
</html>
"""

_HISTORY = """<p><label>Only what has these words: <input id="filter" type="search"
placeholder="on-demand backlog" autocomplete="off"></label> <output id="shown">{count}</output></p>
<div id="history">{table}</div>{more}"""

_BODY = """<section class="tiles">
{tiles}
</section>
<section class="plots">
{plots}
</section>
<section><h2>Models</h2>{models}</section>
<section><h2>Pools</h2>{pools}</section>
<section><h2>Traffic</h2>{traffic}</section>
<section><h2>What was decided, and what happened</h2>{history}</section>
<footer><h2>Assumed</h2><ul>
{assumed}
</ul><p>Made by <code>nearfield simulate</code>.</p></footer>
<div id="tip" hidden></div>
<script id="data" type="application/json">{data}</script>
<script>
{js}</script>
"""
