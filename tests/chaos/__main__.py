"""All experiments by one command, with a report.

    python -m tests.chaos                                    everything, 1,000 requests, three times
    python -m tests.chaos --only replica,region --repeats 1
    python -m tests.chaos --report docs/reliability-results.md --keep

Ends with 1 where a criterion was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos import faults, report
from tests.chaos.experiments import EXPERIMENTS, Size
from tests.chaos.world import EU_NORTH, EU_WEST, US_EAST, World

PLACES = {2: (EU_WEST, US_EAST), 3: (EU_WEST, EU_NORTH, US_EAST)}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--regions", type=int, choices=sorted(PLACES), default=3)
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help="names, with commas")
    parser.add_argument("--report", type=Path, help="Markdown; results are kept beside it")
    parser.add_argument("--folder", type=Path, help="for logs and state; kept; else a new one")
    parser.add_argument("--keep", action="store_true", help="add to the results that are there")
    given = parser.parse_args(arguments)
    given.only = given.only.split(",")
    if unknown := set(given.only) - EXPERIMENTS.keys():
        parser.error(f"no such experiment: {min(unknown)}; there are {', '.join(EXPERIMENTS)}")
    return given


def main(arguments: list[str]) -> int:
    given = parse(arguments)
    began_s = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began_s:6.1f} s  {text}", flush=True)

    command = " ".join(["python -m tests.chaos", *arguments])
    about = {"command": command, "machine": report.machine()}
    documents = []
    unfiltered = faults.no_packet_filter()
    with (
        tempfile.TemporaryDirectory(prefix="nearfield-chaos-") as scratch,
        World(given.folder or Path(scratch), PLACES[given.regions], say) as world,
    ):
        for name in given.only:
            experiment = EXPERIMENTS[name]
            if experiment.filters and unfiltered is not None:
                say(f"{name}: left out, {unfiltered}")
                continue
            if experiment.regions > given.regions:
                say(f"{name}: left out, it needs {experiment.regions} regions")
                continue
            for repeat in range(given.repeats):
                if documents:
                    world.recover()
                size = Size(given.requests, seed=repeat + 1, timed=True)
                result = asyncio.run(experiment.run(world, size))
                documents.append({**result.to_json(), **about})
                if given.report is not None:
                    _write(given.report, documents[-1], fresh=len(documents) == 1, given=given)
                tally = result.tally
                say(
                    f"{name} {repeat + 1}: {tally.of('ok')} of {tally.sent} good, failover "
                    f"{tally.failover_s:.2f} s, p99 {1000 * tally.p99_before_s:.0f} → "
                    f"{1000 * tally.p99_during_s:.0f} ms; "
                    f"{'; '.join(result.missed) or 'passed'}"
                )
                for note in (*result.notes, *tally.worst):
                    say(f"    {note}")
    print(report.render(documents))
    return int(any(document["missed"] for document in documents))


def _write(
    path: Path, document: report.Document, *, fresh: bool, given: argparse.Namespace
) -> None:
    results = path.with_suffix(".jsonl")
    if fresh and not given.keep:
        results.unlink(missing_ok=True)
    report.append(results, document)
    path.write_text(f"# Results\n\n{report.render(report.read(results))}")


def _end_well(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)  # with all that was started


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end_well)
    sys.exit(main(sys.argv[1:]))
