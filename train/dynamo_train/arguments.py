"""Arguments that commands of `dynamo-train` share, and what they mean; needs no torch until a command runs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_runtime.corpus import HELD_OUT_PERCENT

if TYPE_CHECKING:
    from .pipeline import Job
    from .recipe import Recipe
    from .spread import Memory

VALIDATION_TOKENS = 131_072
SHUFFLED = 10_000
"""Documents of a text that is streamed: 50 MB of it at 5 kB each."""
ENGINES = ("memory", "duckdb", "spark")
"""That count n-grams."""
LOCAL = "local[*]"
"""The master of Spark that is all cores of this machine."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_DATA_HELP = (
    "corpus: 'stdlib', 'package:NAME', a folder of text files, or a .txt, .jsonl or .parquet file (column 'text'); "
    "several are joined by '+'"
)


def add_job(parser: argparse.ArgumentParser, *, out: bool = True) -> None:
    """Add text and folders; without `out` the command completes the folder that its argument `out` names."""
    parser.add_argument("--data", required=True, help=_DATA_HELP)
    parser.add_argument(
        "--held-out-percent",
        type=positive,
        default=HELD_OUT_PERCENT,
        help="share of the documents kept for validation, by hash of their name (default: %(default)s)",
    )
    if out:
        parser.add_argument("--out", type=Path, required=True, help="new folder for the result")
    parser.add_argument("--work", type=Path, help="tokens and checkpoints (default: beside the result)")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from, all of it")


def job_of(arguments: argparse.Namespace) -> Job:
    """Return what `add_job` added."""
    from .pipeline import Job

    how = getattr(arguments, "stream", False), getattr(arguments, "shuffle", 1)
    return Job(arguments.out, arguments.data, arguments.held_out_percent, work_of(arguments), *how)


def add_stream(parser: argparse.ArgumentParser) -> None:
    """Add what a text is that nobody tokenizes before the training."""
    parser.add_argument(
        "--stream",
        action="store_true",
        help="tokenize DATA while it is trained on: .parquet or .jsonl shards, or OWNER/NAME on the Hub",
    )
    parser.add_argument(
        "--shuffle",
        type=count,
        default=SHUFFLED,
        metavar="DOCUMENTS",
        help="of --stream: so many are in memory, and shuffled; 1 takes all in its order (default: %(default)s)",
    )


def work_of(arguments: argparse.Namespace) -> Path:
    """Return where tokens and checkpoints lie: named by the user, or beside the result."""
    out: Path = arguments.out
    return arguments.work or out.with_name(out.name + "-work")


def add_recipe(parser: argparse.ArgumentParser, *, optimizer: str, length: int, sequences: int) -> None:
    """Add what a recipe has but for its learning rates, with the defaults of one command."""
    parser.add_argument("--steps", type=count, required=True)
    parser.add_argument("--sequences", type=count, default=sequences, help="a batch (default: %(default)s)")
    parser.add_argument("--length", type=count, default=length, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--micro-batch", type=count, default=4, help="sequences at once (default: %(default)s)")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default=optimizer)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument(
        "--precision",
        choices=("no", "bf16", "auto"),
        default="no",
        help="bf16: autocast; auto: where a short measurement finds that faster (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate-every", type=count, default=1000, help="steps (default: %(default)s)")
    parser.add_argument(
        "--validation-tokens",
        type=count,
        default=VALIDATION_TOKENS,
        help="held-out tokens that a validation reads at most (default: %(default)s)",
    )
    parser.add_argument(
        "--early-stop", action="store_true", help="end at the first validation that is no better than the last"
    )


