"""The jobs of training, each from its inputs to a finished checkpoint folder."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedTokenizerFast

from dynamo_model import DRAFTERS, drafters_of
from dynamo_model.checkpoint import load_base, load_tokenizer, stored_dtype
from dynamo_model.preflight import preflight
from dynamo_model.sources import Checkpoint, find_checkpoint
from dynamo_runtime.corpus import is_held_out
from dynamo_runtime.files import WholeFolder, write_whole
from dynamo_runtime.version import __version__

from . import cooccurrence
from .corpus import read_corpus
from .counting import Counting, write_counts, write_counts_of_corpus
from .drafter import NewDrafter, Start
from .errors import TrainingError
from .loop import TrainingOutcome, train
from .objective import NextTokenCLM, Objective
from .recipe import Recipe
from .spread import PLAIN, Memory, processes
from .stream import HeldOut, Order, Share, stream_text
from .tokens import END_OF_TEXT, TokenStreams, sha256_of, tokenize_corpus, train_tokenizer

logger = logging.getLogger(__name__)

RECORD_FILE, CARD_FILE, FIGURES_FILE = "training.json", "README.md", "figures.json"
BASE = "base"
"""The stage of a base that was trained from scratch; that of a drafter has the name of its command."""


@dataclass(frozen=True)
class Job:
    """What a command reads and where it writes.

    Attributes:
        out: Folder of the checkpoint, a new one, or the one to be completed.
        source: The corpus, see `dynamo_train.corpus.read_corpus`.
        held_out_percent: Share of the corpus kept for validation.
        work: Tokens and checkpoints; the same job again goes on from the last checkpoint there.
        stream: Tokenize the text while it is trained on, see `dynamo_train.stream`, not before.
        shuffled: Documents of such a text that are shuffled among themselves.
    """

    out: Path
    source: str
    held_out_percent: float
    work: Path
    stream: bool = False
    shuffled: int = 1


@dataclass(frozen=True)
class BaseShape:
    """Shape of a GPT-NeoX base that is trained from scratch."""

    hidden_size: int
    layers: int
    attention_heads: int
    vocab_size: int
    context_length: int


def train_base(job: Job, shape: BaseShape, recipe: Recipe, memory: Memory = PLAIN) -> None:
    """Train a tokenizer and a small GPT-NeoX base from scratch and write an ordinary HF model.

    Args:
        job: Text and folders.
        shape: Of the model.
        recipe: Of the training.
        memory: How the model is kept while it is trained.

    Raises:
        TrainingError: Something about the text, the recipe or the folders; see `dynamo_train.loop.train`.
    """
    _refuse_existing(job.out)
    memory.check()
    with processes().main_process_first():
        tokenizer = _own_tokenizer(job, shape.vocab_size)
        end_id = tokenizer.token_to_id(END_OF_TEXT)
        assert end_id is not None  # the tokenizer was trained with it
        streams = tokenize_corpus(job.source, tokenizer, end_id, job.held_out_percent, job.work / "tokens")
    torch.manual_seed(recipe.seed)
    config = GPTNeoXConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.attention_heads,
        intermediate_size=4 * shape.hidden_size,
        max_position_embeddings=shape.context_length,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bos_token_id=end_id,
        eos_token_id=end_id,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    objective = NextTokenCLM(model)
    outcome = train(objective, streams, recipe, job.work / "run", memory=memory)
    if processes().is_main_process:
        with _new_folder(job.out) as folder:
            model.save_pretrained(folder)
            PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
            ).save_pretrained(folder)
            _write_record(folder, {BASE: _stage(streams, recipe, objective, outcome)})


def train_drafter(base: str, job: Job, drafter: NewDrafter, recipe: Recipe, memory: Memory = PLAIN) -> None:
    """Put a drafter on a base, train it, and write both; drafters beside a frozen base are taken along.

    Of a drafter that goes on from the one beside the base, the record tells the earlier training as `before`.

    Args:
        base: The base, see `dynamo_model.sources.find_checkpoint`.
        job: Text and folders.
        drafter: What is put on it.
        recipe: Of the training; `freeze_base` leaves the base bit-identical.
        memory: How the model is kept while it is trained.

    Raises:
        CheckpointError: The base does not load or could not be exported, or the drafter cannot be put on it.
        TrainingError: Something about the text, the recipe or the folders; see `dynamo_train.loop.train`.
    """
    _refuse_existing(job.out)
    memory.check()
    if memory.shard and drafter.reads_states:
        raise TrainingError("--shard divides a base that runs, which it does not with --cache: leave one of them out")
    if job.stream and drafter.reads_ahead:
        raise TrainingError("--stream reads a text once, as it is trained on: not with --cache or --draft-vocab")
    if drafter.freezes_base:
        recipe = replace(recipe, freeze_base=True)
    checkpoint = find_checkpoint(base)
    loaded = load_base(checkpoint)
    preflight(loaded, recipe.length, further=int(drafter.model.on_stem))  # what cannot work is said before any work
    config: Any = loaded.config
    if recipe.length > config.max_position_embeddings:
        raise TrainingError(
            f"sequences of {recipe.length} do not fit the base's context of {config.max_position_embeddings} tokens"
        )
    text = cache(lambda: _streams_of(checkpoint, job, recipe))  # made by the first who asks
    torch.manual_seed(recipe.seed)
    objective = drafter.objective(Start(checkpoint, loaded, lambda: text()[0], job.work), recipe)
    model: Any = objective.model
    streams, tokenizer = text()
    outcome = train(objective, streams, recipe, job.work / "run", memory=memory)
    if processes().is_main_process:
        with _new_folder(job.out) as folder:
            if recipe.freeze_base:
                for file in (*(each.file for each in DRAFTERS.values()), cooccurrence.FILE):
                    if beside := checkpoint.file(file):
                        shutil.copyfile(beside, folder / file)
                model.base.to(stored_dtype(checkpoint))  # from which it came, so that no bit changes
            model.save(folder)
            tokenizer.save_pretrained(folder)
            stages, stage = read_record(checkpoint), _stage(streams, recipe, objective, outcome)
            if drafter.keeps and model.command in stages:
                stage["before"] = stages[model.command]
            _write_record(folder, stages | {model.command: stage})


def add_counts(job: Job, min_counts: list[int], how: Counting | None = None) -> None:
    """Count the n-grams of the training tokens and put them into a checkpoint as its co-occurrence file.

    Args:
        job: Text, and the checkpoint's folder.
        min_counts: See `dynamo_train.cooccurrence.count_ngrams`.
        how: By which engine; the file is the same.

    Raises:
        TrainingError: The folder is no multi-token checkpoint, or there is something about text, memory or engine.
    """
    folder, how = job.out, how or Counting()
    if not drafters_of(folder):
        raise TrainingError(f"'{folder}' is not a multi-token checkpoint folder")
    checkpoint = find_checkpoint(folder)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    temporary = folder / f".{cooccurrence.FILE}"
    try:
        if how.engine == "spark":
            from .ngram_spark import Text

            tokenizer = _ending_tokenizer(checkpoint)
            backend, end_id = tokenizer.backend_tokenizer, tokenizer.eos_token_id
            text = Text(backend.to_str(), vocab_size, end_id, job.held_out_percent)
            kept = write_counts_of_corpus(job.source, text, temporary, how, min_counts, job.work)
        else:
            streams, tokenizer = _streams_of(checkpoint, job)
            end_id = tokenizer.eos_token_id
            kept = write_counts(
                streams, temporary, how, vocab_size=vocab_size, end_id=end_id, min_counts=min_counts, work=job.work
            )
        temporary.replace(folder / cooccurrence.FILE)
    finally:
        temporary.unlink(missing_ok=True)
    said = ", ".join(f"{number} {level}-grams" for level, number in enumerate(kept, start=2))
    logger.info("kept %s in %s", said, folder / cooccurrence.FILE)


def convert(checkpoint: Path, out: Path, dtype: torch.dtype) -> None:
    """Copy a checkpoint, its base and all drafters beside it, with the weights stored in another precision."""
    _refuse_existing(out)
    with _new_folder(out) as folder:
        load_base(checkpoint, dtype).save_pretrained(folder)
        for drafter in map(DRAFTERS.__getitem__, drafters_of(checkpoint)):
            tensors, shape = drafter.read(checkpoint)
            stored = {name: each.to(dtype) if each.is_floating_point() else each for name, each in tensors.items()}
            drafter.write(folder, stored, shape)
        for path in checkpoint.iterdir():
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def pack(checkpoint: Path, out: Path) -> None:
    """Copy what a checkpoint adds to its base, with matrices at 8 bits, and leave the base out.

    Args:
        checkpoint: Folder of a base with drafters, and perhaps n-gram counts, record and card.
        out: The new folder; what a model that goes by a name ships with.

    Raises:
        TrainingError: There is no drafter, or `out` is not new.
    """
    kinds = drafters_of(checkpoint)
    if not kinds:
        raise TrainingError(f"'{checkpoint}' is not a multi-token checkpoint folder")
    _refuse_existing(out)
    with _new_folder(out) as folder:
        for drafter in map(DRAFTERS.__getitem__, kinds):
            drafter.write(folder, *drafter.read(checkpoint), eight_bits=True)
        for file in (cooccurrence.FILE, RECORD_FILE, CARD_FILE, FIGURES_FILE):
            if beside := find_checkpoint(checkpoint).file(file):
                shutil.copyfile(beside, folder / file)


def read_record(name: str | Path | Checkpoint) -> dict[str, Any]:
    """Return the stages that a checkpoint went through, by name; empty if it does not say."""
    path = find_checkpoint(name).file(RECORD_FILE)
    return json.loads(path.read_text()) if path is not None else {}


def _streams_of(checkpoint: Checkpoint, job: Job, recipe: Recipe | None = None) -> tuple[TokenStreams, Any]:
    """Return the corpus in the tokens of an existing model, and its tokenizer."""
    tokenizer = _ending_tokenizer(checkpoint)
    state, backend, end_id = processes(), tokenizer.backend_tokenizer, tokenizer.eos_token_id
    if job.stream and recipe is not None:
        held_out = HeldOut(job.held_out_percent, recipe.validation_tokens)
        share = Share(state.process_index, state.num_processes)
        order = Order(job.shuffled, recipe.seed)
        return stream_text(job.source, backend, end_id, held_out, share, order), tokenizer
    with state.main_process_first():
        return tokenize_corpus(job.source, backend, end_id, job.held_out_percent, job.work / "tokens"), tokenizer


def _ending_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return the tokenizer of an existing model, which has a token that ends documents."""
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer.eos_token_id is None:
        raise TrainingError(f"the tokenizer of '{checkpoint.name}' has no end-of-text token to put between documents")
    return tokenizer


