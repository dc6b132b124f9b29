"""The parity gate must see every kind of damage; a gate that passes everything is worse than none."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import checkpoints

from dynamo_export import ExportError, export_bundle, parity
from dynamo_export import export as pipeline
from dynamo_export.graph import inspect
from dynamo_export.registry import exported
from dynamo_export.source import load_model
from dynamo_runtime.bundle import Bundle, list_files, load_bundle
from dynamo_runtime.names import PENULTIMATE

FolderOf = Callable[[str], Path]
CasesOf = Callable[[str], list[parity.Case]]
Damage = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def answers(checkpoint: FolderOf) -> CasesOf:
    """What torch says about the checkpoint of a name, asked on first use."""

    @cache
    def get(name: str) -> list[parity.Case]:
        inspected = inspect(exported(*load_model(checkpoint(name), None)), 96)
        return parity.reference(inspected, parity.DEFAULT_LENGTH)[0]

    return get


def attention(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The attention nodes, in the order of their caches."""
    found = [node for node in checkpoints.all_nodes(model.graph) if node.op_type == "GroupQueryAttention"]
    return sorted(found, key=lambda node: int(node.input[3].split(".")[1]))


def set_attribute(node: onnx.NodeProto, name: str, value: float) -> None:
    """Replaces one attribute."""
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def change(model: onnx.ModelProto, name: str, edit: Callable[[np.ndarray], None]) -> None:
    """Edits one initializer in place."""
    graphs = checkpoints.all_graphs(model.graph)
    tensor = next(i for graph in graphs for i in graph.initializer if i.name == name)
    array = onnx.numpy_helper.to_array(tensor).copy()
    edit(array)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))


def one_column_of_a_head(model: onnx.ModelProto) -> None:
    """A single weight column of the third head's feed-forward."""

    def edit(array: np.ndarray) -> None:
        array[:, 3] *= 1.2

    weights = [each for graph in checkpoints.all_graphs(model.graph) for each in graph.initializer]
    name = next(each.name for each in weights if re.fullmatch(r"heads\.1\.mlp\.(down_proj|fc2)\.weight", each.name))
    change(model, name, edit)


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
    """The layers of two heads read each other's past: exact in a prefill, wrong in every step after."""
    first, second = attention(model)
    for i in (3, 4):
        first.input[i], second.input[i] = second.input[i], first.input[i]


def swapped_heads(model: onnx.ModelProto) -> None:
    """The second and third head change places."""
    joined = next(node for node in model.graph.node if node.name == "/out/out_side_by_side")
    joined.input[0], joined.input[1] = joined.input[1], joined.input[0]


def topk_of_another_row(model: onnx.ModelProto) -> None:
    """Only the rows of top-K ids change their order."""
    for name, number in (("back", -1), ("begin", np.iinfo(np.int64).min), ("second", 1)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([number], np.int64), name))
    replaced_output(model, "topk_ids", "Slice", "back", "begin", "second", "back")


def penultimate_of_another_layer(model: onnx.ModelProto) -> None:
    """What is put out for the heads is not what they read."""
    embedded = next(node for node in model.graph.node if "input_ids" in node.input)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["penultimate" if name == PENULTIMATE else name for name in names]
    model.graph.node.append(onnx.helper.make_node("Identity", [embedded.output[0]], [PENULTIMATE]))


def condition_of_a_head(model: onnx.ModelProto) -> None:
    """A single weight column of the second condition, inside its branch."""

    def edit(array: np.ndarray) -> None:
        array[:, 3] *= 1.2

    change(model, "condition.1.out.weight", edit)


def swapped_conditions(model: onnx.ModelProto) -> None:
    """The two heads have each other's condition."""
    (choice,) = (node for node in model.graph.node if node.op_type == "If")
    one, other = choice.attribute
    one.name, other.name = other.name, one.name


def told_another_token(model: onnx.ModelProto) -> None:
    """Conditions hear of the token of the next row."""
    looked_up = next(node for node in model.graph.node if "previous_tokens" in node.input)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1], np.int64), "turned_by"))
    axes = [onnx.numpy_helper.from_array(np.array([at], np.int64), f"turned_{at}") for at in (0, 1)]
    model.graph.initializer.extend([axes[0], axes[1]])
    most = onnx.numpy_helper.from_array(np.array([np.iinfo(np.int64).max]), "turned_end")
    model.graph.initializer.append(most)
    nodes = [
        onnx.helper.make_node("Slice", ["previous_tokens", "turned_1", "turned_end", "turned_by"], ["turned_rest"]),
        onnx.helper.make_node("Slice", ["previous_tokens", "turned_0", "turned_by", "turned_by"], ["turned_first"]),
        onnx.helper.make_node("Concat", ["turned_rest", "turned_first"], ["turned"], axis=1),
    ]
    looked_up.input[list(looked_up.input).index("previous_tokens")] = "turned"
    for node in reversed(nodes):
        model.graph.node.insert(0, node)


