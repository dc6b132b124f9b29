"""Damaged checkpoints: each becomes a right bundle, or one line and nothing on disk."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import checkpoints, damaged
from transformers import AutoModelForCausalLM

from dynamo_export import cli
from dynamo_model.checkpoint import load_base
from dynamo_runtime.bundle import load_bundle
from dynamo_runtime.session import Session
from dynamo_train.train import main as train

REFUSED = [name for name, fault in damaged.FAULTS.items() if fault.says is not None]
TAKEN = [name for name, fault in damaged.FAULTS.items() if fault.says is None]
TOKENS = [7, 250, 3, 91, 18, 200]


def complaint(output: str, program: str) -> str:
    """The one line of an error."""
    lines = [line for line in output.splitlines() if line.startswith(f"{program}: error:")]
    assert len(lines) == 1 and "Traceback" not in output
    return lines[0]


@pytest.mark.parametrize("fault", REFUSED)
def test_refused(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the export, in one line that names the fault."""
    folder = damaged.write(tmp_path / "checkpoint", fault)
    capsys.readouterr()
    assert cli.main(["-o", str(tmp_path / "out"), "-m", str(folder), "--heads", "0"]) == 1
    assert re.search(damaged.FAULTS[fault].says or "", complaint(capsys.readouterr().err, "dynamo-export"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("fault", ["saved compiled", "no output embedding", "gptq", "remote code", "not a number"])
def test_refused_before_training(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By training as well, before it has done anything."""
    folder = damaged.write(tmp_path / "checkpoint", fault)
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 400)
    arguments = ["heads", str(folder), "--data", str(text), "--out", str(tmp_path / "out"), "--steps", "1"]
    assert train(arguments) == 1
    assert re.search(damaged.FAULTS[fault].says or "", complaint(capsys.readouterr().err, "dynamo-train"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out-work").exists()
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("fault", TAKEN)
def test_taken_right(fault: str, tmp_path: Path) -> None:
    """The bundle says what a model with the weights as they should be says."""
    folder = damaged.write(tmp_path / "checkpoint", fault)
    sound = checkpoints.save_plain(tmp_path / "sound", checkpoints.CONFIGS["llama-grouped"])
    expected = AutoModelForCausalLM.from_pretrained(sound)
    expected.load_state_dict(damaged.FAULTS[fault].weights(load_file(sound / damaged.WEIGHTS)))
    assert cli.main(["-o", str(tmp_path / "out"), "-m", str(folder), "--heads", "0"]) == 0
    session = Session(load_bundle(tmp_path / "out", verify=True))
    with torch.no_grad():
        logits = expected(torch.tensor([TOKENS])).logits[0, -1].numpy()
    np.testing.assert_allclose(session.step(TOKENS).logits()[0], logits, atol=3e-5)


def test_adapter_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """Is merged into the base that it names, here by a path."""
    sound = checkpoints.save_plain(tmp_path / "base", checkpoints.CONFIGS["llama-grouped"])
    damaged.add_adapter(tmp_path / "adapter", str(sound))
    wanted = damaged.merged(load_file(sound / damaged.WEIGHTS))
    loaded = load_base(tmp_path / "adapter").state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.allclose(loaded[name], wanted[name], atol=1e-6) for name in wanted)
    damaged.add_adapter(tmp_path / "adapter", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"gone is not a folder"):
        load_base(tmp_path / "adapter")


def test_adapter_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is never dropped: the line says how to merge it."""
    sound = checkpoints.save_plain(tmp_path / "base", checkpoints.CONFIGS["llama-grouped"])
    damaged.add_adapter(sound, "somebody/another-base")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"merging it needs peft: pip install peft, or .*merge_and_unload"):
        load_base(sound)