def add_memory(parser: argparse.ArgumentParser, *, activations: bool = True) -> None:
    """Add how a model is kept in memory and run; without `activations` for one whose layers cannot run twice."""
    parser.add_argument(
        "--shard",
        action="store_true",
        help="in several processes: keep a part of every parameter, gradient and optimizer state in each (FSDP2)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="have torch compile decoder layers: the first steps take longer, the others less; needs a C++ compiler",
    )
    if activations:
        parser.add_argument(
            "--checkpoint-activations",
            action="store_true",
            help="run decoder layers once more on the way back, which takes less memory and a third more time",
        )


def memory_of(arguments: argparse.Namespace) -> Memory:
    """Return what `add_memory` added."""
    from .spread import Memory

    return Memory(arguments.shard, getattr(arguments, "checkpoint_activations", False), arguments.compile)


def add_rate(parser: argparse.ArgumentParser, default: float, *, freeze_base: bool) -> None:
    """Add the one learning rate of a command: of all there is, or of what is new on a base that stays as it is."""
    parser.add_argument("--lr", type=positive, default=default, help="learning rate (default: %(default)s)")

    def rates(arguments: argparse.Namespace) -> dict[str, Any]:
        base_lr = 0.0 if freeze_base else arguments.lr
        return {
            "base_lr": base_lr,
            "heads_lr": arguments.lr,
            "shared_gradient_scale": 1.0,
            "freeze_base": freeze_base,
        }

    parser.set_defaults(rates=rates)


def add_rates(parser: argparse.ArgumentParser) -> None:
    """Add the learning rates of a base and of what is put on it."""
    parser.add_argument("--freeze-base", action="store_true", help='train what is new alone (the paper\'s "-H")')
    parser.add_argument("--lr-base", type=positive, help="LR_B, stem and first head (default: the paper's, by size)")
    parser.add_argument("--lr-heads", type=positive, help="LR_M, what is new (default: the paper's, by size)")
    parser.add_argument("--lr-shared", type=positive, help="LR_MB, from it into shared weights (default: LR_B / 10)")
    parser.set_defaults(rates=_rates)


def _rates(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the learning rates that the user named, for the others the paper's."""
    from dynamo_model.checkpoint import count_parameters

    from .optimizers import paper_learning_rates

    base_lr, heads_lr = arguments.lr_base, arguments.lr_heads
    if base_lr is None or heads_lr is None:
        paper = paper_learning_rates(count_parameters(arguments.base))
        base_lr, heads_lr = base_lr or paper[0], heads_lr or paper[1]
    shared_lr = arguments.lr_shared if arguments.lr_shared is not None else base_lr / 10
    return {
        "base_lr": base_lr,
        "heads_lr": heads_lr,
        "shared_gradient_scale": shared_lr / base_lr,
        "freeze_base": arguments.freeze_base,
    }


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """Return what `add_recipe` added, and `add_rate` or `add_rates`.

    Raises:
        CheckpointError: The paper's learning rates go by a base that does not load.
    """
    from .precision import fastest_precision
    from .recipe import Recipe

    return Recipe(
        steps=arguments.steps,
        sequences=arguments.sequences,
        length=arguments.length,
        micro_batch=min(arguments.micro_batch, arguments.sequences),
        optimizer=arguments.optimizer,
        weight_decay=arguments.weight_decay,
        warmup=0.01,
        clip=1.0,
        precision=fastest_precision() if arguments.precision == "auto" else arguments.precision,
        seed=arguments.seed,
        validate_every=arguments.validate_every,
        validation_tokens=arguments.validation_tokens,
        early_stop=arguments.early_stop,
        **arguments.rates(arguments),
    )


def count(text: str) -> int:
    """Return a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def positive(text: str) -> float:
    """Return a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def not_negative(text: str) -> float:
    """Return a finite number from 0 on."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


def size(text: str) -> int:
    """Return bytes of a size such as `8GB` or `500M`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.strip().upper())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is no size such as 8GB")
    return int(float(match[1]) * _UNITS[match[2]])


def setting(text: str) -> tuple[str, str]:
    """Return the name and value of a setting, `NAME=VALUE`."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE")
    return name, value
