"""The command ``dynamo-train``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from dynamo_model import MAX_HEADS, CheckpointError
from dynamo_model.cp import MAX_RANK
from dynamo_model.lookahead import MAX_LOOK_AHEAD
from dynamo_runtime.corpus import HELD_OUT_PERCENT

from .errors import TrainingError

_DATA_HELP = (
    "corpus: 'stdlib', 'package:NAME', a folder of text files, or a .txt, .jsonl or .parquet file (column 'text'); "
    "several are joined by '+'"
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        arguments.run(arguments)
    except (TrainingError, CheckpointError, OSError) as error:
        print(f"dynamo-train: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dynamo-train: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _base(arguments: argparse.Namespace) -> None:
    from .pipeline import BaseShape, train_base

    shape = BaseShape(
        hidden_size=arguments.hidden_size,
        layers=arguments.layers,
        attention_heads=arguments.attention_heads,
        vocab_size=arguments.vocab_size,
        context_length=arguments.context_length,
    )
    train_base(
        arguments.out,
        arguments.data,
        shape,
        _recipe(arguments, base_lr=arguments.lr, heads_lr=arguments.lr),
        held_out_percent=arguments.held_out_percent,
        work=_work(arguments),
    )


def _heads(arguments: argparse.Namespace) -> None:
    from .pipeline import train_heads

    train_heads(
        arguments.base,
        arguments.out,
        arguments.data,
        arguments.heads,
        _recipe(arguments, **_rates(arguments)),
        held_out_percent=arguments.held_out_percent,
        work=_work(arguments),
    )


def _cp(arguments: argparse.Namespace) -> None:
    from .pipeline import train_cp

    train_cp(
        arguments.base,
        arguments.out,
        arguments.data,
        arguments.tokens,
        arguments.rank,
        _recipe(arguments, **_rates(arguments)),
        balance=arguments.balance,
        held_out_percent=arguments.held_out_percent,
        work=_work(arguments),
    )


def _lookahead(arguments: argparse.Namespace) -> None:
    from .pipeline import train_lookahead

    train_lookahead(
        arguments.base,
        arguments.out,
        arguments.data,
        arguments.tokens,
        _recipe(arguments, base_lr=0.0, heads_lr=arguments.lr, freeze_base=True),
        anchors=arguments.anchors,
        held_out_percent=arguments.held_out_percent,
        work=_work(arguments),
    )


def _counts(arguments: argparse.Namespace) -> None:
    from .pipeline import add_counts

    add_counts(
        arguments.checkpoint,
        arguments.data,
        arguments.min_counts,
        held_out_percent=arguments.held_out_percent,
        work=_work(arguments, arguments.checkpoint),
    )


def _card(arguments: argparse.Namespace) -> None:
    from .card import write_card

    write_card(arguments.checkpoint, arguments.data, arguments.held_out_percent)


def _default(arguments: argparse.Namespace) -> None:
    from .default import train_default

    train_default(arguments.out, _work(arguments))


def _rates(arguments: argparse.Namespace) -> dict[str, float | bool]:
    """The learning rates that the user named, for the others the paper's."""
    from dynamo_model.checkpoint import load_base

    from .pipeline import paper_learning_rates

    base_lr, heads_lr = arguments.lr_base, arguments.lr_heads
    if base_lr is None or heads_lr is None:
        paper = paper_learning_rates(load_base(arguments.base).num_parameters())
        base_lr, heads_lr = base_lr or paper[0], heads_lr or paper[1]
    shared_lr = arguments.lr_shared if arguments.lr_shared is not None else base_lr / 10
    return {
        "base_lr": base_lr,
        "heads_lr": heads_lr,
        "shared_gradient_scale": shared_lr / base_lr,
        "freeze_base": arguments.freeze_base,
    }


def _recipe(arguments: argparse.Namespace, **rates):  # type: ignore[no-untyped-def]
    from .loop import Recipe

    return Recipe(
        steps=arguments.steps,
        sequences=arguments.sequences,
        length=arguments.length,
        micro_batch=min(arguments.micro_batch, arguments.sequences),
        optimizer=arguments.optimizer,
        weight_decay=arguments.weight_decay,
        warmup=0.01,
        clip=1.0,
        precision=arguments.precision,
        seed=arguments.seed,
        validate_every=arguments.validate_every,
        early_stop=arguments.early_stop,
        **({"shared_gradient_scale": 1.0, "freeze_base": False} | rates),
    )


