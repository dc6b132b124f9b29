"""The commands of `dynamo-eval`: of each its name, its flags and its work, in one place."""

from .command import Command
from .generation import ABLATE, GENERATE
from .harness import HARNESS
from .judging import JUDGE
from .perplexity import PERPLEXITY
from .reporting import COMPARE, REPORT

COMMANDS: dict[str, Command] = {
    command.name: command for command in (PERPLEXITY, GENERATE, ABLATE, JUDGE, REPORT, COMPARE, HARNESS)
}
"""By name."""
