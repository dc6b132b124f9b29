"""`optimum-cli export dynamo`: the same command under Optimum's tool.

Optimum imports every module of this namespace at start-up, so nothing heavy is imported until the command runs.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class DynamoExportCommand(BaseOptimumCLICommand):
    """Takes the arguments of `dynamo-export`."""

    COMMAND = CommandInfo(name="dynamo", help="Export a multi-token model (DynaMo) as an ONNX bundle.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the command's arguments."""
        from dynamo_export.cli import add_arguments

        add_arguments(parser)

    def run(self) -> None:
        """Run the export and end the process with its status."""
        from dynamo_export.cli import run

        sys.exit(run(self.args, "optimum-cli export dynamo"))


REGISTER_COMMANDS = [(DynamoExportCommand, ExportCommand)]