def _work(arguments: argparse.Namespace, beside: Path | None = None) -> Path:
    """Where tokens and checkpoints lie: named by the user, or beside the result."""
    out = beside or arguments.out
    return arguments.work or out.with_name(out.name + "-work")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dynamo-train", description="Turn a base language model into a multi-token one (DynaMo)."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    base = commands.add_parser("base", help="train a tokenizer and a small GPT-NeoX base from scratch")
    _add_data(base)
    _add_recipe(base, optimizer="muon", length=1024, sequences=16)
    base.add_argument("--lr", type=_positive, default=3e-3, help="learning rate (default: %(default)s)")
    base.add_argument("--hidden-size", type=_count, default=256)
    base.add_argument("--layers", type=_count, default=6)
    base.add_argument("--attention-heads", type=_count, default=4)
    base.add_argument("--vocab-size", type=_count, default=4096)
    base.add_argument("--context-length", type=_count, default=1024)
    base.set_defaults(run=_base)

    heads = commands.add_parser("heads", help="add token heads to a base and train them")
    heads.add_argument("base", help="folder or Hub id of the base model")
    _add_data(heads)
    _add_recipe(heads, optimizer="adamw", length=2048, sequences=64)
    heads.add_argument(
        "--heads",
        type=_count,
        default=3,
        metavar="N",
        help=f"tokens a pass predicts, 2 to {MAX_HEADS} (default: %(default)s)",
    )
    _add_rates(heads)
    heads.set_defaults(run=_heads)

    cp = commands.add_parser("cp", help="add a joint head over the next tokens to a base and train it (CP)")
    cp.add_argument("base", help="folder or Hub id of the base model; other drafters beside a frozen one are kept")
    _add_data(cp)
    _add_recipe(cp, optimizer="adamw", length=2048, sequences=64)
    cp.add_argument(
        "--tokens",
        type=_count,
        default=4,
        metavar="N",
        help=f"tokens of the joint distribution, 2 to {MAX_HEADS} (default: %(default)s)",
    )
    cp.add_argument(
        "--rank",
        type=_count,
        default=4,
        metavar="R",
        help=f"components of the mixture, 1 to {MAX_RANK}; 1: independent heads (default: %(default)s)",
    )
    cp.add_argument(
        "--balance",
        type=_not_negative,
        default=0.01,
        help="weight of the loss that keeps all components in use (default: %(default)s)",
    )
    _add_rates(cp)
    cp.set_defaults(run=_cp)

    lookahead = commands.add_parser("lookahead", help="train look-ahead embeddings for a frozen base (PaSS)")
    lookahead.add_argument("base", help="folder or Hub id of the base model; other drafters beside it are kept")
    _add_data(lookahead)
    _add_recipe(lookahead, optimizer="adamw", length=2048, sequences=16)
    lookahead.add_argument(
        "--tokens",
        type=_count,
        default=4,
        metavar="L",
        help=f"look-ahead tokens, 1 to {MAX_LOOK_AHEAD} (default: %(default)s)",
    )
    lookahead.add_argument(
        "--anchors",
        type=_count,
        default=64,
        help="positions a sequence that are trained on (default: %(default)s)",
    )
    lookahead.add_argument("--lr", type=_positive, default=1e-2, help="learning rate (default: %(default)s)")
    lookahead.set_defaults(run=_lookahead)

    counts = commands.add_parser("counts", help="count n-grams for the co-occurrence mask of a checkpoint")
    counts.add_argument("checkpoint", type=Path)
    _add_data(counts, out=False)
    counts.add_argument(
        "--min-counts",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1, 1, 2],
        metavar="1,1,2",
        help="keep a 1-, 2-, 3-gram … that was seen at least so often (default: 1,1,2)",
    )
    counts.set_defaults(run=_counts)

    card = commands.add_parser("card", help="measure a checkpoint on held-out text and write its model card")
    card.add_argument("checkpoint", type=Path)
    _add_data(card, out=False)
    card.set_defaults(run=_card)

    default = commands.add_parser("default", help="rebuild the model that ships with the package")
    default.add_argument("--out", type=Path, required=True, help="new folder for the result")
    default.add_argument("--work", type=Path, help="tokens and checkpoints (default: OUT-work)")
    default.set_defaults(run=_default)
    return parser


def _add_data(parser: argparse.ArgumentParser, out: bool = True) -> None:
    parser.add_argument("--data", required=True, help=_DATA_HELP)
    parser.add_argument(
        "--held-out-percent",
        type=_positive,
        default=HELD_OUT_PERCENT,
        help="share of the documents kept for validation, by hash of their name (default: %(default)s)",
    )
    if out:
        parser.add_argument("--out", type=Path, required=True, help="new folder for the result")
    parser.add_argument("--work", type=Path, help="tokens and checkpoints (default: beside the result)")


def _add_recipe(parser: argparse.ArgumentParser, *, optimizer: str, length: int, sequences: int) -> None:
    parser.add_argument("--steps", type=_count, required=True)
    parser.add_argument("--sequences", type=_count, default=sequences, help="a batch (default: %(default)s)")
    parser.add_argument("--length", type=_count, default=length, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--micro-batch", type=_count, default=4, help="sequences at once (default: %(default)s)")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default=optimizer)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="bf16: autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate-every", type=_count, default=1000, help="steps (default: %(default)s)")
    parser.add_argument(
        "--early-stop", action="store_true", help="end at the first validation that is no better than the last"
    )


def _add_rates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--freeze-base", action="store_true", help='train what is new alone (the paper\'s "-H")')
    parser.add_argument("--lr-base", type=_positive, help="LR_B, stem and first head (default: the paper's, by size)")
    parser.add_argument("--lr-heads", type=_positive, help="LR_M, what is new (default: the paper's, by size)")
    parser.add_argument("--lr-shared", type=_positive, help="LR_MB, from it into shared weights (default: LR_B / 10)")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


if __name__ == "__main__":
    sys.exit(main())
