"""Tables and plots from results/*.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environments, verdicts
from benchmarks.plot import plot
from benchmarks.sides import SUITES

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """A figure in a table. `spread`: with min–max over the rounds."""

    key: str
    title: str
    digits: int = 1
    spread: bool = True


TABLES: dict[str, tuple[Column, ...]] = {
    "embed": (
        Column("c32_rps", "requests/s at 32", 0),
        Column("c32_p50_ms", "p50 at 32, ms"),
        Column("c32_p99_ms", "p99 at 32, ms"),
        Column("c1_p50_ms", "p50 at 1, ms", 2),
        Column("c1_p99_ms", "p99 at 1, ms", 2),
    ),
    "generate": (
        Column("s1_tokens_per_s", "tokens/s at 1", 0),
        Column("s4_tokens_per_s", "at 4", 0),
        Column("s16_tokens_per_s", "at 16", 0),
        Column("alone_ttft_p50_ms", "first token at 1, ms"),
        Column("s16_ttft_p50_ms", "first token at 16, ms"),
        Column("s1_tpot_ms", "ms a token at 1", 2),
        Column("s16_tpot_ms", "at 16", 2),
        Column("first_ms", "first request, ms", 0),
        Column("s1_p50_ms", "median request, ms", 0),
    ),
    "ingress": (
        Column("c1_p50_ms", "embeddings p50 at 1, ms", 2),
        Column("c32_rps", "requests/s at 32", 0),
        Column("sse1_ttft_p50_ms", "first token, 1 stream, ms", 2),
        Column("sse_ttft_p50_ms", "64 streams: first token p50, ms"),
        Column("sse_ttft_p99_ms", "p99"),
        Column("sse_gap_p50_ms", "gap p50, ms", 2),
        Column("sse_gap_p99_ms", "gap p99, ms", 2),
        Column("sse_tokens_per_s", "tokens/s", 0),
    ),
    "edge": (
        Column("c32_rps", "requests/s at 32", 0),
        Column("c32_cpu_us", "CPU a request, µs"),
        Column("c32_p99_ms", "p99 at 32, ms", 2),
        Column("c1_p50_ms", "p50 at 1, ms", 3),
        Column("c1_p99_ms", "p99 at 1, ms", 2),
        Column("sse1_ttft_p50_ms", "first token, 1 stream, ms", 2),
        Column("sse_ttft_p50_ms", "64 streams: first token p50, ms", 2),
        Column("sse_gap_p99_ms", "gap p99, ms", 2),
        Column("sse_cpu_us_per_token", "CPU a token, µs"),
        Column("rss_mb", "memory, MB", 0, spread=False),
        Column("many_grown_mb", "+ after 200,000 requests"),
        Column("frozen_mb", "+ with 500 frozen readers"),
        Column("ready_s", "ready after, s", 2, spread=False),
    ),
    "replicas": (
        Column("l60_p50_ms", "p50 at 60 %, ms"),
        Column("l60_p99_ms", "p99 at 60 %, ms"),
        Column("l80_p50_ms", "p50 at 80 %, ms"),
        Column("l80_p99_ms", "p99 at 80 %, ms"),
        Column("l60_rps", "requests/s at 60 %", 0),
        Column("l80_rps", "at 80 %", 0),
    ),
}
RANKED = {"embed": "c32_rps", "generate": "s16_tokens_per_s", "edge": "c32_rps"}
LIMIT_KEY = {"embed": "rps", "generate": "s16_tokens_per_s", "edge": "c32_rps"}
LIMIT_TITLE = {"edge": "The client straight at the upstream:"}
LIMITS: dict[str, tuple[Column, ...]] = {
    "embed": (
        *(
            Column(f"{runtime}_batch_{batch}", f"{runtime}, batch {batch}: sentences/s", 0)
            for runtime in ("onnx", "openvino", "compiled", "torch")
            for batch in (1, 4, 8, 16, 32, 64)
        ),
        *(
            Column(f"{runtime}_alone_p50_ms", f"{runtime}, alone: p50, ms", 2)
            for runtime in ("onnx", "openvino", "compiled", "torch")
        ),
        Column("onnx_cosine", "onnx: least cosine to torch", 6, spread=False),
        Column("openvino_cosine", "openvino: least cosine to torch", 6, spread=False),
        Column("compiled_cosine", "compiled: least cosine to torch", 6, spread=False),
    ),
    "generate": (
        *(
            Column(f"{name}_s{streams}_tokens_per_s", f"{title}, {streams} rows: tokens/s", 0)
            for name, title in (("lean", "lean loop"), ("static", "transformers generate"))
            for streams in (1, 4, 16)
        ),
        Column("prefill_p50_ms", "bare prefill: p50, ms", 2),
        Column("equal_answers", "answers equal between the two", 2, spread=False),
    ),
    "edge": (
        Column("c32_rps", "requests/s at 32", 0),
        Column("c1_p50_ms", "p50 at 1, ms", 3),
        Column("sse1_ttft_p50_ms", "first token, 1 stream, ms", 2),
        Column("sse_ttft_p50_ms", "64 streams: first token p50, ms", 2),
    ),
}


class Figures:
    """Medians and spreads of a document."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self._records: dict[str, list[dict[str, Any]]] = {}
        for record in document["measured"]:
            self._records.setdefault(record["side"], []).append(record)

    def values(self, side: str, key: str) -> list[float]:
        """One per round in which the side was measured."""
        records = self._records.get(side, ())
        return [r["figures"][key] for r in records if key in r.get("figures", {})]

    def median(self, side: str, key: str) -> float | None:
        found = self.values(side, key)
        return statistics.median(found) if found else None

    def failure(self, side: str) -> str | None:
        """The first line of why a side failed, if it did in any round."""
        for record in self._records.get(side, ()):
            if "failed" in record:
                return str(record["failed"]).strip().splitlines()[0]
        return None

    def busiest(self, side: str | None = None) -> float:
        """Most that others used of the machine just before a measurement, of one side or of all."""
        records = self.document["measured"] if side is None else self._records.get(side, ())
        return max((r["busy_before"] for r in records), default=0.0)