def another_word(model: onnx.ModelProto) -> None:
    """One word of the draft vocabulary is taken for another."""

    def edit(array: np.ndarray) -> None:
        array[5] = (array[5] + 1) % checkpoints.VOCAB

    change(model, "draft_vocabulary", edit)


def row_of_the_draft_embedding(model: onnx.ModelProto) -> None:
    """One word's embedding, and only where it is drafted."""

    def edit(array: np.ndarray) -> None:
        array[:, 7] *= 1.2

    change(model, "draft.embedding.weight", edit)


def not_a_number(model: onnx.ModelProto) -> None:
    """One weight is NaN, which compares as neither larger nor smaller."""

    def edit(array: np.ndarray) -> None:
        array[0, 0] = np.nan

    change(model, "model.layers.0.mlp.gate_proj.weight", edit)


def gate_of_a_component(model: onnx.ModelProto) -> None:
    """One number in the gate's weight."""

    def edit(array: np.ndarray) -> None:
        array[5, 1] += 0.05

    change(model, "cp.gate.weight", edit)


def gate_not_normalised(model: onnx.ModelProto) -> None:
    """The gate puts out scores instead of log-probabilities."""
    node = next(node for node in checkpoints.all_nodes(model.graph) if node.op_type == "LogSoftmax")
    node.op_type = "Identity"
    del node.attribute[:]


def column_of_a_factor(model: onnx.ModelProto) -> None:
    """One column of the last factor's map."""

    def edit(array: np.ndarray) -> None:
        array[:, -1] *= 1.2

    change(model, "cp.factors.weight", edit)


def swapped_factors(model: onnx.ModelProto) -> None:
    """Token and component change places: p_2 of the first token is p_1 of the second."""

    def edit(array: np.ndarray) -> None:
        array[:] = array.reshape(64, 3, 3, 64).swapaxes(1, 2).reshape(64, -1)

    change(model, "cp.factors.weight", edit)


def replaced_output(model: onnx.ModelProto, name: str, op: str, *more: str) -> None:
    """Puts an operation before an output."""
    node = next(n for n in model.graph.node if name in n.output)
    node.output[list(node.output).index(name)] = f"{name}_before"
    model.graph.node.append(onnx.helper.make_node(op, [f"{name}_before", *more], [name]))


def top_ids(model: onnx.ModelProto) -> None:
    """The top-K ids are one too large."""
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1], np.int64), "out_one"))
    replaced_output(model, "topk_ids", "Add", "out_one")


def top_logits(model: onnx.ModelProto) -> None:
    """The top-K logits lose their fractions."""
    replaced_output(model, "topk_logits", "Floor")


def keys_for_values(model: onnx.ModelProto) -> None:
    """The only attention takes the keys of its past for values, and the other way round."""
    (only,) = attention(model)
    only.input[3], only.input[4] = only.input[4], only.input[3]


def last_look_ahead_row(model: onnx.ModelProto) -> None:
    """One number of the last look-ahead embedding."""

    def edit(array: np.ndarray) -> None:
        array[-1, 7] += 0.1

    change(model, "model.embed_tokens.weight", edit)


def swapped_look_ahead_rows(model: onnx.ModelProto) -> None:
    """The look-ahead embeddings in another order."""

    def edit(array: np.ndarray) -> None:
        array[checkpoints.VOCAB :] = array[checkpoints.VOCAB :][::-1].copy()

    change(model, "model.embed_tokens.weight", edit)


def logits_of_look_ahead(model: onnx.ModelProto) -> None:
    """The logits begin one token late and end with a look-ahead token's."""

    def edit(array: np.ndarray) -> None:
        array += 1

    change(model, "out_first", edit)
    change(model, "out_vocab", edit)


