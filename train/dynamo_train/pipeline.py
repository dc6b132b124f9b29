"""The jobs of training, each from its inputs to a finished checkpoint folder."""

from __future__ import annotations

import json
import logging
import math
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, PreTrainedTokenizerFast

from dynamo_model import CPModel, LookAheadModel, MultiTokenModel, has_heads
from dynamo_model.checkpoint import FILES, load_base, read_drafter, save_drafter
from dynamo_runtime.corpus import is_held_out

from . import cooccurrence
from .corpus import read_corpus
from .errors import TrainingError
from .joint import JointCLM
from .lookahead import LookAheadCLM
from .loop import Outcome, Recipe, train
from .objective import ModifiedCLM, Objective
from .tokens import END_OF_TEXT, TokenStreams, tokenize_corpus, train_tokenizer

logger = logging.getLogger(__name__)

# DynaMo, table of learning rates: parameters of the T3 model -> LR_B, LR_M; LR_MB is a tenth of LR_B.
PAPER_LEARNING_RATES = {
    77e6: (1e-5, 1e-3),
    180e6: (6e-6, 6e-4),
    430e6: (3e-6, 3e-4),
    1.1e9: (2e-6, 2e-4),
    2.9e9: (1.6e-6, 1.6e-4),
    7.3e9: (1.2e-6, 1.2e-4),
}
RECORD_FILE = "training.json"


@dataclass(frozen=True)
class BaseShape:
    """Shape of a GPT-NeoX base that is trained from scratch."""

    hidden_size: int
    layers: int
    attention_heads: int
    vocab_size: int
    context_length: int


def paper_learning_rates(parameters: int) -> tuple[float, float]:
    """LR_B and LR_M of the paper's model that is nearest in size (on a logarithmic scale)."""
    nearest = min(PAPER_LEARNING_RATES, key=lambda size: abs(math.log(size / parameters)))
    return PAPER_LEARNING_RATES[nearest]


def train_base(
    out: Path, source: str, shape: BaseShape, recipe: Recipe, *, held_out_percent: float, work: Path
) -> None:
    """Train a tokenizer and a small GPT-NeoX base from scratch and write it to ``out``.

    Args:
        out: the new folder, an ordinary HF model.
        source: the corpus, see :func:`dynamo_train.corpus.read_corpus`.
        shape: of the model.
        recipe: of the training.
        held_out_percent: share of the corpus kept for validation.
        work: tokens and checkpoints; the same call again goes on from the last checkpoint there.
    """
    _refuse_existing(out)
    tokenizer_path = work / "tokenizer.json"
    with PartialState().main_process_first():
        if not tokenizer_path.is_file():
            logger.info("training a tokenizer of %d tokens", shape.vocab_size)
            work.mkdir(parents=True, exist_ok=True)
            documents = (d for d in read_corpus(source) if not is_held_out(d, held_out_percent))
            train_tokenizer(documents, shape.vocab_size).save(str(tokenizer_path))
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
        end_id = tokenizer.token_to_id(END_OF_TEXT)
        assert end_id is not None  # the tokenizer was trained with it
        streams = tokenize_corpus(source, tokenizer, end_id, held_out_percent, work / "tokens")
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
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    outcome = train(ModifiedCLM(model), streams, recipe, work / "run")
    if PartialState().is_main_process:
        with _new_folder(out, work) as folder:
            model.save_pretrained(folder)
            PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
            ).save_pretrained(folder)
            _write_record(folder, None, "base", streams, recipe, outcome, {})


def train_heads(
    base: str, out: Path, source: str, n_heads: int, recipe: Recipe, *, held_out_percent: float, work: Path
) -> None:
    """Add ``n_heads - 1`` token heads to a base, train them by the modified CLM objective, write to ``out``.

    Args:
        base: folder or Hub id of the base.
        out: the new folder, a multi-token checkpoint.
        source: the corpus.
        n_heads: 2 to 8.
        recipe: of the training; ``freeze_base`` leaves the base bit-identical.
        held_out_percent: share of the corpus kept for validation.
        work: tokens and checkpoints; the same call again goes on from the last checkpoint there.
    """
    _refuse_existing(out)
    streams, tokenizer = _streams_of(base, source, held_out_percent, work)
    torch.manual_seed(recipe.seed)
    model = MultiTokenModel.from_base(base, n_heads)
    objective = ModifiedCLM(model, recipe.shared_gradient_scale, recipe.freeze_base)
    _train_drafter(objective, "heads", base, out, streams, tokenizer, recipe, work)


def train_cp(
    base: str,
    out: Path,
    source: str,
    n_tokens: int,
    rank: int,
    recipe: Recipe,
    *,
    balance: float = 0.01,
    held_out_percent: float,
    work: Path,
) -> None:
    """Put a joint head on a base (CP tensor decomposition), train it, write both to ``out``.

    Args:
        base: folder or Hub id of the base.  Other drafters beside it are taken along if it is frozen.
        out: the new folder.
        source: the corpus.
        n_tokens: tokens of the joint distribution, 2 to 8.
        rank: components of the mixture, 1 to 32.
        recipe: of the training; ``freeze_base`` leaves the base bit-identical.
        balance: weight of the load-balancing loss, see :class:`JointCLM`.
        held_out_percent: share of the corpus kept for validation.
        work: tokens and checkpoints; the same call again goes on from the last checkpoint there.
    """
    _refuse_existing(out)
    streams, tokenizer = _streams_of(base, source, held_out_percent, work)
    torch.manual_seed(recipe.seed)
    model = CPModel(load_base(base), n_tokens, rank)
    objective = JointCLM(model, balance, recipe.freeze_base, recipe.shared_gradient_scale)
    _train_drafter(objective, "cp", base, out, streams, tokenizer, recipe, work)


