"""What an export may touch, and what it says when it cannot go on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints
from tokenizers import Tokenizer, models

from dynamo_export import cli, export_bundle, parity, source
from dynamo_graph.errors import WriteError
from dynamo_runtime.bundle import load_bundle
from dynamo_runtime.parallel import ParallelHeads
from dynamo_runtime.topology import Plain

FolderOf = Callable[[str], Path]
pytestmark = pytest.mark.usefixtures("built_once")  # all of it of one model, whose graph is tested elsewhere


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_overwrite_rules(checkpoint: FolderOf, tmp_path: Path) -> None:
    """Refuse first; then replace the whole folder, and only if all in it was ours."""
    model = checkpoint("neox")
    out = tmp_path / "out"
    export_bundle(out / "model.onnx", model, heads=2, external_data=True)
    assert (out / "model.onnx.data").is_file()
    load_bundle(out, verify=True)
    before = contents(out)
    with pytest.raises(WriteError, match="already exists: pass --overwrite"):
        export_bundle(out / "model.onnx", model)
    with pytest.raises(WriteError, match=r"already holds the bundle model\.onnx"):
        export_bundle(out / "other.onnx", model, overwrite=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(WriteError, match=r"notes\.txt was not written by an earlier export"):
        export_bundle(out / "model.onnx", model, overwrite=True)
    assert contents(out) == before | {"notes.txt": b"mine"}
    (out / "notes.txt").unlink()
    export_bundle(out / "model.onnx", model, overwrite=True)
    assert load_bundle(out, verify=True).topology == ParallelHeads(3)
    assert sorted(path.name for path in out.iterdir()) == sorted({*before} - {"model.onnx.data", "drafter.onnx.data"})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "report.json", "notes.txt"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_are_not_touched(name: str, overwrite: bool, checkpoint: FolderOf, tmp_path: Path) -> None:
    """A file that no earlier export wrote is in the way, with --overwrite too."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(WriteError, match=f"{name} was not written by an earlier export"):
        export_bundle(tmp_path / "model.onnx", checkpoint("neox"), overwrite=overwrite)
    assert contents(tmp_path) == {name: b"mine"}


