"""Runs of training that one process and several do alike; `accelerate launch … -m support.spread_cases WORK`."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dynamo_model import CPModel, LookAheadModel, MultiTokenModel
from dynamo_train import loop, spread
from dynamo_train.cached import CachedHeads
from dynamo_train.joint import JointCLM
from dynamo_train.look_ahead import LookAheadCLM
from dynamo_train.objective import Objective
from dynamo_train.parallel import ModifiedCLM
from dynamo_train.recipe import Recipe
from dynamo_train.spread import PLAIN, Memory, processes
from dynamo_train.states import cache_states
from dynamo_train.stream import HeldOut, Order, Share, TextStream, stream_text
from dynamo_train.tokens import CorpusRecord, TokenStreams

VOCAB = 40
PROCESSES = 2
SHAPES = "shapes.json"
STOPPED = "streamed, stopped, gone on"
RECIPE = Recipe(
    steps=4,
    sequences=8,
    length=8,
    micro_batch=2,
    optimizer="adamw",
    base_lr=1e-3,
    heads_lr=1e-2,
    shared_gradient_scale=0.1,
    freeze_base=False,
    weight_decay=0.1,
    warmup=0.01,
    clip=1.0,
    precision="no",
    seed=3,
    validate_every=2,
)


def streams() -> TokenStreams:
    rng = np.random.default_rng(0)
    train, held_out = (np.cumsum(rng.integers(1, 3, n)) % VOCAB for n in (400, 100))
    record = CorpusRecord("test", 2, 1, 500, 400, 100, 6.0, "0" * 64)
    return TokenStreams(train.astype(np.uint16), held_out.astype(np.uint16), record)


class Together:
    """What several processes are given of a text, as one batch."""

    def __init__(self, parts: list[TextStream]) -> None:
        self._parts = parts

    def take(self, rows: int, length: int, extra: int) -> np.ndarray:
        return np.concatenate([part.take(rows // len(self._parts), length, extra) for part in self._parts])

    def position(self) -> str:
        return ""


def streamed(work: Path) -> TokenStreams:
    """A process' part of a text in shards, shuffled in blocks; a single process has the parts of all."""
    state, folder = processes(), work / "text"
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for shard in range(4):
            texts = (np.cumsum(rng.integers(1, 3, rng.integers(3, 30))) % (VOCAB - 1) + 1 for _ in range(12))
            rows = [json.dumps({"text": " ".join(map(str, text))}) for text in texts]
            (folder / f"{shard}.jsonl").write_text("\n".join(rows))
    state.wait_for_everyone()
    tokenizer = Tokenizer(WordLevel({str(word): word for word in range(VOCAB)}, "0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    every = state.num_processes == 1
    numbers = range(PROCESSES) if every else [state.process_index]
    found = [
        stream_text(str(folder), tokenizer, 0, HeldOut(20.0, 100), Share(i, PROCESSES), Order(5, 1)) for i in numbers
    ]
    parts: Any = [each.text for each in found]
    return replace(found[0], text=Together(parts) if every else parts[0])


def base() -> PreTrainedModel:
    """An odd hidden size: what is cut in two has unequal parts."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=18,
        intermediate_size=33,
        num_hidden_layers=2,
        num_attention_heads=3,
        vocab_size=VOCAB,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


def heads(_: Path, recipe: Recipe) -> Objective:
    words = torch.arange(0, VOCAB, 2)
    model = MultiTokenModel(base(), 3, draft_vocabulary=words, conditioned=True)
    return ModifiedCLM(model, recipe.shared_gradient_scale, recipe.freeze_base)


def cached(work: Path, recipe: Recipe) -> Objective:
    model = MultiTokenModel(base(), 3)
    return CachedHeads(model, *cache_states(model.base, streams(), recipe, work / "states"), "kl")


def joint(_: Path, recipe: Recipe) -> Objective:
    return JointCLM(CPModel(base(), n_tokens=3, rank=2), 0.01, recipe.freeze_base, recipe.shared_gradient_scale)


def look_ahead(_: Path, recipe: Recipe) -> Objective:
    return LookAheadCLM(LookAheadModel(base(), n_look_ahead=2), anchors=3, seed=recipe.seed)


@dataclass(frozen=True)
class Case:
    """A run, which one process does with the same recipe and nothing to save memory."""

    make: Callable[[Path, Recipe], Objective]
    changes: dict[str, Any] = field(default_factory=dict)
    memory: Memory = PLAIN
    tolerance: float = 1e-4
    streams: Callable[[Path], TokenStreams] = lambda _: streams()

    def run(self, work: Path, memory: Memory | None = None) -> Objective:
        """Train, or go on, as far as nobody interrupts."""
        AcceleratorState._reset_state()  # its precision is one for life otherwise
        recipe = replace(RECIPE, **self.changes)
        objective = self.make(work, recipe)
        loop.train(objective, self.streams(work), recipe, work, memory=self.memory if memory is None else memory)
        return objective


FROZEN = {"freeze_base": True}
UNCLIPPED = {"clip": 0.0}  # so that the optimizer's state tells how large gradients were
SHARDED = Memory(shard=True)
CASES = {
    "heads": Case(heads, UNCLIPPED),
    "frozen": Case(heads, FROZEN),
    "cached": Case(cached, FROZEN),
    "joint": Case(joint),
    "look-ahead": Case(look_ahead, FROZEN),
    "streamed": Case(heads, UNCLIPPED, streams=streamed),
    "bf16": Case(heads, {"precision": "bf16"}, tolerance=5e-3),
    "activations": Case(heads, memory=Memory(checkpoint_activations=True)),
    "sharded heads": Case(heads, UNCLIPPED, SHARDED),
    "sharded frozen": Case(heads, FROZEN, Memory(shard=True, checkpoint_activations=True)),
    "sharded joint": Case(joint, memory=Memory(shard=True, checkpoint_activations=True)),
    "sharded look-ahead": Case(look_ahead, FROZEN, SHARDED),
    "sharded bf16": Case(heads, {"precision": "bf16"}, SHARDED, tolerance=5e-3),
    "sharded muon": Case(heads, {"optimizer": "muon"}, SHARDED, tolerance=1e-3),
}
RESUMED = {name: CASES[name] for name in ("heads", "sharded heads")}
"""Begun by one process and ended by several, and the other way round."""


@contextmanager
def interrupted(process: int) -> Iterator[None]:
    """Ctrl-C comes to one process, in its second step."""
    calls = iter(range(1000))

    def interrupt(module: torch.nn.Module, _: object) -> None:
        own = RECIPE.sequences // RECIPE.micro_batch // processes().num_processes
        if isinstance(module, Objective) and next(calls) == own and processes().process_index == process:
            signal.raise_signal(signal.SIGINT)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(interrupt)
    try:
        with suppress(KeyboardInterrupt):
            yield
            raise AssertionError("nobody was interrupted")
    finally:
        handle.remove()


def shapes() -> dict[str, list[list[int]]]:
    """Of every parameter of a sharded model: the whole, and the part of this process."""
    objective = heads(Path(), RECIPE)
    spread.shard(objective, processes().device)
    parameters: dict[str, Any] = dict(objective.named_parameters())
    return {name: [list(each.shape), list(each.to_local().shape)] for name, each in parameters.items()}


def main(work: Path) -> None:
    state = processes()
    assert state.num_processes == PROCESSES
    for name, case in CASES.items():
        case.run(work / name)
    for name, case in RESUMED.items():
        case.run(work / f"up {name}")
        with interrupted(process=1):
            case.run(work / f"down {name}")
    with interrupted(process=0):
        CASES["streamed"].run(work / STOPPED)
    CASES["streamed"].run(work / STOPPED)
    found = shapes()
    if state.is_main_process:
        (work / SHAPES).write_text(json.dumps(found))
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
