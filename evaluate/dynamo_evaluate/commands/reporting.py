"""`dynamo-eval report` and `dynamo-eval compare`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dynamo_runtime.errors import printable
from dynamo_runtime.files import check_writable, write_whole

from ..results import Results
from .command import PROG, Command, at_least, to_json


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, help="of generate, ablation or perplexity")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write report.md, report.json and plots there")
    parser.add_argument("--degree", type=int, default=2, metavar="N", help="of the regressions (default: 2)")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, help="results of generate, ablation or perplexity")
    parser.add_argument("b", type=Path, help="others of the same command")


def _report(args: argparse.Namespace) -> None:
    from .. import perplexity_tables, plots, report
    from ..shapes import check
    from ..summary import summarize

    at_least(1, args, "degree")
    results = check(Results.load(args.results))
    if args.out:
        check_writable(args.out / "report.md")
    drawn: list[Path] = []
    if results.header["command"] == "perplexity":
        found = perplexity_tables.figures(results)
        made, where = perplexity_tables.tables(found), perplexity_tables.conditions(results, found)
        values = perplexity_tables.as_json(results, found)
    else:
        whole = summarize(results, args.degree)
        made, where, values = report.tables(whole), report.conditions(whole), report.as_json(whole)
        drawn = plots.draw(whole, args.out) if args.out else []
    print(report.text(made, where))
    if args.out:
        write_whole(args.out / "report.md", report.markdown(made, where))
        write_whole(args.out / "report.json", to_json(values))
        names = ["report.md", "report.json", *(path.name for path in drawn)]
        print(f"{PROG}: wrote {', '.join(names)} in {printable(str(args.out))}", file=sys.stderr)


def _compare(args: argparse.Namespace) -> None:
    from .. import compare, report
    from ..shapes import check

    made = compare.compare_results(check(Results.load(args.a)), check(Results.load(args.b)))
    print(report.text(made, f"A is {args.a}, B is {args.b}. Brackets hold 95 % bootstrap intervals."))


def print_summary(results: Results) -> None:
    """Show what generations say."""
    from .. import report
    from ..summary import summarize

    found = summarize(results)
    print(report.text(report.tables(found), report.conditions(found)))


REPORT = Command("report", "results as tables, JSON and plots", _add_report, _report)
COMPARE = Command("compare", "two results files side by side", _add_compare, _compare)
