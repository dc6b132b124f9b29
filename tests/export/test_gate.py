"""The parity gate must see every kind of damage; a gate that passes everything is worse than none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import onnx
import pytest

from dynamo_export import ExportError, export_bundle, parity
from dynamo_export import export as pipeline
from dynamo_export.graph import Subject, inspect
from dynamo_export.source import load_model
from dynamo_runtime.bundle import load_bundle

FolderOf = Callable[[str], Path]
Damage = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def mistral(checkpoint: FolderOf) -> tuple[Subject, list[parity.Case]]:
    """A model with a sliding window and torch's answers about it."""
    subject = inspect(*load_model(checkpoint("mistral-window"), None), 96)
    return subject, parity.reference(subject, parity.DEFAULT_LENGTH)[0]


def attention(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The attention nodes, in order."""
    return [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]


def set_attribute(node: onnx.NodeProto, name: str, value: float) -> None:
    """Replaces one attribute."""
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def change(model: onnx.ModelProto, name: str, edit: Callable[[np.ndarray], None]) -> None:
    """Edits one initializer in place."""
    tensor = next(i for i in model.graph.initializer if i.name == name)
    array = onnx.numpy_helper.to_array(tensor).copy()
    edit(array)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))


def one_column_of_a_head(model: onnx.ModelProto) -> None:
    """A single weight column of the third head's feed-forward."""

    def edit(array: np.ndarray) -> None:
        array[:, 3] *= 1.2

    change(model, "heads.1.mlp.down_proj.weight", edit)


def window_off_by_one(model: onnx.ModelProto) -> None:
    """The window of one layer one key too wide."""
    set_attribute(attention(model)[0], "local_window_size", 21)


def no_window_in_a_head(model: onnx.ModelProto) -> None:
    """The last head forgets its window."""
    set_attribute(attention(model)[-1], "local_window_size", -1)


def late_rotary_entry(model: onnx.ModelProto) -> None:
    """The rotary table wrong at the very last position of the context only."""

    def edit(array: np.ndarray) -> None:
        array[-1] *= -1

    change(model, "cos_cache", edit)


def swapped_caches(model: onnx.ModelProto) -> None:
    """Two layers read each other's past: exact in a prefill, wrong in every step after."""
    first, second = attention(model)[2:4]
    for i in (3, 4):
        first.input[i], second.input[i] = second.input[i], first.input[i]


def swapped_heads(model: onnx.ModelProto) -> None:
    """The second and third head change places."""
    split = next(n for n in model.graph.node if n.op_type == "Split" and "logits_2" in n.output)
    split.output[1], split.output[2] = split.output[2], split.output[1]


def topk_of_another_head(model: onnx.ModelProto) -> None:
    """Only the top-K ids of two heads change places."""
    split = next(n for n in model.graph.node if n.op_type == "Split" and "topk_ids_2" in n.output)
    split.output[1], split.output[2] = split.output[2], split.output[1]


def not_a_number(model: onnx.ModelProto) -> None:
    """One weight is NaN, which compares as neither larger nor smaller."""

    def edit(array: np.ndarray) -> None:
        array[0, 0] = np.nan

    change(model, "model.layers.0.mlp.gate_proj.weight", edit)


# Damage, and the runs that have to notice it.
DAMAGES: list[tuple[Damage, set[str]]] = [
    (one_column_of_a_head, {"prefill", "decode 1", "decode 4", "rollback 1", "chunks"}),
    (window_off_by_one, {"prefill", "decode 1"}),
    (no_window_in_a_head, {"prefill", "decode 1"}),
    (late_rotary_entry, {"prefill", "decode 1"}),
    (swapped_caches, {"decode 1", "decode 2", "rollback 1"}),
    (swapped_heads, {"prefill", "decode 1"}),
    (topk_of_another_head, {"prefill", "decode 1"}),
    (not_a_number, {"prefill", "decode 1"}),
]


@pytest.mark.parametrize(("damage", "runs"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damage_is_seen(
    damage: Damage, runs: set[str], mistral: tuple[Subject, list[parity.Case]], bundle: FolderOf, tmp_path: Path
) -> None:
    """Every damage fails the gate, in the runs where it shows."""
    folder = tmp_path / "damaged"
    shutil.copytree(bundle("mistral-window"), folder)
    model = onnx.load(folder / "model.onnx")
    damage(model)
    (folder / "model.onnx").unlink()
    onnx.save(model, folder / "model.onnx")
    manifest = checkpoints.read_manifest(folder)
    manifest["files"]["model.onnx"]["bytes"] = (folder / "model.onnx").stat().st_size
    pipeline._write_json(folder / "dynamo_config.json", manifest)
    failed = {row.run for row in parity.gate(load_bundle(folder), mistral[1]) if not row.passed}
    assert runs <= failed


def test_the_undamaged_bundle_passes(mistral: tuple[Subject, list[parity.Case]], bundle: FolderOf) -> None:
    """The same comparison passes on the bundle as exported, with room to spare."""
    rows = parity.gate(load_bundle(bundle("mistral-window")), mistral[1])
    assert all(row.passed for row in rows)
    assert max(row.difference / row.limit for row in rows) < 0.1
    assert {row.head for row in rows} == {1, 2, 3}
    assert {row.run for row in rows} == {
        *("prefill", "chunks"),
        *(f"decode {size}" for size in (1, 2, 3, 4)),
        *(f"rollback {size}" for size in (1, 2, 4)),
    }


def test_every_boundary_is_crossed(mistral: tuple[Subject, list[parity.Case]]) -> None:
    """Compared positions lie on both sides of the window, and the last one of the context is among them."""
    cases = {case.name: case for case in mistral[1]}
    window = cases["window 20"]
    assert window.start < 20 < len(window.tokens) - 1
    assert len(cases["context 96"].tokens) == 96


def test_failure_leaves_nothing(
    checkpoint: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A graph that fails the gate is a non-zero exit, one line, and no file."""
    from dynamo_export import cli

    write = pipeline.write_model

    def write_damaged(model, path, external):  # type: ignore[no-untyped-def]
        files = write(model, path, external)
        damaged = onnx.load(path)
        change(damaged, "model.layers.0.mlp.gate_proj.weight", lambda array: array.__imul__(1.01))
        path.unlink()
        onnx.save(damaged, path)
        return files

    monkeypatch.setattr(pipeline, "write_model", write_damaged)
    out = tmp_path / "out" / "model.onnx"
    assert cli.main([str(out), "-m", str(checkpoint("llama-grouped"))]) == 1
    captured = capsys.readouterr()
    assert "FAILED on head" in captured.out
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("dynamo-export: error: the graph does not agree with the torch model")
    assert list(tmp_path.iterdir()) == []


def test_a_boundary_out_of_reach_is_not_skipped(checkpoint: FolderOf, tmp_path: Path) -> None:
    """A window that the gate may not cross is refused; the end of the context is reported as not run."""
    with pytest.raises(ExportError, match="cross window 20: allow it with --parity-length 36"):
        export_bundle(tmp_path / "out" / "model.onnx", checkpoint("mistral-window"), parity_length=30)
    graph = export_bundle(tmp_path / "out" / "model.onnx", checkpoint("mistral-window"), parity_length=40)
    assert checkpoints.read_manifest(graph.parent)["parity"]["not_run"] == ["context 96"]
