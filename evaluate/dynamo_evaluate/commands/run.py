"""From a command line to the command that does it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dynamo_runtime.cli.arguments import Parser, add_version
from dynamo_runtime.cli.ending import fail, nobody_reads, open_streams
from dynamo_runtime.errors import DynamoError
from dynamo_runtime.quiet import hush

from . import COMMANDS
from .command import PROG


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(
        prog=PROG,
        description="What a bundle's speed costs in quality, measured on the bundle.",
        epilog=f"{PROG} COMMAND --help says more.",
    )
    add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        description = f"{command.help[0].upper()}{command.help[1:]}."
        command.add_arguments(commands.add_parser(name, help=command.help, description=description))
    return parser


def run(given: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    if given and given[0] in COMMANDS and COMMANDS[given[0]].passes_on:
        args = argparse.Namespace(command=given[0], arguments=given[1:])
    else:
        args = build_parser().parse_args(given)
    open_streams()
    hush()  # before any of them imports a library that is not
    try:
        COMMANDS[args.command].run(args)
        return 0
    except DynamoError as error:
        return fail(PROG, error)
    except BrokenPipeError:
        return nobody_reads()
