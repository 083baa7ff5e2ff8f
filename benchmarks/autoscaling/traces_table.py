"""The table of `benchmarks.autoscaling.traces`, and how its figures stand to the targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

DAY_S = 86_400
SERVEGEN = ("m_large", "m_small", "deepseek_r1")
ORACLE_MARGIN = 0.08
"""Over the oracle, on ServeGen's traces with boots up to SOON_S: the target."""
SOON_S = 120
TUNED = ("static", "reactive_tuned", "serve_tuned", "kpa_tuned")
"""Baselines whose number was set with the trace known."""
UNTUNED = ("reactive_one", "serve_default", "kpa_default")
COLUMNS = {
    "nearfield": "**nearfield**",
    "reactive_tuned": "reactive, tuned",
    "serve_tuned": "Serve, tuned",
    "kpa_tuned": "KPA, tuned",
    "static": "static",
    "static_peak": "peak",
    "reactive_one": "reactive, one setting",
    "serve_default": "Serve",
    "kpa_default": "KPA",
}


def text(result: Mapping[str, Any]) -> str:
    """All of it, as Markdown."""
    allowed, rows = result["allowed_late"], result["cells"]
    lines = [
        "# Recorded traffic: what a policy costs at the same lateness",
        "",
        "Every figure is simulated, in a fluid queue of one pool, on recorded traffic; how, and",
        "what the oracle is: [docs/autoscaling.md](../../../docs/autoscaling.md#how-good-it-is).",
        "Written by `python -m benchmarks.autoscaling traces`.",
        "",
        "`oracle` is its mean number of replicas, starting ones counted; every other column is the",
        f"cost over it. Where more than {allowed:.0%} was late, that share follows in brackets and",
        "the policy does not pass; `none` where no setting does. From *reactive, tuned* to *peak*",
        "the trace was known beforehand; the last three, and nearfield, have one setting for all.",
        "",
    ]
    for trace in dict.fromkeys(row["trace"] for row in rows):
        own = [row for row in rows if row["trace"] == trace]
        first = own[0]
        lines += [
            f"## {trace}",
            "",
            f"{first['unit'].capitalize()}, {first['arrivals']}, "
            f"{_span(first['from_s'], first['seconds'])}.",
            "",
            *_table(own, allowed),
            "",
        ]
    return "\n".join([*lines, "## Against the targets", "", *_verdict(rows, allowed), ""])


def _span(from_s: int, seconds: int) -> str:
    whole = f"{seconds / DAY_S:.3g} days" if seconds >= DAY_S else f"{seconds / 60:.0f} min"
    return f"{whole}, from day {from_s // DAY_S + 1} of the trace on" if from_s else whole


def _table(rows: Sequence[Row], allowed: float) -> Iterable[str]:
    shown = {k: v for k, v in COLUMNS.items() if any(k in row["policies"] for row in rows)}
    yield "| replicas | boot | oracle | " + " | ".join(shown.values()) + " |"
    yield "|---|---|---|" + "---|" * len(shown)
    for row in rows:
        policies = row["policies"]
        oracle = policies["oracle"]["cost"]
        cells = [_cell(policies.get(name), oracle, allowed) for name in shown]
        head = f"| {row['scale']} | {row['boot_s']} s | {oracle:.2f} | "
        yield head + " | ".join(cells) + " |"


def _cell(found: Mapping[str, Any] | None, oracle: float, allowed: float) -> str:
    if not found:
        return "none"
    over = f"{found['cost'] / oracle - 1:+.1%}"
    return over if _passes(found, allowed) else f"{over} ({found['late']:.1%})"


def _passes(found: Mapping[str, Any], allowed: float) -> bool:
    return bool(found["late"] <= allowed)


def _verdict(rows: Sequence[Row], allowed: float) -> Iterable[str]:
    """How many rows meet each target, by trace."""
    yield (
        f"| trace | late ≤ {allowed:.0%} | mean over the oracle | boots ≤ {SOON_S} s: within "
        f"{ORACLE_MARGIN:.0%} | at most the best tuned one | at most the best untuned that passes |"
    )
    yield "|---|---|---|---|---|---|"
    for trace in dict.fromkeys(row["trace"] for row in rows):
        own = [row["policies"] | {"boot_s": row["boot_s"]} for row in rows if row["trace"] == trace]
        passed = sum(_passes(p["nearfield"], allowed) for p in own)
        above = [p["nearfield"]["cost"] / p["oracle"]["cost"] - 1 for p in own]
        soon = [a for a, p in zip(above, own, strict=True) if p["boot_s"] <= SOON_S]
        near = f"{sum(a <= ORACLE_MARGIN for a in soon)} of {len(soon)}"
        yield (
            f"| {trace} | {passed} of {len(own)} | {sum(above) / len(above):+.1%} | "
            f"{near if trace in SERVEGEN else ''} | {_beaten(own, TUNED, allowed)} | "
            f"{_beaten(own, UNTUNED, allowed)} |"
        )


def _beaten(rows: Sequence[Mapping[str, Any]], names: Sequence[str], allowed: float) -> str:
    """In how many rows nearfield passes and costs no more than the cheapest of these that does."""
    won = 0
    for policies in rows:
        found = [policies.get(name) for name in names]
        passing = [p["cost"] for p in found if p and _passes(p, allowed)]
        own = policies["nearfield"]
        won += _passes(own, allowed) and own["cost"] <= min(passing, default=float("inf"))
    return f"{won} of {len(rows)}"
