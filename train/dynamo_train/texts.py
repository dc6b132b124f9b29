"""The command `dynamo-train texts`: text that a model writes itself, to train heads on.

A bundle needs no torch for it; a checkpoint writes on torch, on a GPU where there is one.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from dynamo_runtime.batch import Batch
from dynamo_runtime.bundle import TOKENIZER, Bundle, load_bundle
from dynamo_runtime.chat import asked
from dynamo_runtime.files import WholeFolder, read_object, sha256, write_whole
from dynamo_runtime.manifest import MANIFEST
from dynamo_runtime.version import __version__

from .corpus import read_corpus
from .errors import TrainingError
from .tokens import sha256_of
from .writing import Recipe, Turns, Writing, first_token, loops, turns_of

RECORD = "_texts.json"  # with an underscore, so that whoever reads the folder as parquet leaves it out
SHARD_WAVES = 4  # texts in a bundle's shard: so many times the rows of a batch, of which one that ends makes room
ENOUGH_DROPPED = 40  # texts in a row, to know that no others come
_MOST_RECORD_BYTES = 64 << 20
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextsJob:
    """What is written, and where to.

    Attributes:
        bundle: Its folder; or a checkpoint, where there is a device.
        out: Folder of the corpus; one that the same job began is gone on with.
        tokens: At least so many, of texts that are kept.
        recipe: How texts are written.
        batch: Texts at once.
        seed: Of the corpus.
        prompts: What users say first, or texts begin with; see `dynamo_train.corpus.read_corpus`.
        beginnings: Lines that questions begin with, and which the model completes; read alike. Without either the model
            invents all of it.
        plain: Whether to do without the bundle's chat template.
        threads: Of onnxruntime.
        device: Where a checkpoint writes on torch; None: a bundle does, and no torch.
    """

    bundle: str
    out: Path
    tokens: int
    recipe: Recipe
    batch: int
    seed: int
    prompts: str | None
    beginnings: str | None
    plain: bool
    threads: int | None
    device: str | None


@dataclass(frozen=True)
class TextCounts:
    """What became of the texts that were written."""

    written: int = 0
    loops: int = 0
    duplicates: int = 0
    kept: int = 0
    tokens: int = 0
    answer_tokens: int = 0


@dataclass(frozen=True)
class Record:
    """What a corpus was made of, and how far it is; stands in its folder as `_texts.json`.

    Attributes:
        made_by: Version, bundle and options, which are the same whenever it is gone on with.
        counts: So far.
        shards: SHA-256 of the files, by name, in order.
    """

    made_by: dict[str, Any]
    counts: TextCounts = TextCounts()
    shards: dict[str, str] = field(default_factory=dict)


class Writer(Protocol):
    """What writes many texts at once."""

    def write(self, texts: Iterable[Writing], after_pass: Callable[[int], None]) -> Iterator[Writing]:
        """Write texts to their ends; tells of every pass how many tokens it read."""


@dataclass(frozen=True)
class Author:
    """Whose texts they are.

    Attributes:
        bundle: The model's; of a checkpoint what a bundle would say.
        made_by: What names the model in the record.
        writer: Makes what writes.
        waves: Batches in a shard.
    """

    bundle: Bundle
    made_by: dict[str, str]
    writer: Callable[[], Writer]
    waves: int


@contextmanager
def _author(job: TextsJob) -> Iterator[Author]:
    """Load a bundle, or a checkpoint on a device.

    Raises:
        DynamoError: The bundle does not load.
        TrainingError: See `open_checkpoint`; or it is not one of the two that the options are for.
        CheckpointError: The checkpoint does not load.
    """
    rows, length = job.batch, job.recipe.length
    if job.device is not None:
        if job.threads is not None:
            raise TrainingError("--threads is of onnxruntime, and --device of torch: give one of them")
        from .lockstep import Lockstep, open_checkpoint
        from .state import sha256 as sha256_of_tensors

        with open_checkpoint(job.bundle, job.device) as (base, said):
            kind = f"{said.source.model} ({str(base.dtype).removeprefix('torch.')} on {base.device.type})"
            made_by = {"checkpoint": sha256_of_tensors(base.state_dict()), "model": kind}
            made_by["tokenizer"] = sha256(said.folder / TOKENIZER)
            yield Author(said, made_by, lambda: Lockstep(base, rows, length), 1)
        return
    path = Path(job.bundle)
    if path.suffix == ".gguf" or ((path / "config.json").is_file() and not (path / MANIFEST).is_file()):
        raise TrainingError(f"{path} is a checkpoint and no bundle: give --device cpu or cuda, and it writes on torch")
    bundle = load_bundle(job.bundle)
    manifest = read_object(bundle.folder / MANIFEST, _MOST_RECORD_BYTES)
    made_by = {
        "bundle": manifest.get("sha256") or sha256(bundle.folder / MANIFEST),
        "model": f"{bundle.source.model} ({bundle.precision})",
        "tokenizer": bundle.files[TOKENIZER].sha256,
    }
    yield Author(bundle, made_by, lambda: Batch(bundle, rows, length, threads=job.threads), SHARD_WAVES)


def write_texts(job: TextsJob) -> TextCounts:
    """Have a model write a corpus, shard by shard, or go on with one that an earlier run began.

    Text i is a function of the seed and of i; every shard is there once it is whole.

    Raises:
        TrainingError: The folder holds something else, an option does not fit the model, or nothing new comes.
        DynamoError: The bundle does not load or run, or there is something about the prompts or the folder.
        CheckpointError: The checkpoint does not load.
    """
    with _author(job) as author:
        begin = _beginnings(author.bundle, job)
        made_by = author.made_by | _made_by(job)
        with WholeFolder(job.out):  # for its lock: one process at a time
            record = _begun(job.out, made_by)
            known = {_key(tokens) for name in record.shards for tokens in _tokens_of(job.out / name)}
            if record.counts.tokens < job.tokens:
                record = _write(author, begin, record, known, job)
    counts = record.counts
    logger.info(
        "%s: %d texts, %d tokens, %d of them in answers; of %d texts written %d that repeat themselves and %d "
        "duplicates were dropped",
        *(job.out, counts.kept, counts.tokens, counts.answer_tokens, counts.written, counts.loops, counts.duplicates),
    )
    return counts


def _write(author: Author, begin: Callable[[int], Writing], record: Record, known: set[bytes], job: TextsJob) -> Record:
    """Write shards until there are tokens enough."""
    writer = author.writer()
    dropped = 0  # in a row
    dtype = np.uint16 if author.bundle.vocab_size <= 2**16 else np.uint32
    with tqdm(total=job.tokens, initial=record.counts.tokens, unit=" tokens", disable=None) as bar:
        while record.counts.tokens < job.tokens:
            first, started = record.counts.written, time.perf_counter()
            numbers = range(first, first + min(author.waves * job.batch, _missing(record.counts, job)))
            texts = sorted(writer.write(map(begin, numbers), bar.update), key=lambda text: text.number)
            seconds = time.perf_counter() - started
            kept, counts = _kept(texts, known, record.counts)
            record = replace(record, counts=counts)
            dropped = 0 if kept else dropped + len(texts)
            if dropped >= ENOUGH_DROPPED:
                raise TrainingError(
                    f"{dropped} texts in a row repeat themselves or others, and {job.out} has {counts.tokens} of "
                    f"{job.tokens} tokens: give more prompts, or higher temperatures"
                )
            name = f"texts-{len(record.shards):05d}.parquet"
            if kept:
                write_whole(job.out / name, _parquet(kept, author.bundle, dtype))
                record = replace(record, shards=record.shards | {name: sha256(job.out / name)})
            write_whole(job.out / RECORD, json.dumps(asdict(record), indent=1) + "\n")
            bar.n = counts.tokens
            bar.refresh()
            if bar.disable:
                written = sum(len(text.tokens) for text in texts)
                logger.info("%s: %d of %d tokens, %.0f tokens/s", name, counts.tokens, job.tokens, written / seconds)
    return record


def _missing(counts: TextCounts, job: TextsJob) -> int:
    """Return texts that are probably missing, by what came of those before.

    There are more of them, as passes over few rows are a waste.
    """
    each = counts.tokens / counts.written if counts.tokens else 0.75 * job.recipe.length
    missing = int((job.tokens - counts.tokens) / each) + job.batch // 8 + 1
    return missing if missing <= job.batch else -(-missing // job.batch) * job.batch


def _kept(texts: Iterable[Writing], known: set[bytes], counts: TextCounts) -> tuple[list[Writing], TextCounts]:
    """Return the texts that neither repeat themselves nor one that is known, which they then are.

    The counts are returned with them.
    """
    kept, found = list[Writing](), asdict(counts)
    for text in texts:
        key = _key(text.tokens)
        found["written"] += 1
        if loops(text.tokens):
            found["loops"] += 1
        elif key in known:
            found["duplicates"] += 1
        else:
            known.add(key)
            kept.append(text)
            found["kept"] += 1
            found["tokens"] += len(text.tokens)
            found["answer_tokens"] += sum(text.roles)
    return kept, TextCounts(**found)


def _beginnings(bundle: Bundle, job: TextsJob) -> Callable[[int], Writing]:
    """Return what makes the text of a number, before the model has written any of it.

    Raises:
        TrainingError: See `write_texts`.
    """
    recipe, ends = job.recipe, bundle.eos_token_ids
    _check(bundle, job)
    turns = None
    if bundle.has_chat_template and not job.plain:
        turns = turns_of(bundle.chat_template, bundle.control_tokens, ends)
    openings = []  # and whether an answer follows
    if job.prompts is not None:
        openings += [(_opening(bundle, document.text, turns), True) for document in read_corpus(job.prompts)]
    if turns is None and job.beginnings is not None:
        raise TrainingError("--beginnings are of questions, and there is no chat template: give them as --prompts")
    if turns is None:
        openings = openings or [([first_token(bundle)], True)]
    elif job.prompts is None or job.beginnings is not None:
        if not turns.question_ends:
            raise TrainingError(
                "the chat template ends questions by no token, so that none can be invented: give --prompts"
            )
        openings += [([*turns.opening, *line], False) for line in _lines(bundle, job.beginnings)]
    longest = max(len(opening) for opening, _ in openings)
    if longest >= recipe.length:
        raise TrainingError(f"a text begins with {longest} tokens and ends at {recipe.length}: give a larger --length")

    def begin(number: int) -> Writing:
        seed = int(np.random.SeedSequence([job.seed, number]).generate_state(1)[0])
        opening, answers = openings[number % len(openings)]
        return Writing(number, seed, opening, recipe, turns=turns, end_tokens=ends, answers=answers)

    return begin


def _check(bundle: Bundle, job: TextsJob) -> None:
    """See that options are in range.

    Raises:
        TrainingError: One is not.
    """
    recipe = job.recipe
    if job.seed < 0:
        raise TrainingError("--seed must be a whole number from 0 on")
    if recipe.top_p > 1:
        raise TrainingError("--top-p must be a number above 0 and at most 1")
    if not recipe.length > 1:
        raise TrainingError("--length must be at least 2")
    if not 1 <= recipe.top_k <= bundle.top_k_outputs:
        raise TrainingError(f"--top-k must be from 1 to the {bundle.top_k_outputs} that the model puts out")
    if recipe.length > bundle.context_length:
        raise TrainingError(f"--length must be at most the model's context of {bundle.context_length} tokens")


def _opening(bundle: Bundle, prompt: str, turns: Turns | None) -> list[int]:
    """Return a prompt as the model reads it, up to where it begins to write."""
    if turns is None:
        return bundle.tokenizer.encode(prompt).ids
    return bundle.chat_template.encode(asked(prompt), bundle.control_tokens).encoded.ids


def _lines(bundle: Bundle, beginnings: str | None) -> list[list[int]]:
    """Lines that questions begin with, as tokens; one of nothing if there are none."""
    if beginnings is None:
        return [[]]
    lines = [line.strip() for document in read_corpus(beginnings) for line in document.text.splitlines()]
    # What looks like a control token is text.
    return [bundle.control_tokens.encode(line, range(1, len(line))).ids for line in lines if line]


def _made_by(job: TextsJob) -> dict[str, Any]:
    """Return what the texts are a function of, but for the model and their number."""
    return {
        "version": __version__,
        "batch": job.batch,
        "seed": job.seed,
        "prompts": None if job.prompts is None else sha256_of(job.prompts),
        "beginnings": None if job.beginnings is None else sha256_of(job.beginnings),
        "plain": job.plain,
        **asdict(job.recipe),
        "temperatures": list(job.recipe.temperatures),
    }


def _begun(out: Path, made_by: dict[str, Any]) -> Record:
    """Return the record of what lies in a folder, which is made if there is none.

    Raises:
        TrainingError: It holds something else.
    """
    if not (out / RECORD).is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise TrainingError(f"{out} exists and is no corpus that this command began: name a new folder")
        out.mkdir(parents=True, exist_ok=True)
        record = Record(made_by)
        write_whole(out / RECORD, json.dumps(asdict(record), indent=1) + "\n")
        return record
    try:
        found = read_object(out / RECORD, _MOST_RECORD_BYTES)
        record = Record(found["made_by"], TextCounts(**found["counts"]), found["shards"])
        other = [name for name in made_by if record.made_by.get(name) != made_by[name]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{out / RECORD} is no record of a corpus: name a new folder") from error
    if other:
        was = record.made_by.get(other[0])
        raise TrainingError(
            f"{out} was begun with another {other[0]} ({was}, not {made_by[other[0]]}): name a new folder"
        )
    for name, digest in record.shards.items():
        if not (out / name).is_file() or sha256(out / name) != digest:
            raise TrainingError(f"{out / name} is not the file that {RECORD} tells of: name a new folder")
    return record


def _key(tokens: Any) -> bytes:
    """Return what two texts have in common if they are the same."""
    return np.asarray(tokens, np.uint32).tobytes()


def _tokens_of(path: Path) -> list[np.ndarray]:
    """Return the texts of a shard."""
    column = pq.read_table(path, columns=["tokens"])["tokens"]
    return [each.values.to_numpy() for each in column]


def _parquet(texts: list[Writing], bundle: Bundle, dtype: type) -> bytes:
    """Return a shard: tokens, roles, decoded text with its special tokens, and seed of every text."""
    table = pa.table(
        {
            "tokens": pa.array([np.array(text.tokens, dtype) for text in texts]),
            "role": pa.array([np.array(text.roles, np.uint8) for text in texts]),
            "text": [bundle.tokenizer.decode(text.tokens, skip_special_tokens=False) for text in texts],
            "seed": pa.array([text.seed for text in texts], pa.uint32()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content