# Damage to a file, and the runs that have to notice it.
BASE, DRAFTER = "model.onnx", "drafter.onnx"
PARALLEL: list[tuple[str, Damage, set[str]]] = [
    (DRAFTER, one_column_of_a_head, {"prefill", "decode 1", "decode 4", "rollback 1", "skip 4", "chunks"}),
    (BASE, window_off_by_one, {"prefill", "decode 1"}),
    (DRAFTER, no_window_in_a_head, {"prefill", "decode 1", "skip 1"}),
    (BASE, late_rotary_entry, {"prefill", "decode 1"}),
    (DRAFTER, late_rotary_entry, {"prefill", "decode 1"}),
    (DRAFTER, keys_for_values, {"decode 1", "decode 2", "rollback 1", "skip 1"}),
    (DRAFTER, swapped_heads, {"prefill", "decode 1"}),
    (BASE, topk_of_another_row, {"prefill", "decode 4"}),
    (BASE, penultimate_of_another_layer, {"prefill", "decode 1", "skip 1", "skip 4"}),
]
CONDITIONED: list[tuple[str, Damage, set[str]]] = [
    (DRAFTER, one_column_of_a_head, {"prefill", "decode 1", "rollback 1", "skip 4", "chunks"}),
    (DRAFTER, swapped_caches, {"decode 1", "decode 2", "rollback 1", "skip 1"}),
    (DRAFTER, condition_of_a_head, {"prefill", "decode 1", "rollback 1", "skip 4", "chunks"}),
    (DRAFTER, swapped_conditions, {"prefill", "decode 1"}),
    (DRAFTER, told_another_token, {"prefill", "decode 2"}),
    (DRAFTER, another_word, {"prefill", "decode 1"}),
    (DRAFTER, row_of_the_draft_embedding, {"prefill", "decode 1", "rollback 1", "skip 4", "chunks"}),
]
JOINT: list[tuple[str, Damage, set[str]]] = [
    (DRAFTER, gate_of_a_component, {"prefill", "decode 1", "decode 4", "rollback 1", "chunks"}),
    (DRAFTER, gate_not_normalised, {"prefill", "decode 1"}),
    (DRAFTER, column_of_a_factor, {"prefill", "decode 1", "decode 4", "rollback 1", "skip 4", "chunks"}),
    (DRAFTER, swapped_factors, {"prefill", "decode 1"}),
    (DRAFTER, keys_for_values, {"decode 1", "decode 2", "rollback 1", "skip 1"}),
]
LOOK_AHEAD: list[tuple[str, Damage, set[str]]] = [
    (BASE, last_look_ahead_row, {"prefill", "decode 1", "decode 4", "rollback 1", "look-ahead", "chunks"}),
    (BASE, swapped_look_ahead_rows, {"prefill", "decode 1", "rollback 1", "look-ahead"}),
    (BASE, logits_of_look_ahead, {"prefill", "decode 1", "look-ahead"}),
]
KINDS = [("mistral-window", PARALLEL), ("phi", CONDITIONED), ("cp-neox", JOINT), ("lookahead-llama-tied", LOOK_AHEAD)]
DAMAGES = [
    pytest.param(name, file, damage, runs, id=f"{damage.__name__} of {name}, {file}")
    for name, damages in KINDS
    for file, damage, runs in damages
]


def damaged_copy(folder: Path, to: Path, file: str, damage: Damage) -> Bundle:
    """A copy of a bundle one of whose graphs is damaged and whose manifest says that it is not."""
    copy = to / "damaged"
    shutil.copytree(folder, copy)
    models = {name: onnx.load(copy / name) for name in load_bundle(folder).graphs}  # one may have the other's weights
    damage(models[file])
    for name, model in models.items():
        (copy / name).unlink()
        onnx.save(model, copy / name)
    bundle = replace(load_bundle(folder), folder=copy, files=list_files(copy))
    bundle.write_manifest()
    return load_bundle(copy)


@pytest.mark.parametrize(("name", "file", "damage", "runs"), DAMAGES)
def test_damage_is_seen(
    name: str, file: str, damage: Damage, runs: set[str], answers: CasesOf, bundle: FolderOf, tmp_path: Path
) -> None:
    """Every damage fails the gate, in the runs where it shows."""
    damaged = damaged_copy(bundle(name), tmp_path, file, damage)
    failed = {row.run for row in parity.gate(damaged, answers(name)) if not row.passed}
    assert runs <= failed


def test_what_is_no_number_is_seen_at_once(answers: CasesOf, bundle: FolderOf, tmp_path: Path) -> None:
    """Not by comparing: the bundle does not run."""
    damaged = damaged_copy(bundle("mistral-window"), tmp_path, BASE, not_a_number)
    with pytest.raises(ExportError, match=r"does not run: .* not finite numbers"):
        parity.gate(damaged, answers("mistral-window"))


