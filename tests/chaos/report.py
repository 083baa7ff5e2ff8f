"""The report: one row for each experiment, over all of its runs. Pure but for `machine`."""

from __future__ import annotations

import json
import math
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

Document = Mapping[str, Any]
"""A result as JSON has it, with `machine` and `command`."""

HEADER = (
    "| experiment | runs | sent | answered | lost | errors | refused | streams told | duplicated |"
    " abroad | failover s | p99 before ms | during ms | verdict |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|"
)


def machine() -> str:
    """What it ran on, in a line."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores, {memory_gb:.0f} GB, "
        f"Linux {platform.release()}, Python {platform.python_version()}, Ray {version('ray')}; "
        f"load average before {load}"
    )


def render(documents: Sequence[Document]) -> str:
    """Markdown: the table, what was missed, and what only one experiment tells."""
    rows: dict[str, list[Document]] = {}
    for each in documents:
        rows.setdefault(each["experiment"], []).append(each)
    lines = [HEADER, *(_row(name, runs) for name, runs in rows.items()), ""]
    for name, runs in rows.items():
        lines += _said(name, runs)
    ran = Counter((each["command"], each["machine"]) for each in documents)
    lines += ["", "Ran as:", ""]
    lines += [f"- `{command}`, {on} ({count} runs)" for (command, on), count in ran.items()]
    return "\n".join(lines) + "\n"


def _row(name: str, runs: Sequence[Document]) -> str:
    tallies = [run["tally"] for run in runs]

    def total(key: str) -> int:
        return sum(tally[key] for tally in tallies)

    def kind(key: str) -> int:
        return sum(tally["kinds"].get(key, 0) for tally in tallies)

    missed = [run for run in runs if run["missed"]]
    verdict = "passed" if not missed else f"**missed** in {len(missed)} of {len(runs)}"
    sent, lost = total("sent"), kind("lost")
    cells = [
        name,
        str(len(runs)),
        str(sent),
        str(sent - lost),
        str(lost),
        str(kind("error") + kind("cut")),
        str(kind("refused")),
        str(kind("told")),
        str(total("duplicated")),
        str(total("abroad")),
        f"{max(tally['failover_s'] for tally in tallies):.2f}",
        _milliseconds([tally["p99_before_s"] for tally in tallies]),
        _milliseconds([tally["p99_during_s"] for tally in tallies]),
        verdict,
    ]
    return f"| {' | '.join(cells)} |"


def _milliseconds(values_s: Sequence[float | None]) -> str:
    """The median, and the extremes where there are more."""
    known = sorted(1000 * v for v in values_s if v is not None and math.isfinite(v))
    if not known:
        return "–"
    middle = f"{known[len(known) // 2]:.0f}"
    return middle if len(known) == 1 else f"{middle} ({known[0]:.0f}–{known[-1]:.0f})"


def _said(name: str, runs: Sequence[Document]) -> list[str]:
    lines = []
    for number, run in enumerate(runs, 1):
        missed = "".join(f"**{each}**; " for each in run["missed"])
        rest = "; ".join([*run["notes"], *run["tally"]["worst"]])
        if missed or rest:
            lines.append(f"- {name}, run {number}: {missed}{rest}".rstrip("; "))
    return lines


def read(path: Path) -> list[Document]:
    """Results written so far, one a line."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def append(path: Path, document: Document) -> None:
    with path.open("a") as file:
        file.write(json.dumps(document) + "\n")