def test_a_file_that_appears_meanwhile_is_not_touched(
    checkpoint: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is repeated when the bundle moves in."""
    gate = parity.gate
    out = tmp_path / "out"
    out.mkdir()

    def gate_and_write(*arguments):  # type: ignore[no-untyped-def]
        (out / "config.json").write_text("mine")
        return gate(*arguments)

    monkeypatch.setattr(parity, "gate", gate_and_write)
    with pytest.raises(WriteError, match=r"config\.json was not written by an earlier export"):
        export_bundle(out / "model.onnx", checkpoint("neox"))
    assert contents(out) == {"config.json": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_embedded_default_into_the_current_folder(
    checkpoint: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dynamo-export model.onnx` makes the current folder the bundle; counts come along."""
    default = tmp_path / "default"
    checkpoints.save_multi(default, checkpoints.CONFIGS["neox"])
    checkpoints.save_counts(default)
    monkeypatch.setattr(source, "DEFAULT_CHECKPOINT", default)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert cli.main(["model.onnx"]) == 0
    bundle = load_bundle(here / "model.onnx", verify=True)
    assert bundle.has_cooccurrence and bundle.tokenizer.encode("def").ids


@pytest.mark.parametrize(("output", "graph"), [("out", "model.onnx"), ("out/small.onnx", "small.onnx")])
def test_output_by_its_folder(output: str, graph: str, checkpoint: FolderOf, tmp_path: Path) -> None:
    """`-o FOLDER` is the folder of the bundle."""
    assert cli.main(["-m", str(checkpoint("neox")), "-o", str(tmp_path / output), "--heads", "0"]) == 0
    assert load_bundle(tmp_path / "out", verify=True).graph == graph


def test_at_most_one_output(capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and argparse's exit status."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["m.onnx", "-o", "out"])
    assert ended.value.code == 2
    assert "not allowed with" in capsys.readouterr().err.splitlines()[-1]


def test_an_output_is_wanted(checkpoint: FolderOf, capsys: pytest.CaptureFixture[str]) -> None:
    """Only a model known by name has a place of its own."""
    for arguments in ([], ["-m", str(checkpoint("neox"))]):
        assert cli.main(arguments) == 1
        assert "name the bundle's folder with -o FOLDER" in capsys.readouterr().err.splitlines()[-1]


def _plain(folder: Path) -> Path:
    return checkpoints.save_plain(folder / "checkpoint", checkpoints.CONFIGS["neox"])


def _no_config(folder: Path) -> Path:
    (folder / "checkpoint").mkdir()
    return folder / "checkpoint"


def _no_such_folder(folder: Path) -> Path:
    return folder / "absent"


def _truncated_weights(folder: Path) -> Path:
    made = checkpoints.save_multi(folder / "checkpoint", checkpoints.CONFIGS["neox"])
    weights = made / "heads.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return made


def _missing_head(folder: Path) -> Path:
    made = checkpoints.save_multi(folder / "checkpoint", checkpoints.CONFIGS["neox"])
    tensors = {k: v for k, v in load_file(made / "heads.safetensors").items() if not k.startswith("3.")}
    save_file(tensors, made / "heads.safetensors", metadata={"kind": "parallel", "n_heads": "3"})
    return made


def _foreign_tokenizer(folder: Path) -> Path:
    made = checkpoints.save_multi(folder / "checkpoint", checkpoints.CONFIGS["neox"])
    words = {f"w{i}": i for i in range(checkpoints.VOCAB + 1)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(made / "tokenizer.json"))
    return made


def _no_tokenizer(folder: Path) -> Path:
    made = checkpoints.save_multi(folder / "checkpoint", checkpoints.CONFIGS["neox"])
    (made / "tokenizer.json").unlink()
    (made / "tokenizer_config.json").unlink()
    return made


def _bad_sampling(folder: Path) -> Path:
    made = checkpoints.save_multi(folder / "checkpoint", checkpoints.CONFIGS["neox"])
    (made / "generation_config.json").write_text(json.dumps({"backoff_threshold": 3.0}))
    return made


BAD_CHECKPOINTS = [
    (_plain, "is a plain base model without token heads: train them first with `dynamo-train heads`"),
    (_no_config, "is not a checkpoint: it has no config.json"),
    (_no_such_folder, "is not a folder"),
    (_truncated_weights, "is not a readable safetensors file"),
    (_missing_head, "does not fit"),
    (_foreign_tokenizer, "does not match the model: it has token 320"),
    (_no_tokenizer, "has no tokenizer.json"),
    (_bad_sampling, "generation_config.json: "),
]


@pytest.mark.parametrize(("make", "complaint"), BAD_CHECKPOINTS, ids=[m.__name__ for m, _ in BAD_CHECKPOINTS])
def test_bad_checkpoints(
    make: Callable[[Path], Path], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on stderr, a non-zero exit, no file."""
    checkpoint = make(tmp_path)
    capsys.readouterr()
    assert cli.main([str(tmp_path / "out" / "model.onnx"), "-m", str(checkpoint)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dynamo-export: error:")]
    assert len(errors) == 1 and complaint in errors[0]
    assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint"}


def test_hub_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub id that is not cached and cannot be fetched is one line."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WriteError, match="is not a folder here, and the Hugging Face Hub cannot be reached"):
        export_bundle(tmp_path / "out" / "model.onnx", "nobody/no-such-model")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--heads", "1"], "--heads must be 0 .* or 2 to 3 here, not 1"),
        (["--heads", "4"], "--heads must be 0 .* or 2 to 3 here, not 4"),
        (["--context-length", "97"], "--context-length must be 2 to 96, not 97"),
        (["--context-length", "0"], "--context-length must be 2 to 96, not 0"),
    ],
)
def test_bad_arguments(
    arguments: list[str], complaint: str, checkpoint: FolderOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers out of range are refused before the work begins."""
    out = tmp_path / "model.onnx"
    assert cli.main([str(out), "-m", str(checkpoint("neox")), *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(complaint, error)
    assert contents(tmp_path) == {}


def test_output_must_be_an_onnx_file(tmp_path: Path) -> None:
    """A folder as the output is a likely slip."""
    with pytest.raises(WriteError, match=r"the output must be an \.onnx file"):
        export_bundle(tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="is a file, not a folder"):
        export_bundle(tmp_path / "file" / "model.onnx")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_output(tmp_path: Path) -> None:
    """Said before the work begins."""
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(WriteError, match="cannot write to"):
        export_bundle(tmp_path / "locked" / "model.onnx")


def test_optimum_command(checkpoint: FolderOf, tmp_path: Path) -> None:
    """`optimum-cli export dynamo` is the same command, and its errors are its own."""
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "dynamo"]
    out = tmp_path / "out" / "model.onnx"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(out), "-m", str(checkpoint("neox")), "--heads", "0"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert load_bundle(out, verify=True).topology == Plain()
    again = subprocess.run(
        [*command, str(out), "-m", str(checkpoint("neox"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].startswith("optimum-cli export dynamo: error: ")


def test_optimum_starts_without_torch() -> None:
    """Registering the command costs the other commands of optimum-cli nothing."""
    code = (
        "import sys; from optimum.commands.register import register_dynamo; from argparse import ArgumentParser;"
        "register_dynamo.DynamoExportCommand.parse_args(ArgumentParser());"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules), 'heavy imports'"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_torch_threads_are_left_alone() -> None:
    """Exporting changes no global setting of torch (conftest set one thread)."""
    assert torch.get_num_threads() == 1
