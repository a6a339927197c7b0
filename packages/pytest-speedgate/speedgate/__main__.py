"""``python -m speedgate``: compares and exports recorded runs, and searches for the commit that made a call slower."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from speedgate import baselines, verdicts
from speedgate.bisect import Search
from speedgate.checkouts import OtherVersionError
from speedgate.verdicts import BaselineError

UNUSABLE = 2  # exit code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 1 for a regression, 2 if a file cannot be used."""
    request = _parser().parse_args(arguments)
    try:
        return {"compare": _compare, "export": _export, "bisect": _bisect}[request.command](request)
    except (BaselineError, OtherVersionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("speedgate", description="Compare, export and search, for `pytest --gate`.")
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare", help="compare two recorded runs; exit code 1 is a regression")
    compare.add_argument("baseline", type=Path, help="a JSON file of pytest-benchmark")
    compare.add_argument("now", type=Path, help="another file, from the same device")
    compare.add_argument(
        "--threshold", type=verdicts.threshold, default=verdicts.THRESHOLD, help="default: %(default)s"
    )
    export = commands.add_parser("export", help="write ratios for github-action-benchmark, customSmallerIsBetter")
    export.add_argument("document", type=Path, help="a JSON file of pytest-benchmark")
    export.add_argument("-o", "--output", type=Path, required=True, help="the JSON file to write")
    bisect = commands.add_parser("bisect", help="find the commit that made a benchmark slower")
    bisect.add_argument("good", help="a git revision that is fast")
    bisect.add_argument("bad", help="a later one that is slow")
    bisect.add_argument("tests", nargs="+", help="files or node ids of pytest")
    bisect.add_argument("--build", default="", metavar="COMMAND", help="builds a checkout, in its folder")
    bisect.add_argument("--threshold", type=verdicts.threshold, default=verdicts.THRESHOLD, help="default: %(default)s")
    return parser


def _compare(request: argparse.Namespace) -> int:
    result = verdicts.compare(baselines.read(request.baseline), baselines.read(request.now), request.threshold)
    print("\n".join(result.lines()))
    return int(result.failed)


def _export(request: argparse.Namespace) -> int:
    ratios = baselines.smaller_is_better(baselines.read(request.document))
    request.output.write_text(json.dumps(ratios, indent=2) + "\n", encoding="utf-8")
    return 0


def _bisect(request: argparse.Namespace) -> int:
    search = Search(Path.cwd(), request.tests, request.build, request.threshold)
    print(search.culprit(request.good, request.bad))
    return 0


if __name__ == "__main__":
    sys.exit(main())
