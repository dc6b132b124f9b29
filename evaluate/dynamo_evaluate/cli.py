"""`dynamo-eval`: what the speed costs in quality."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dynamo_runtime.cli.arguments import Parser, add_version
from dynamo_runtime.cli.ending import INTERRUPTED, fail, nobody_reads, open_streams
from dynamo_runtime.errors import DynamoError
from dynamo_runtime.quiet import hush

from .commands import COMMANDS
from .commands.command import PROG


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
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
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; the same command goes on from what its results file has kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return nobody_reads()


if __name__ == "__main__":
    sys.exit(main())
