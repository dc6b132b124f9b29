"""Joint heads and look-ahead embeddings: what is exported is what torch computes, and what the command says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support import checkpoints

from dynamo_export import ExportError, cli, export_bundle
from dynamo_export.source import load_model
from dynamo_model import CPModel, LookAheadModel, MultiTokenModel
from dynamo_runtime.bundle import load_bundle
from dynamo_runtime.errors import PromptError
from dynamo_runtime.joint import JointHead
from dynamo_runtime.look_ahead import LookAhead
from dynamo_runtime.session import Session
from dynamo_runtime.step import ALL, At, Last

FolderOf = Callable[[str], Path]
VOCAB = checkpoints.VOCAB
TOKENS = [7, 250, 3, 91, 18, 300, 42, 5]


def weights_like_embeddings(folder: Path) -> list[list[int]]:
    """Sizes of the weights as large as a vocabulary."""
    graph = onnx.load(folder / "model.onnx").graph
    return sorted(
        sorted(i.dims) for i in graph.initializer if len(i.dims) == 2 and max(i.dims) in range(VOCAB, VOCAB + 9)
    )


@pytest.mark.parametrize("name", checkpoints.JOINT)
def test_joint_head(name: str, bundle: FolderOf, checkpoint: FolderOf) -> None:
    """Gate and every factor at several rows, a rolled-back token before them, are `CPModel.forward`'s."""
    _, n_tokens, rank = checkpoints.JOINT[name]
    folder = bundle(name)
    parity = checkpoints.read_report(folder)["parity"]
    assert parity["passed"]
    assert {row["output"] for row in parity["rows"]} == {"logits", "gate", "factor_logits"}
    loaded = load_bundle(folder, verify=True)
    joint = JointHead(n_tokens, rank)
    assert (loaded.topology, loaded.kv_layers, loaded.vocab_size) == (joint, 2, VOCAB)
    assert loaded.has_cooccurrence
    session = Session(loaded)
    session.step([*TOKENS[:4], 11])
    session.cache.rollback(4)
    rows = [2, 0, -1]
    step = session.step(TOKENS[4:], rows=Last(2), heads=At(rows))
    with torch.no_grad():
        logits, log_w, factors = (x[0, 4:].numpy() for x in CPModel.load(checkpoint(name))(torch.tensor([TOKENS])))
    np.testing.assert_allclose(step.logits(), logits[-2:], atol=3e-5)
    ahead = step.ahead()
    np.testing.assert_allclose(joint.gate(ahead), log_w[rows], atol=3e-5)
    np.testing.assert_allclose(np.exp(joint.gate(ahead)).sum(-1), 1, atol=1e-6)
    found = joint.factors(ahead)
    assert found.shape == (3, n_tokens, rank, VOCAB)
    np.testing.assert_allclose(found, factors[rows], atol=3e-5)
    values, ids = joint.factor_topk(ahead)
    assert values.shape == ids.shape == (3, n_tokens, rank, 64) and ids.dtype == np.int64
    np.testing.assert_array_equal(values, -np.sort(-found)[..., :64])
    np.testing.assert_array_equal(np.take_along_axis(found, ids, -1), values)
    last = session.step([9])
    assert joint.gate(last.ahead()).shape == (1, rank)


def test_joint_graph(bundle: FolderOf) -> None:
    """Rows are chosen before the context layer's projection; factors share the base's embedding, written once."""
    folder = bundle("cp-llama-tied")
    graph = onnx.load(folder / "drafter.onnx", load_external_data=False).graph
    made_by = {name: node for node in graph.node for name in node.output}
    projection = next(n for n in graph.node if any("heads.0.self_attn.o_proj" in name for name in n.input))
    assert list(made_by[projection.input[0]].input)[1] == "head_rows"
    assert [n.op_type for n in graph.node if n.name == "/out/out_product"] == ["FusedMatMul"]
    assert weights_like_embeddings(folder) == [[64, VOCAB]]
    shared = {i.name: {e.key: e.value for e in i.external_data} for i in graph.initializer if i.external_data}
    assert {place["location"] for place in shared.values()} == {"model.onnx"}
    assert "model.embed_tokens.weight" in shared
    factors = [list(i.dims) for i in graph.initializer if i.name.startswith("cp.factors")]
    assert factors == [[64, 2 * 3 * 64]]


@pytest.mark.parametrize("name", checkpoints.LOOK_AHEAD)
def test_look_ahead(name: str, bundle: FolderOf, checkpoint: FolderOf) -> None:
    """Looking ahead, rolling back and looking ahead again is `LookAheadModel.forward`; no logit is about the ids."""
    config, count = checkpoints.LOOK_AHEAD[name]
    folder = bundle(name)
    assert {row["run"] for row in checkpoints.read_report(folder)["parity"]["rows"]} >= {
        "prefill",
        "look-ahead",
        f"decode {count + 2}",
    }
    tied = checkpoints.CONFIGS[config].tie_word_embeddings
    assert weights_like_embeddings(folder) == [[64, VOCAB]] * (not tied) + [[64, VOCAB + count]]
    loaded = load_bundle(folder, verify=True)
    assert (loaded.topology, loaded.kv_layers, loaded.vocab_size) == (LookAhead(count), 2, VOCAB)
    assert loaded.has_cooccurrence and loaded.tokenizer.encode("def").ids
    ids = [*loaded.look_ahead]
    assert ids == [*range(VOCAB, VOCAB + count)]
    model = LookAheadModel.load(checkpoint(name))
    session = Session(loaded)
    for known, upto in ((0, 5), (5, 8)):
        session.cache.rollback(known)
        step = session.step([*TOKENS[known:upto], *ids], rows=ALL)
        with torch.no_grad():
            theirs = model(torch.tensor([[*TOKENS[:upto], *ids]]))[0, known:].numpy()
        assert step.logits().shape == (upto - known + count, VOCAB)
        np.testing.assert_allclose(step.logits(), theirs, atol=3e-5)
        assert step.topk()[1].max() < VOCAB
    with pytest.raises(PromptError, match=f"token ids must be from 0 to {VOCAB + count - 1}"):
        session.step([VOCAB + count])