def train_lookahead(
    base: str,
    out: Path,
    source: str,
    n_look_ahead: int,
    recipe: Recipe,
    *,
    anchors: int = 64,
    held_out_percent: float,
    work: Path,
) -> None:
    """Train look-ahead embeddings for a base (PaSS), which stays as it is, and write both to ``out``.

    Args:
        base: folder or Hub id of the base.  Other drafters beside it are taken along.
        out: the new folder.
        source: the corpus.
        n_look_ahead: L, 1 to 16.
        recipe: of the training; the base is frozen whatever it says, and ``heads_lr`` is the embeddings' rate.
        anchors: positions a sequence that are trained on, see :class:`LookAheadCLM`.
        held_out_percent: share of the corpus kept for validation.
        work: tokens and checkpoints; the same call again goes on from the last checkpoint there.
    """
    _refuse_existing(out)
    recipe = replace(recipe, freeze_base=True)
    streams, tokenizer = _streams_of(base, source, held_out_percent, work)
    torch.manual_seed(recipe.seed)
    model = LookAheadModel(load_base(base), n_look_ahead)
    window = getattr(model.config, "sliding_window", None)
    if window is not None and window < recipe.length:
        raise TrainingError(
            f"the base attends to {window} tokens at a time: look-ahead embeddings need sequences no longer than that"
        )
    objective = LookAheadCLM(model, anchors, recipe.seed)
    _train_drafter(objective, "lookahead", base, out, streams, tokenizer, recipe, work)


def add_counts(checkpoint: Path, source: str, min_counts: list[int], *, held_out_percent: float, work: Path) -> None:
    """Count the n-grams of the training tokens and put them into a checkpoint as its co-occurrence file."""
    if not has_heads(checkpoint):
        raise TrainingError(f"'{checkpoint}' is not a multi-token checkpoint folder")
    streams, tokenizer = _streams_of(str(checkpoint), source, held_out_percent, work)
    counts = cooccurrence.count_ngrams(
        streams.train,
        len(min_counts),
        vocab_size=json.loads((checkpoint / "config.json").read_text())["vocab_size"],
        end_id=tokenizer.eos_token_id,
        min_counts=min_counts,
    )
    temporary = checkpoint / f".{cooccurrence.FILE}"
    counts.save(temporary)
    temporary.replace(checkpoint / cooccurrence.FILE)
    kept = ", ".join(f"{len(keys)} {level}-grams" for level, keys in enumerate(counts.keys, start=2))
    logger.info("kept %s in %s", kept, checkpoint / cooccurrence.FILE)


def convert(checkpoint: Path, out: Path, dtype: torch.dtype) -> None:
    """Copy a checkpoint, its base and all drafters beside it, with the weights stored in another precision."""
    _refuse_existing(out)
    with _new_folder(out, out.parent) as folder:
        load_base(checkpoint, dtype).save_pretrained(folder)
        for kind in FILES:
            if has_heads(checkpoint, kind):
                tensors, shape = read_drafter(checkpoint, kind)
                save_drafter(folder, kind, {name: tensor.to(dtype) for name, tensor in tensors.items()}, **shape)
        for path in checkpoint.iterdir():
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def _train_drafter(
    objective: Objective,
    stage: str,
    base: str,
    out: Path,
    streams: TokenStreams,
    tokenizer: Any,
    recipe: Recipe,
    work: Path,
) -> None:
    """Train what was put on a base and write the result; a frozen base keeps the drafters that lie beside it."""
    model: Any = objective.model
    context = model.config.max_position_embeddings
    if recipe.length > context:
        raise TrainingError(f"sequences of {recipe.length} do not fit the base's context of {context} tokens")
    outcome = train(objective, streams, recipe, work / "run")
    if PartialState().is_main_process:
        with _new_folder(out, work) as folder:
            if recipe.freeze_base:
                for file in (*FILES.values(), cooccurrence.FILE):
                    if (Path(base) / file).is_file():
                        shutil.copyfile(Path(base) / file, folder / file)
            model.save(folder)
            tokenizer.save_pretrained(folder)
            _write_record(folder, Path(base), stage, streams, recipe, outcome, objective.settings)


def _streams_of(name: str, source: str, percent: float, work: Path) -> tuple[TokenStreams, Any]:
    """The corpus in the tokens of an existing model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise TrainingError(f"no tokenizer in '{name}'") from error
    if tokenizer.eos_token_id is None:
        raise TrainingError(f"the tokenizer of '{name}' has no end-of-text token to put between documents")
    with PartialState().main_process_first():
        backend = tokenizer.backend_tokenizer
        return tokenize_corpus(source, backend, tokenizer.eos_token_id, percent, work / "tokens"), tokenizer


def _refuse_existing(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"{out} exists and is not empty: name a new folder")


@contextmanager
def _new_folder(out: Path, beside: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` once everything in it is written."""
    beside.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".new-") as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        yield folder
        if out.exists():
            out.rmdir()
        shutil.move(folder, out)


def _write_record(
    folder: Path,
    previous: Path | None,
    stage: str,
    streams: TokenStreams,
    recipe: Recipe,
    outcome: Outcome,
    settings: dict[str, Any],
) -> None:
    """Add a stage to the checkpoint's record: corpus, recipe, the objective's settings, interpreter, figures."""
    record = {}
    if previous is not None and (previous / RECORD_FILE).is_file():
        record = json.loads((previous / RECORD_FILE).read_text())
    record[stage] = {
        "python": platform.python_version(),
        "corpus": asdict(streams.record),
        "recipe": asdict(recipe),
        **settings,
        **asdict(outcome),
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