def write(results: Path) -> list[Path]:
    """Write README.md and one plot per suite that has a JSON file; what was written."""
    documents = {
        suite: json.loads((results / f"{suite}.json").read_text())
        for suite in SUITES
        if (results / f"{suite}.json").is_file()
    }
    if not documents:
        return []
    parts = [_heading(documents)]
    written = []
    for suite, document in documents.items():
        figures = Figures(document)
        picture = results / f"{suite}.svg"
        plot(suite, figures, picture)
        written.append(picture)
        parts.append(_suite(suite, figures))
    readme = results / "README.md"
    readme.write_text("\n\n".join(parts) + "\n")
    return [readme, *written]


def _heading(documents: dict[str, Document]) -> str:
    lines = [
        "# Results",
        "",
        "Written by `python -m benchmarks report`; do not edit. How it is measured, and what to "
        "read into it, is in [the README above](../README.md). A cell is the median over rounds "
        "and, in brackets, the least and the most.",
        "",
        "| suite | when | machine | rounds × window | others' use of the machine, at most |",
        "|---|---|---|---|---|",
    ]
    for suite, document in documents.items():
        about, options = document["machine"], document["options"]
        machine = (
            f"{about['cpu']}, {about['cores']} cores, {about['memory_gb']} GB, Linux "
            f"{about['kernel']}, Python {about['python']}"
        )
        load = " ".join(f"{value:.2f}" for value in about["load_average"])
        lines.append(
            f"| {suite} | {about['started']} ({about['commit']}) | {machine}; load average before "
            f"{load} | {options['rounds']} × {options['seconds']:g} s | "
            f"{100 * Figures(document).busiest():.0f}% of all cores |"
        )
    about = next(iter(documents.values()))["machine"]
    ours = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    peers = sorted({side.venv for suite in documents for side in SUITES[suite]} - {"nearfield"})
    pins = "; ".join(
        f"{peer}: {', '.join(f'{n} {v}' for n, v in environments.versions(peer).items())}"
        for peer in peers
    )
    lines += ["", f"Versions here: {ours}. Peers: {environments.TORCH}; {pins}."]
    if any(document["options"]["quick"] for document in documents.values()):
        lines += ["", "**A quick run: it shows that everything runs, and no more.**"]
    return "\n".join(lines)


def _suite(suite: str, figures: Figures) -> str:
    blocks = [f"## {suite}", f"![{suite}]({suite}.svg)"]
    met = verdicts.of(suite, figures)
    if met:
        rows = [[v.bar, v.needed, v.found, v.outcome] for v in met]
        blocks.append(_table(["bar", "needs", "is", ""], rows))
    blocks.append(_sides(suite, figures))
    if suite in LIMITS:
        rows = [
            [column.title, _cell(figures, "limit", column)]
            for column in LIMITS[suite]
            if figures.values("limit", column.key)
        ]
        title = LIMIT_TITLE.get(suite, "In one process, with nothing around it:")
        blocks += [title, _table(["limit", ""], rows)]
    return "\n\n".join(block for block in blocks if block)


def _sides(suite: str, figures: Figures) -> str:
    columns = TABLES[suite]
    ranked = RANKED.get(suite)
    header = ["side", *(column.title for column in columns), "machine busy before"]
    best = limit = None
    if ranked:
        header += ["of the best peer", "of the limit"]
        best = verdicts.best_peer(suite, figures, ranked)
        limit = figures.median("limit", LIMIT_KEY[suite])
    rows = []
    for side in SUITES[suite]:
        title = f"**{side.title}**" if side.ours else side.title
        if failure := figures.failure(side.name):
            title += f" (failed: {failure[:120]})"
        elif ranked is not None and not figures.values(side.name, ranked):
            continue
        row = [title, *(_cell(figures, side.name, column) for column in columns)]
        row.append(f"{100 * figures.busiest(side.name):.0f}%")
        if ranked:
            own = figures.median(side.name, ranked)
            row += [_ratio(own, best[1] if best else None), _ratio(own, limit)]
        rows.append(row)
    return _table(header, rows)


def _cell(figures: Figures, side: str, column: Column) -> str:
    values = figures.values(side, column.key)
    if not values:
        return "–"
    show: Callable[[float], str] = lambda value: f"{value:,.{column.digits}f}"  # noqa: E731
    middle = show(statistics.median(values))
    if not column.spread or len(values) == 1:
        return middle
    return f"{middle} ({show(min(values))}–{show(max(values))})"


def _ratio(value: float | None, base: float | None) -> str:
    return "–" if value is None or not base else f"{value / base:.2f}×"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    align = "|" + "|".join("---" if i == 0 else "---:" for i in range(len(header))) + "|"
    lines = [f"| {' | '.join(header)} |", align]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
