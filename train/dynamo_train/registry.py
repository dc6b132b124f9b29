"""The commands that put a drafter on a base and train it: the one place that knows them all; needs no torch."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_model import MAX_HEADS, MAX_LOOK_AHEAD, MAX_RANK

from .arguments import add_memory, add_rate, add_rates, add_recipe, count, not_negative

if TYPE_CHECKING:
    from .drafter import NewDrafter


@dataclass(frozen=True)
class DrafterCommand:
    """A command of `dynamo-train`.

    Attributes:
        help: What it does.
        base_help: What it does with other drafters of its base, behind the description of that argument.
        add_arguments: Adds recipe and learning rates, and an argument for every field of the drafter.
        module: Of this package, with objective and drafter; imported when the command runs.
        name: Of the drafter's class there.
    """

    help: str
    base_help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    module: str
    name: str

    def load(self) -> type[NewDrafter]:
        """Return the drafter, a frozen dataclass."""
        drafter: type[NewDrafter] = getattr(importlib.import_module(f".{self.module}", __package__), self.name)
        return drafter


def _parallel(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, optimizer="adamw", length=2048, sequences=64)
    parser.add_argument(
        "--heads",
        dest="n_heads",
        type=count,
        default=3,
        metavar="N",
        help=f"tokens a pass predicts, 2 to {MAX_HEADS} (default: %(default)s)",
    )
    parser.add_argument(
        "--draft-vocab",
        type=count,
        metavar="N",
        help="further heads choose among the N most frequent tokens of the text alone (default: among all)",
    )
    parser.add_argument(
        "--condition", action="store_true", help="tell further heads the token in front of the one they predict (Hydra)"
    )
    parser.add_argument(
        "--init",
        choices=("random", "copied"),
        default="random",
        help="new heads' layers start random (DynaMo) or copied from the base's last one (default: %(default)s)",
    )
    parser.add_argument(
        "--cache",
        action="store_true",
        help="with --freeze-base: run the base over the text once, keep what it says on disk, and train on that",
    )
    parser.add_argument(
        "--loss",
        choices=("ce", "kl"),
        default="ce",
        help="ce: of the text's own tokens (DynaMo); kl, with --cache: to the base's distribution (default: ce)",
    )
    parser.add_argument(
        "--keep-heads",
        dest="keeps",
        action="store_true",
        help="go on from the heads that BASE has, which are as many, not from new ones",
    )
    add_rates(parser)
    add_memory(parser)


def _joint(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, optimizer="adamw", length=2048, sequences=64)
    parser.add_argument(
        "--tokens",
        dest="n_tokens",
        type=count,
        default=4,
        metavar="N",
        help=f"tokens of the joint distribution, 2 to {MAX_HEADS} (default: %(default)s)",
    )
    parser.add_argument(
        "--rank",
        type=count,
        default=4,
        metavar="R",
        help=f"components of the mixture, 1 to {MAX_RANK}; 1: independent heads (default: %(default)s)",
    )
    parser.add_argument(
        "--balance",
        type=not_negative,
        default=0.01,
        help="weight of the loss that keeps all components in use (default: %(default)s)",
    )
    add_rates(parser)
    add_memory(parser)


def _look_ahead(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, optimizer="adamw", length=2048, sequences=16)
    parser.add_argument(
        "--tokens",
        dest="n_look_ahead",
        type=count,
        default=4,
        metavar="L",
        help=f"look-ahead tokens, 1 to {MAX_LOOK_AHEAD} (default: %(default)s)",
    )
    parser.add_argument(
        "--anchors", type=count, default=64, help="positions a sequence that are trained on (default: %(default)s)"
    )
    add_rate(parser, 1e-2, freeze_base=True)
    add_memory(parser, activations=False)  # they read the cache, which a second run would write to


DRAFTERS: dict[str, DrafterCommand] = {
    "heads": DrafterCommand(
        help="add token heads to a base and train them",
        base_help="",
        add_arguments=_parallel,
        module="parallel",
        name="TokenHeads",
    ),
    "cp": DrafterCommand(
        help="add a joint head over the next tokens to a base and train it (CP)",
        base_help="; other drafters beside a frozen one are kept",
        add_arguments=_joint,
        module="joint",
        name="JointHead",
    ),
    "lookahead": DrafterCommand(
        help="train look-ahead embeddings for a frozen base (PaSS)",
        base_help="; other drafters beside it are kept",
        add_arguments=_look_ahead,
        module="look_ahead",
        name="LookAheadEmbeddings",
    ),
}
"""By the name of the command, which the model's class has as well."""
