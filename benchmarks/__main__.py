"""`python -m benchmarks run` measures, `python -m benchmarks report` writes tables and plots."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import environments, machine, suites
from benchmarks.sides import SUITES

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, then report")
    run.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all")
    run.add_argument("--rounds", type=int, default=3)
    run.add_argument("--seconds", type=float, default=4.0, help="of each measured window")
    run.add_argument("--only", nargs="+", default=[], metavar="SIDE", help="and `limit`")
    run.add_argument("--quick", action="store_true", help="does it run? One short round")
    run.add_argument("--force", action="store_true", help="although the machine is busy")
    run.add_argument("--results", type=Path, default=RESULTS, help="where to write")
    report = commands.add_parser("report", help="tables and plots again, from the JSON files")
    report.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.command == "run":
        code = _run(parser, arguments)
        if code:
            return code
    from benchmarks.report import write

    for file in write(arguments.results):
        print(f"wrote {file}")
    return 0


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    chosen = arguments.suites or list(SUITES)
    if unknown := sorted(set(chosen) - set(SUITES)):
        parser.error(f"no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    known = {side.name for suite in chosen for side in SUITES[suite]} | {suites.LIMIT}
    if unknown := sorted(set(arguments.only) - known):
        parser.error(f"no side {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    quick = arguments.quick
    # A quick run, or one of some sides, is no result: it does not replace one by itself.
    if (quick or arguments.only) and arguments.results == RESULTS:
        arguments.results = RESULTS / "partial"
    options = suites.Options(
        rounds=1 if quick else arguments.rounds,
        seconds=1.0 if quick else arguments.seconds,
        only=tuple(arguments.only),
        quick=quick,
    )
    environments.prepare(suites.venvs(chosen, options.only))
    about = machine.describe()
    print(json.dumps(about, indent=2))
    busy = machine.busy_share(3.0)
    if busy > machine.BUSY_SHARE and not quick:
        print(f"{100 * busy:.0f}% of this machine is in use by others.", file=sys.stderr)
        if not arguments.force:
            print("Wait until it is idle, or measure all the same with --force.", file=sys.stderr)
            return 1
    arguments.results.mkdir(parents=True, exist_ok=True)
    for suite in chosen:
        print(f"{suite}:", flush=True)
        document = suites.run(suite, options)
        (arguments.results / f"{suite}.json").write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