@pytest.mark.parametrize("damage", [top_ids, top_logits])
def test_drafts_of_other_words_are_seen_at_once(
    damage: Damage, answers: CasesOf, bundle: FolderOf, tmp_path: Path
) -> None:
    damaged = damaged_copy(bundle("cp-neox"), tmp_path, DRAFTER, damage)
    with pytest.raises(ExportError, match=r"does not run: .* makes drafts of other words"):
        parity.gate(damaged, answers("cp-neox"))


@pytest.mark.parametrize(
    ("name", "outputs", "more"),
    [
        ("mistral-window", {"logits", "logits_2", "logits_3"}, {"skip 1", "skip 4"}),
        ("phi", {"logits", "logits_2", "logits_3"}, {"skip 1", "skip 4"}),
        ("cp-neox", {"logits", "gate", "factor_logits"}, {"skip 1", "skip 4"}),
        ("lookahead-llama-tied", {"logits"}, {"look-ahead"}),
    ],
)
def test_the_undamaged_bundle_passes(
    name: str, outputs: set[str], more: set[str], answers: CasesOf, bundle: FolderOf
) -> None:
    """The same comparison passes on the bundle as exported, with room to spare."""
    rows = parity.gate(load_bundle(bundle(name)), answers(name))
    assert all(row.passed for row in rows)
    assert max(row.difference / row.limit for row in rows) < 0.1
    assert {row.output for row in rows} == outputs
    assert {row.run for row in rows} == more | {
        *("prefill", "chunks"),
        *(f"decode {size}" for size in (1, 2, 3, 4)),
        *(f"rollback {size}" for size in (1, 2, 4)),
    }


def test_every_boundary_is_crossed(answers: CasesOf) -> None:
    """Compared positions lie on both sides of the window, and the last one of the context is among them."""
    cases = {case.name: case for case in answers("mistral-window")}
    window = cases["window 20"]
    assert window.start < 20 < len(window.tokens) - 1
    assert len(cases["context 96"].tokens) == 96


@pytest.mark.parametrize("name", checkpoints.LOOK_AHEAD)
def test_every_look_ahead_token_is_compared(name: str, answers: CasesOf) -> None:
    """All of them in order, in the middle of one sequence and at the end of the other, both times behind a token."""
    count = checkpoints.LOOK_AHEAD[name][1]
    ids = [*range(checkpoints.VOCAB, checkpoints.VOCAB + count)]
    for case in answers(name):
        assert case.start < case.fork < case.fork + count < len(case.tokens)
        assert case.tokens[case.fork : case.fork + count].tolist() == ids == case.other[-count:].tolist()
        assert (case.other[:-count] < checkpoints.VOCAB).all()


def test_failure_leaves_nothing(
    checkpoint: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A graph that fails the gate is a non-zero exit, one line, and no file."""
    from dynamo_export import cli

    write = pipeline.write_model

    def write_damaged(model, path, *more):  # type: ignore[no-untyped-def]
        files = write(model, path, *more)
        damaged = onnx.load(path)
        change(damaged, "model.layers.0.mlp.gate_proj.weight", lambda array: array.__imul__(1.01))
        path.unlink()
        onnx.save(damaged, path)
        return files

    monkeypatch.setattr(pipeline, "write_model", write_damaged)
    out = tmp_path / "out" / "model.onnx"
    assert cli.main([str(out), "-m", str(checkpoint("llama-grouped")), "--heads", "0"]) == 1
    captured = capsys.readouterr()
    assert "FAILED on logits" in captured.out
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("dynamo-export: error: the graph does not agree with the torch model")
    assert list(tmp_path.iterdir()) == []


def test_a_boundary_out_of_reach_is_not_skipped(checkpoint: FolderOf, tmp_path: Path) -> None:
    """A window that the gate may not cross is refused; the end of the context is reported as not run."""
    with pytest.raises(ExportError, match="cross window 20: allow it with --parity-length 36"):
        export_bundle(tmp_path / "out" / "model.onnx", checkpoint("mistral-window"), heads=0, parity_length=30)
    graph = export_bundle(tmp_path / "out" / "model.onnx", checkpoint("mistral-window"), heads=0, parity_length=40)
    assert checkpoints.read_report(graph.parent)["parity"]["not_run"] == ["context 96"]