def _refuse_existing(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"{out} exists and is not empty: name a new folder")


def _own_tokenizer(job: Job, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a base from scratch: what an earlier run trained on the same text, or a new one."""
    made_of = f"{sha256_of(job.source)} {job.held_out_percent} {vocab_size} {tokenizers.__version__} {__version__}"
    path = job.work / f"tokenizer-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.json"
    if not path.is_file():
        logger.info("training a tokenizer of %d tokens", vocab_size)
        documents = (d for d in read_corpus(job.source) if not is_held_out(d, job.held_out_percent))
        write_whole(path, train_tokenizer(documents, vocab_size).to_str())
    return Tokenizer.from_file(str(path))


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into that becomes `out` once everything in it is written."""
    with WholeFolder(out) as place:
        folder = place.new()
        yield folder
        _refuse_existing(out)
        place.put(folder)


def _stage(streams: TokenStreams, recipe: Recipe, objective: Objective, outcome: TrainingOutcome) -> dict[str, Any]:
    """Return the record of a run: interpreter, corpus, recipe, the objective's settings, figures."""
    return {
        "python": platform.python_version(),
        "corpus": asdict(streams.record),
        "recipe": asdict(recipe),
        **objective.settings,
        **asdict(outcome),
    }


def _write_record(folder: Path, stages: dict[str, Any]) -> None:
    (folder / RECORD_FILE).write_text(json.dumps(stages, indent=2) + "\n")