def test_the_drafters_graph_has_a_name_of_its_own(checkpoint: FolderOf, tmp_path: Path) -> None:
    """Which the base's cannot have."""
    with pytest.raises(ExportError, match=r"drafter\.onnx is what the graph of further heads is called"):
        export_bundle(tmp_path / "out" / "drafter.onnx", checkpoint("cp-llama"))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def everything(checkpoint: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One base with all three drafters."""
    folder = tmp_path_factory.mktemp("everything") / "checkpoint"
    shutil.copytree(checkpoint("neox"), folder)
    for name in ("cp", "lookahead"):
        shutil.copyfile(checkpoint(f"{name}-neox") / f"{name}.safetensors", folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("absent", "heads", "kind", "expected"),
    [
        ([], None, None, MultiTokenModel),
        ([], 2, None, MultiTokenModel),
        ([], 2, "parallel", MultiTokenModel),
        ([], None, "cp", CPModel),
        ([], None, "lookahead", LookAheadModel),
        ([], 0, None, type(None)),
        ([], 0, "cp", type(None)),
        (["heads", "lookahead"], None, None, CPModel),
        (["heads", "cp"], None, None, LookAheadModel),
        (["heads"], 0, None, type(None)),
    ],
)
def test_which_drafter(
    absent: list[str], heads: int | None, kind: str | None, expected: type, everything: Path, tmp_path: Path
) -> None:
    """The one asked for; parallel heads where there are any, else the only one there is."""
    folder = without(everything, tmp_path, absent)
    _, drafter = load_model(folder, heads, kind)
    assert type(drafter) is expected
    assert heads is None or not isinstance(drafter, MultiTokenModel) or drafter.n_heads == heads


def without(everything: Path, to: Path, absent: list[str]) -> Path:
    """A copy that lacks some drafters."""
    folder = to / "checkpoint"
    shutil.copytree(everything, folder)
    for name in absent:
        (folder / f"{name}.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    ("absent", "arguments", "complaint"),
    [
        ([], ["--drafter", "cp", "--heads", "2"], "--heads 2 means parallel heads: leave it out with --drafter cp"),
        (["cp"], ["--drafter", "cp"], "has no cp drafter, only parallel and lookahead: train it first with"),
        (["heads", "cp"], ["--heads", "2"], "has no parallel drafter, only lookahead: train it first with"),
        (["heads"], [], "has the drafters cp and lookahead: choose one with --drafter"),
        (["heads", "cp", "lookahead"], ["--drafter", "cp"], "has no cp drafter, nor any other"),
        (["heads", "cp", "lookahead"], [], "is a plain base model without token heads"),
        ([], ["--drafter", "lookahead", "--context-length", "2"], "--context-length must be 3 to 96, not 2"),
    ],
)
def test_bad_choice(
    absent: list[str],
    arguments: list[str],
    complaint: str,
    everything: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that says what is there, and no file."""
    folder = without(everything, tmp_path, absent)
    capsys.readouterr()
    assert cli.main([str(tmp_path / "out" / "model.onnx"), "-m", str(folder), *arguments]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dynamo-export: error:")]
    assert len(errors) == 1 and complaint in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_unknown_drafter(everything: Path, tmp_path: Path) -> None:
    """A name that is none."""
    with pytest.raises(ExportError, match="--drafter must be one of parallel, cp, lookahead, not medusa"):
        export_bundle(tmp_path / "model.onnx", everything, drafter="medusa")


def test_command_with_a_short_context(everything: Path, tmp_path: Path) -> None:
    """The option reaches the export; a context with no room but for one token and the look-ahead is still gated."""
    arguments = ["-m", str(everything), "--drafter", "lookahead", "--context-length", "3"]
    assert cli.main([str(tmp_path / "model.onnx"), *arguments]) == 0
    bundle = load_bundle(tmp_path)
    assert (bundle.topology, bundle.context_length) == (LookAhead(1), 3)


def test_joint_head_of_another_size(everything: Path, tmp_path: Path) -> None:
    """Tensors that do not fit the base are one line."""
    folder = without(everything, tmp_path, [])
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = load_file(folder / "cp.safetensors")
    tensors["gate.weight"] = tensors["gate.weight"][:2].clone()
    save_file(tensors, folder / "cp.safetensors", metadata={"kind": "cp", "n_tokens": "3", "rank": "3"})
    with pytest.raises(ExportError, match=r"cp\.safetensors does not fit"):
        export_bundle(tmp_path / "out" / "model.onnx", folder, drafter="cp")
