"""The command `dynamo-train`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from dataclasses import fields
from pathlib import Path

from dynamo_model import CheckpointError
from dynamo_model.sources import KNOWN
from dynamo_runtime.cli.arguments import add_version
from dynamo_runtime.cli.ending import open_streams
from dynamo_runtime.errors import DynamoError

from .arguments import (
    ENGINES,
    LOCAL,
    add_job,
    add_memory,
    add_rate,
    add_recipe,
    add_stream,
    count,
    job_of,
    memory_of,
    not_negative,
    positive,
    recipe_of,
    setting,
    size,
    work_of,
)
from .errors import TrainingError
from .registry import DRAFTERS

EMBEDDED = "embedded"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    open_streams()
    arguments = _parser().parse_args(argv)
    level = logging.WARNING if int(os.environ.get("RANK", 0)) else logging.INFO  # of several processes one tells
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("dynamo-train: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"dynamo-train: error: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    """Return what there is to say of an error: ours say it all, those of other libraries only what they are."""
    said = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        return f"this needs {error.name}: pip install 'dynamo-edge[cpu,train]'"
    if isinstance(error, TrainingError | CheckpointError | DynamoError | OSError):
        return said
    return f"{type(error).__name__}: {said[:300]} (nobody expected this: --debug shows where it comes from)"


def _base(arguments: argparse.Namespace) -> None:
    from .pipeline import BaseShape, train_base

    shape = BaseShape(**{each.name: getattr(arguments, each.name) for each in fields(BaseShape)})
    train_base(job_of(arguments), shape, recipe_of(arguments), memory_of(arguments))


def _drafter(arguments: argparse.Namespace) -> None:
    from .pipeline import train_drafter

    make = arguments.drafter.load()
    drafter = make(**{each.name: getattr(arguments, each.name) for each in fields(make)})
    train_drafter(arguments.base, job_of(arguments), drafter, recipe_of(arguments), memory_of(arguments))


def _texts(arguments: argparse.Namespace) -> None:
    from .texts import TextsJob, write_texts
    from .writing import Recipe

    recipe = Recipe(arguments.length, arguments.temperatures, arguments.top_k, arguments.top_p)
    values = {each.name: getattr(arguments, each.name) for each in fields(TextsJob) if each.name != "recipe"}
    write_texts(TextsJob(recipe=recipe, **values))


def _counts(arguments: argparse.Namespace) -> None:
    from .counting import Counting
    from .pipeline import add_counts

    how = Counting(arguments.engine, arguments.memory_limit, arguments.master, dict(arguments.spark_setting))
    if how.engine != "spark" and (how.settings or how.master != LOCAL):
        raise TrainingError("--master and --spark-setting are Spark's: give --engine spark with them")
    add_counts(job_of(arguments), arguments.min_counts, how)


def _card(arguments: argparse.Namespace) -> None:
    from .card import write_card

    write_card(arguments.out, arguments.data, arguments.held_out_percent)


def _pack(arguments: argparse.Namespace) -> None:
    from .pipeline import pack

    pack(arguments.checkpoint, arguments.out)


def _default(arguments: argparse.Namespace) -> None:
    if arguments.name == EMBEDDED:
        if arguments.data is not None or arguments.steps is not None:
            raise TrainingError(f"the {EMBEDDED} model has a text and steps of its own: leave --data and --steps out")
        from .default import train_default

        train_default(arguments.out, work_of(arguments))
    elif arguments.data is None:
        raise TrainingError(f"give --data CORPUS: text of {arguments.name}'s own, as `dynamo-train texts` writes it")
    else:
        from .known import train_known

        train_known(arguments.name, arguments.data, arguments.out, work_of(arguments), arguments.steps)


def _add_counts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="checkpoint")
    add_job(parser, out=False)
    parser.add_argument(
        "--min-counts",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1, 1, 2],
        metavar="1,1,2",
        help="keep a 1-, 2-, 3-gram … that was seen at least so often (default: 1,1,2)",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="numpy in memory, DuckDB out of core, or Spark on many machines; the file is the same "
        "(default: memory where it fits, else duckdb)",
    )
    parser.add_argument(
        "--memory-limit", type=size, metavar="8GB", help="what this process may take (default: half of the machine's)"
    )
    parser.add_argument("--master", default=LOCAL, metavar="URL", help="of Spark (default: all cores of this machine)")
    parser.add_argument(
        "--spark-setting",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one of Spark's own, such as spark.executor.memory=8g; may be repeated",
    )


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle",
        help="its folder, or a name in the cache; needs no drafter. With --device a checkpoint: a folder, a GGUF file, "
        "a Hub id, or smollm2",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="CORPUS", help="folder; a begun one is gone on with")
    parser.add_argument(
        "--tokens", type=count, required=True, metavar="N", help="at least so many, without what is dropped"
    )
    parser.add_argument(
        "--prompts", metavar="DATA", help="what users say first, or texts begin with: as --data of other commands"
    )
    parser.add_argument(
        "--beginnings", metavar="FILE", help="what users begin to say, a line each, and the model completes"
    )
    parser.add_argument("--plain", action="store_true", help="do without the chat template")
    parser.add_argument("--length", type=count, default=512, help="most tokens a text (default: %(default)s)")
    parser.add_argument(
        "--temperatures",
        type=lambda text: tuple(not_negative(part) for part in text.split(",")),
        default=(0.0, 0.3, 0.7, 1.0),
        metavar="T,T,…",
        help="of answers, one for every text; questions have 1 (default: 0,0.3,0.7,1)",
    )
    parser.add_argument("--top-k", type=count, default=50, metavar="K", help="candidates (default: %(default)s)")
    parser.add_argument("--top-p", type=positive, default=0.95, metavar="P", help="nucleus (default: %(default)s)")
    parser.add_argument("--batch", type=count, default=48, help="texts at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=count, help="of onnxruntime (default: its own choice)")
    parser.add_argument("--device", metavar="cuda|cpu", help="have a checkpoint write on torch, in place of a bundle")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from, all of it")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dynamo-train", description="Turn a base language model into a multi-token one (DynaMo)."
    )
    add_version(parser)
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    base = commands.add_parser("base", help="train a tokenizer and a small GPT-NeoX base from scratch")
    add_job(base)
    add_recipe(base, optimizer="muon", length=1024, sequences=16)
    add_rate(base, 3e-3, freeze_base=False)
    add_memory(base)
    base.add_argument("--hidden-size", type=count, default=256)
    base.add_argument("--layers", type=count, default=6)
    base.add_argument("--attention-heads", type=count, default=4)
    base.add_argument("--vocab-size", type=count, default=4096)
    base.add_argument("--context-length", type=count, default=1024)
    base.set_defaults(run=_base)

    for name, drafter in DRAFTERS.items():
        command = commands.add_parser(name, help=drafter.help)
        command.add_argument(
            "base", help=f"the base model: a folder, a GGUF file, a Hub id, or smollm2{drafter.base_help}"
        )
        add_job(command)
        add_stream(command)
        drafter.add_arguments(command)
        command.set_defaults(run=_drafter, drafter=drafter)

    counts = commands.add_parser("counts", help="count n-grams for the co-occurrence mask of a checkpoint")
    _add_counts(counts)
    counts.set_defaults(run=_counts)

    texts = commands.add_parser("texts", help="have a model write the text that its heads are trained on")
    _add_texts(texts)
    texts.set_defaults(run=_texts)

    card = commands.add_parser("card", help="measure a checkpoint on held-out text and write its model card")
    card.add_argument("out", type=Path, metavar="checkpoint")
    add_job(card, out=False)
    card.set_defaults(run=_card)

    packing = commands.add_parser("pack", help="copy a checkpoint's drafters at 8 bits, without the base")
    packing.add_argument("checkpoint", type=Path)
    packing.add_argument("--out", type=Path, required=True, help="new folder for drafters, n-gram counts and record")
    packing.set_defaults(run=_pack)

    default = commands.add_parser("default", help="rebuild what ships with the package")
    default.add_argument(
        "name",
        nargs="?",
        choices=(EMBEDDED, *KNOWN),
        default=EMBEDDED,
        help="the model that is embedded, or the heads of a model that is known by name (default: %(default)s)",
    )
    default.add_argument("--data", help="for the heads: text of the model's own")
    default.add_argument("--steps", type=count, help="for the heads: fewer or more steps than those that ship had")
    default.add_argument("--out", type=Path, required=True, help="new folder for the result")
    default.add_argument("--work", type=Path, help="tokens and checkpoints (default: OUT-work)")
    default.set_defaults(run=_default)
    return parser


if __name__ == "__main__":
    sys.exit(main())
