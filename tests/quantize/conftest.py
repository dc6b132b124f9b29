"""Tiny checkpoints of every kind, exported once a session without the parity gate, and smaller gates."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from support.once import make_once

from dynamo_export import cli, export_bundle
from dynamo_export import export as pipeline
from dynamo_export.source import load_model
from dynamo_graph.staging import Destination
from dynamo_quantize import Options, gates, quantize
from dynamo_quantize.schemes import resolve
from dynamo_runtime.bundle import Bundle, load_bundle

torch.set_num_threads(1)  # the models are so small that threads only wait for each other

# Checkpoints by kind: NeoX with serial (plain) and parallel (cp) residual, untied and with biases; Qwen2 (parallel) and
# Llama (lookahead), tied, the first with grouped attention and some biases. Two change their logits behind the output
# embedding: Gemma 2 (tied) caps them, Cohere (untied) scales them. The last two have heads that are conditioned on the
# token in front, over all words (tied) and over a draft vocabulary (untied).
EXPORTS = {"plain": "neox-partial-serial", "parallel": "qwen2", "cp": "cp-neox", "lookahead": "lookahead-llama-tied"}
EXPORTS |= {"capped": "gemma2", "scaled": "cp-cohere", "conditioned": "llama-linear-tied", "words": "neox"}
WORDS = checkpoints.WORDS
DRAFTING: dict[str, dict[str, Any]] = {"capped": {"draft_vocabulary": WORDS}, "conditioned": {"conditioned": True}}
DRAFTING |= {"words": {"draft_vocabulary": WORDS, "conditioned": True}}
HEADS = {"conditioned": 3}
SMALL_PEAK = 123_000_000


@dataclass(frozen=True)
class Exported:
    """A bundle in fp32 and where it came from."""

    name: str
    folder: Path
    checkpoint: Path
    heads: int | None

    @property
    def bundle(self) -> Bundle:
        """The bundle."""
        return load_bundle(self.folder)

    def model(self) -> torch.nn.Module:
        """The torch model, loaded anew."""
        base, drafter = load_model(self.checkpoint, self.heads)
        return base if drafter is None else drafter


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little text for calibration and gates, and no measurement of memory."""
    sizes = {"CALIBRATION_PIECES": 6, "CALIBRATION_TOKENS": 96, "TEXTS": 2, "TEXT_TOKENS": 48}
    sizes |= {"WIDTHS": 1, "WIDTH_TOKENS": 16, "PROMPTS": 2, "PROMPT_TOKENS": 8, "NEW_TOKENS": 8}
    for name, size in sizes.items():
        monkeypatch.setattr(quantize, name, size)
    monkeypatch.setattr(gates, "peak_memory", lambda folder: SMALL_PEAK)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of Python source code."""
    path = tmp_path_factory.mktemp("text") / "code.py"
    path.write_text("".join(f"def f{i}(x):\n    return x * {i} - {i * i % 97}\n\n" for i in range(300)))
    return path


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Callable[[str], Exported]:
    """The bundle of one of `EXPORTS`, made on first use; treat as read-only."""

    def get(name: str) -> Exported:
        folder = make_once(tmp_path_factory, f"quantize-{name}", lambda folder: _export(_exported(name, folder), text))
        return _exported(name, folder)

    return get


def _exported(name: str, folder: Path) -> Exported:
    return Exported(name, folder / "fp32", folder / "checkpoint", 0 if name == "plain" else None)


def _export(exported: Exported, text: Path) -> None:
    name, source = exported.name, EXPORTS[exported.name]
    if source in checkpoints.CONFIGS:
        config, heads, drafting = checkpoints.CONFIGS[source], HEADS.get(name, 2), DRAFTING.get(name, {})
        checkpoints.save_multi(exported.checkpoint, config, heads, **drafting)
        checkpoints.save_counts(exported.checkpoint)
    else:
        checkpoints.save_drafter(exported.checkpoint, source)
    with pytest.MonkeyPatch.context() as patch:
        if name == "plain":
            _by_command(exported, text, patch)
        else:  # parity is the matter of tests/export
            patch.setattr(pipeline.parity, "reference", lambda inspected, length: ([], []))
            export_bundle(exported.folder / "model.onnx", exported.checkpoint)


def _by_command(exported: Exported, text: Path, patch: pytest.MonkeyPatch) -> None:
    """Has the command export and quantize at once, and keeps the bundle in fp32 that passes from stage to stage."""
    second = pipeline.quantize_into

    def spied(destination: Destination, source: Path, *arguments: Any, **options: Any) -> Path:
        shutil.copytree(source, exported.folder)
        return second(destination, source, *arguments, **options)

    patch.setattr(pipeline, "quantize_into", spied)
    graph = exported.folder.parent / "command" / "out" / "small.onnx"
    arguments = [str(graph), "-m", str(exported.checkpoint), "--heads", "0", "--quantize", "int8"]
    assert cli.main([*arguments, "--calibration", str(text), "--gate-text", str(text)]) == 0


@pytest.fixture(scope="session")
def smaller(
    export: Callable[[str], Exported], tmp_path_factory: pytest.TempPathFactory, text: Path
) -> Callable[..., Bundle]:
    """`smaller(export name, scheme, **options)`: the bundle that `write_bundle` makes, made once; read-only."""
    made: dict[tuple[Any, ...], Bundle] = {}

    def get(name: str, scheme: str, **options: Any) -> Bundle:
        key = name, scheme, repr(sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("smaller")
            wanted = resolve(scheme, Options(**options))
            made[key] = quantize.write_bundle(export(name).bundle, wanted, folder, calibration=text)
        return made[key]

    return get
