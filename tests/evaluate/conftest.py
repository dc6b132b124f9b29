"""One tiny checkpoint as bundles with and without heads, and made-up results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support import checkpoints, handmade
from support.once import make_once

from dynamo_export import export as pipeline
from dynamo_export import export_bundle
from dynamo_runtime import Engine

torch.set_num_threads(1)


@dataclass(frozen=True)
class Pair:
    """A checkpoint, and its bundles with three heads and with none but the first."""

    checkpoint: Path
    multi: Path
    plain: Path


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Bundles of a NeoX with three heads and random n-gram counts; parity is the matter of tests/export."""
    folder = make_once(tmp_path_factory, "pair", _export_pair)
    return Pair(folder / "checkpoint", folder / "multi", folder / "multi-plain")


def _export_pair(folder: Path) -> None:
    checkpoint = checkpoints.save_multi(folder / "checkpoint", checkpoints.CONFIGS["neox"], 3)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(names))
    handmade.random_counts(checkpoint / "cooccurrence.npz", checkpoints.VOCAB, 3, branching=80)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.parity, "reference", lambda inspected, length: ([], []))
        export_bundle(folder / "multi" / "model.onnx", checkpoint)
        export_bundle(folder / "multi-plain" / "model.onnx", checkpoint, heads=0)


@pytest.fixture(scope="session")
def engines(pair: Pair) -> tuple[Engine, Engine]:
    """Engines on both bundles."""
    return Engine(pair.multi, provider="cpu", threads=1), Engine(pair.plain, provider="cpu", threads=1)
