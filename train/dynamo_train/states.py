"""What a frozen base says of a text, kept on disk: it runs once, and heads are trained for as long as one likes.

A text is cut into windows of one length, which the base reads one by one.  Of every position there are kept

- the *penultimate state*, which is all that a further head reads, in bfloat16,
- the base's `TOP` likeliest next tokens and their log-probabilities, which a head learns from, and
- the log-probability of the token that follows.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from dynamo_model import MultiTokenModel
from dynamo_model.output import Output
from dynamo_runtime.files import write_whole

from .errors import TrainingError
from .recipe import Recipe
from .spread import processes
from .state import sha256
from .tokens import TokenStreams

logger = logging.getLogger(__name__)

TOP = 32
"""Likeliest tokens that are kept of a base's distribution."""
RECORD = "states.json"
_NOTE_EVERY = 16
"""Batches between two notes of how far it is."""


def rows_at_once(device: torch.device, words: int) -> int:
    """Return positions whose logits over so many words exist at once: on a GPU as many as keep it busy, within 2 GB."""
    return 1024 if device.type == "cpu" else max(1024, min(8192, 2**29 // words))


@dataclass(frozen=True)
class Said:
    """What a base says of some windows of a text.

    Attributes:
        tokens: The text, and the token behind it, int64 [windows, length + 1].
        stem: Penultimate states, bfloat16 [windows, length, hidden].
        ids: Likeliest next tokens, the likeliest first, int64 [windows, length, TOP].
        log_p: Their log-probabilities, float32 [windows, length, TOP].
        label_log_p: Log-probability of the token that follows, float32 [windows, length].
    """

    tokens: Tensor
    stem: Tensor
    ids: Tensor
    log_p: Tensor
    label_log_p: Tensor


class StateCache:
    """The states of one stream of tokens, in a folder of memory-mapped files.

    Windows are kept in order, together with their tokens: what is there serves every text that begins alike, a shorter
    one as well as a longer one, for which the base reads the rest.

    Args:
        folder: Of its own; what an earlier run left there is used as far as it fits.
        tokens: The stream, token ids [tokens].
        length: Positions of a window.
        hidden_size: Of the base.
        made_of: Says which base it is, and in which precision it runs; states of another are not used.

    Attributes:
        windows: How many there are; what is left of the stream behind the last is not read.
        length: Positions of each.

    Raises:
        TrainingError: The stream is shorter than a window.
    """

    def __init__(
        self, folder: Path, tokens: NDArray[np.unsignedinteger], length: int, hidden_size: int, made_of: str
    ) -> None:
        self.windows, self.length = (len(tokens) - 1) // length, length
        if self.windows < 1:
            raise TrainingError(f"{len(tokens)} tokens are too few for sequences of {length}")
        self._folder, self._tokens = folder, tokens
        self._made_of = {"base": made_of, "length": length, "top": TOP, "tokens": tokens.dtype.name}
        self._rows = {  # of one window
            "tokens": ((length + 1,), tokens.dtype),
            "stem": ((length, hidden_size), np.dtype(np.uint16)),  # the bits of bfloat16, which numpy does not know
            "ids": ((length, TOP), tokens.dtype),
            "log_p": ((length, TOP), np.dtype(np.float16)),
            "label_log_p": ((length,), np.dtype(np.float32)),
        }

    @property
    def nbytes(self) -> int:
        """Bytes that the whole cache takes on disk."""
        return self.windows * sum(map(self._window_bytes, self._rows))

    def missing(self) -> int:
        """Windows that the base has not read yet."""
        try:
            record = json.loads((self._folder / RECORD).read_text())
            if record.pop("windows") and record == self._made_of:
                found = min(self._stored(), self.windows)
                pairs = zip(self._map("tokens", found), self._texts(range(found)).numpy(), strict=True)
                return self.windows if any((a != b).any() for a, b in pairs) else self.windows - found
        except (OSError, ValueError, KeyError, AttributeError):
            pass  # no cache, or none that was noted down
        return self.windows

    def fill(self, model: MultiTokenModel, batch: int, bar: tqdm) -> None:
        """Have the base read what is missing; goes on where an interrupted run ended.

        All processes call it, and each reads batches of its own.

        Args:
            model: Whose base it is, in the precision that it is to run in.
            batch: Windows at once.
            bar: Advanced by the tokens read.
        """
        state, done = processes(), self.windows - self.missing()
        if done == self.windows:
            return
        state.wait_for_everyone()  # now all have seen what was there
        if state.is_main_process:
            self._truncate(done)
        state.wait_for_everyone()
        with ExitStack() as stack:
            files = {name: stack.enter_context(self._path(name).open("r+b")) for name in self._rows}
            for number, start in enumerate(range(done, self.windows, batch * state.num_processes)):
                end = min(start + batch * state.num_processes, self.windows)
                mine = range(start, end)[batch * state.process_index :][:batch]
                if mine:
                    texts = self._texts(mine)
                    said = _say(model, texts) | {"tokens": texts.numpy()}
                    for name, (_, dtype) in self._rows.items():
                        files[name].seek(mine.start * self._window_bytes(name))
                        files[name].write(said[name].astype(dtype).tobytes())
                bar.update((end - start) * self.length)
                if number % _NOTE_EVERY == 0 or end == self.windows:
                    for file in files.values():
                        file.flush()
                    state.wait_for_everyone()
                    if state.is_main_process:
                        self._note(end)

    def read(self, windows: NDArray[np.int64]) -> Said:
        """Return what the base says of some windows, by their numbers."""
        part = {name: torch.from_numpy(self._map(name, self.windows)[windows]) for name in self._rows}
        return Said(
            tokens=part["tokens"].long(),
            stem=part["stem"].view(torch.bfloat16),
            ids=part["ids"].long(),
            log_p=part["log_p"].float(),
            label_log_p=part["label_log_p"],
        )

    def _texts(self, windows: range) -> Tensor:
        """Windows of the stream, each with the token behind it, int64 [windows, length + 1]."""
        rows = [self._tokens[start * self.length : (start + 1) * self.length + 1] for start in windows]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _truncate(self, windows: int) -> None:
        """Leave so many windows in every file, and say so: behind them, what is there has holes until it is noted."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._note(windows)
        for name in self._rows:
            with self._path(name).open("r+b" if windows else "wb") as file:
                file.truncate(windows * self._window_bytes(name))

    def _note(self, windows: int) -> None:
        write_whole(self._folder / RECORD, json.dumps(self._made_of | {"windows": windows}, indent=1) + "\n")

    def _stored(self) -> int:
        """Windows that were noted down and are in every file."""
        noted = json.loads((self._folder / RECORD).read_text())["windows"]
        return min(noted, *(self._path(name).stat().st_size // self._window_bytes(name) for name in self._rows))

    def _map(self, name: str, windows: int) -> NDArray:
        shape, dtype = self._rows[name]
        return np.memmap(self._path(name), dtype=dtype, mode="r", shape=(windows, *shape))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.bin"

    def _window_bytes(self, name: str) -> int:
        shape, dtype = self._rows[name]
        return math.prod(shape) * dtype.itemsize


def cache_states(
    base: PreTrainedModel, streams: TokenStreams, recipe: Recipe, folder: Path
) -> tuple[StateCache, StateCache]:
    """Return what a base says of training and held-out text, read from disk as far as it is there.

    Args:
        base: It runs in bfloat16 where the recipe does.
        streams: The text; of the held-out part as much as the recipe allows a validation.
        recipe: Its length is that of the windows.
        folder: Where the states are kept.

    Returns:
        The states of the training text, and of the held-out text.

    Raises:
        TrainingError: The text is too short, or the disk too full.
    """
    dtype = torch.bfloat16 if recipe.precision == "bf16" else next(base.parameters()).dtype
    made_of = f"{sha256(base.state_dict())} in {dtype}"
    embedding: Any = base.get_input_embeddings()
    size = embedding.weight.shape[1]
    texts = {"train": streams.train, "held-out": streams.held_out[: recipe.validation_tokens or None]}
    caches = [StateCache(folder / name, text, recipe.length, size, made_of) for name, text in texts.items()]
    state = processes()
    if missing := sum(cache.missing() for cache in caches):
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = sum(cache.nbytes for cache in caches), shutil.disk_usage(folder).free
        there = sum(file.stat().st_size for file in folder.glob("*/*.bin"))
        if needed - there > free:
            raise TrainingError(f"the states take {needed / 1e9:.1f} GB, and {folder} has room for {free / 1e9:.1f} GB")
        windows = sum(cache.windows for cache in caches)
        if state.is_main_process:
            logger.info("the states of %d tokens take %.2f GB in %s", windows * recipe.length, needed / 1e9, folder)
        reader: Any = copy.deepcopy(base)
        model = MultiTokenModel(reader.to(state.device, dtype).eval(), 2)
        with tqdm(
            total=windows * recipe.length,
            initial=(windows - missing) * recipe.length,
            desc="states",
            unit="token",
            disable=not state.is_main_process,
        ) as bar:
            for cache in caches:
                cache.fill(model, recipe.micro_batch, bar)
    state.wait_for_everyone()
    return caches[0], caches[1]


@torch.no_grad()
def _say(model: MultiTokenModel, tokens: Tensor) -> dict[str, NDArray]:
    """Return what a base says of texts [windows, length + 1], each with the token behind it.

    It stands under the names of the files.
    """
    tokens = tokens.to(model.base.device)
    first, given = model.penultimate(tokens[:, :-1])
    ids, log_p, label_log_p = [], [], []
    head = model.output_embedding
    rows = rows_at_once(head.weight.device, len(head.weight))
    labels = tokens[:, 1:].flatten().split(rows)
    weight, bias = (None if each is None else each.float() for each in (head.weight, head.bias))
    for states, theirs in zip(first.flatten(0, 1).split(rows), labels, strict=True):
        logits = Output.of(model.base)(states.float(), weight, bias)  # logits in bfloat16 would tie
        mass = logits.logsumexp(-1, keepdim=True)
        best = logits.topk(TOP)
        ids.append(best.indices)
        log_p.append(best.values - mass)
        label_log_p.append((logits.gather(-1, theirs[:, None]) - mass)[:, 0])
    return {
        "stem": given.stem.bfloat16().view(torch.uint16).cpu().numpy(),
        "ids": torch.cat(ids).cpu().numpy(),
        "log_p": torch.cat(log_p).cpu().numpy(),
        "label_log_p": torch.cat(label_log_p).cpu().numpy(),
    }
