"""`dynamo-train` from text to a multi-token checkpoint, on a tiny corpus."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import save_plain
from support.refused import REFUSED
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

from dynamo_model import CPModel, LookAheadModel, MultiTokenModel
from dynamo_train.pipeline import convert
from dynamo_train.train import main

SMALL = ["--steps", "2", "--sequences", "2", "--length", "16", "--micro-batch", "2"]

_STEPS = "2 steps, of 2 × 16 tokens (0.0 epochs), adamw, no autocast"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        body = "\n".join(f"def function_{i}_{j}(value):\n    return value + {j}\n" for j in range(6))
        (folder / f"module{i}.py").write_text(body)
    return folder


@pytest.fixture(scope="module")
def data(corpus: Path) -> list[str]:
    """The arguments that name the corpus."""
    return ["--data", str(corpus), "--held-out-percent", "20"]


@pytest.fixture(scope="module")
def base(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "base"
    shape = ["--hidden-size", "32", "--layers", "2", "--attention-heads", "2", "--vocab-size", "300"]
    arguments = ["base", *data, "--out", str(out), "--context-length", "64", *shape, *SMALL]
    assert main(arguments) == 0
    return out


def test_base_is_an_ordinary_hf_model(base: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    text = "def é(x): return '☃'"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    assert model(ids).logits.shape[-1] == 300
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0


def test_heads_and_counts_on_a_base(base: Path, data: list[str], tmp_path: Path) -> None:
    out = tmp_path / "t3"
    assert main(["heads", str(base), *data, "--out", str(out), "--freeze-base", *SMALL]) == 0
    assert main(["counts", str(out), *data, "--min-counts", "1,1,1"]) == 0
    model = MultiTokenModel.load(out)
    assert model.n_heads == 3
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.base.state_dict().items())
    record = json.loads((out / "training.json").read_text())
    assert set(record) == {"base", "heads"} and set(record["heads"]["figures"]) >= {
        "ppl_1",
        "ppl_3",
        "ppl_1:3",
    }
    with np.load(out / "cooccurrence.npz") as counts:
        assert counts["totals"][0] == record["heads"]["corpus"]["train_tokens"]
    if find_spec("duckdb"):
        in_memory = (out / "cooccurrence.npz").read_bytes()
        (out / "cooccurrence.npz").unlink()
        assert main(["counts", str(out), *data, "--min-counts", "1,1,1", "--engine", "duckdb"]) == 0
        assert (out / "cooccurrence.npz").read_bytes() == in_memory


def test_settings_of_another_engine(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["counts", str(tmp_path), *data, "--engine", "duckdb", "--master", "local[2]"]) == 1
    assert "give --engine spark" in capsys.readouterr().err


def test_a_frozen_bf16_base_stays_bf16(base: Path, data: list[str], tmp_path: Path) -> None:
    """Training computes in fp32, and what it did not touch is written as it was, bit by bit."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    half = tmp_path / "bf16"
    model.to(torch.bfloat16).save_pretrained(half)
    tokenizer.save_pretrained(half)
    assert main(["heads", str(half), *data, "--out", str(tmp_path / "t3"), "--freeze-base", *SMALL]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (half, tmp_path / "t3"))
    assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "t3" / "config.json").read_text())["dtype"] == "bfloat16"


def test_drafters_gather_beside_a_frozen_base(base: Path, data: list[str], tmp_path: Path) -> None:
    """heads, then a joint head, then look-ahead embeddings: one folder holds all, and the base as it was."""
    heads, joint, whole = tmp_path / "heads", tmp_path / "joint", tmp_path / "whole"
    assert main(["heads", str(base), *data, "--out", str(heads), "--freeze-base", *SMALL]) == 0
    assert main(["counts", str(heads), *data, "--min-counts", "1,1,1"]) == 0
    size = ["--tokens", "3", "--rank", "2", "--balance", "0.5"]
    assert main(["cp", str(heads), *data, "--out", str(joint), "--freeze-base", *size, *SMALL]) == 0
    assert main(["lookahead", str(joint), *data, "--out", str(whole), "--tokens", "2", "--anchors", "5", *SMALL]) == 0

    for earlier, file in ((heads, "heads"), (joint, "cp")):
        assert (whole / f"{file}.safetensors").read_bytes() == (earlier / f"{file}.safetensors").read_bytes()
    assert (whole / "cooccurrence.npz").read_bytes() == (heads / "cooccurrence.npz").read_bytes()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for model in (MultiTokenModel.load(whole), CPModel.load(whole), LookAheadModel.load(whole)):
        assert all(torch.equal(before[name], tensor) for name, tensor in model.base.state_dict().items())
    record = json.loads((whole / "training.json").read_text())
    assert list(record) == ["base", "heads", "cp", "lookahead"]
    assert [record["cp"][key] for key in ("n_tokens", "rank", "balance", "steps")] == [3, 2, 0.5, 2]
    assert [record["lookahead"][key] for key in ("n_look_ahead", "anchors", "steps")] == [2, 5, 2]
    assert set(record["cp"]["figures"]) == {"ppl_1", "gate_min", "ppl_1:2", "ppl_1:3"}
    assert set(record["lookahead"]["figures"]) == {"ppl_2", "ppl_3", "ppl_2:3"}
    assert record["cp"]["recipe"]["freeze_base"] and record["lookahead"]["recipe"]["freeze_base"]

    assert main(["card", str(whole), *data]) == 0
    card = (whole / "README.md").read_text()
    assert f"Joint head (CP): rank 2 over 3 tokens, load balance 0.5; {_STEPS}, base frozen; held out: PPL 1 " in card
    assert (
        f"Look-ahead embeddings (PaSS): 2, at 5 positions a sequence; {_STEPS}, base frozen; held out: PPL 2 " in card
    )

    convert(whole, tmp_path / "half", torch.float16)
    small = CPModel.load(tmp_path / "half", torch.float16)
    assert torch.equal(small.factors.weight, CPModel.load(whole).factors.weight.half())
    assert (tmp_path / "half" / "cp.safetensors").stat().st_size < 0.6 * (whole / "cp.safetensors").stat().st_size
    for file in ("heads.safetensors", "lookahead.safetensors", "cooccurrence.npz", "tokenizer.json", "training.json"):
        assert (tmp_path / "half" / file).is_file()


def test_packed(base: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drafters at 8 bits, counts and record, and no base; what holds no drafter, or a folder that is there, is not."""
    heads, packed = tmp_path / "heads", tmp_path / "packed"
    assert main(["heads", str(base), *data, "--out", str(heads), "--freeze-base", *SMALL]) == 0
    assert main(["counts", str(heads), *data, "--min-counts", "1,1,1"]) == 0
    assert main(["pack", str(heads), "--out", str(packed)]) == 0
    assert sorted(path.name for path in packed.iterdir()) == ["cooccurrence.npz", "heads.safetensors", "training.json"]
    assert (packed / "training.json").read_bytes() == (heads / "training.json").read_bytes()
    trained, stored = MultiTokenModel.read(heads), MultiTokenModel.read(packed)
    assert stored[1] == trained[1] and stored[0].keys() == trained[0].keys()
    for name, tensor in stored[0].items():
        torch.testing.assert_close(tensor, trained[0][name], atol=float(tensor.abs().max()) / 128, rtol=0)
    assert load_file(packed / "heads.safetensors")["2.mlp.dense_h_to_4h.weight"].dtype == torch.int8
    capsys.readouterr()
    for arguments, says in (((base, tmp_path / "new"), "is not a multi-token"), ((heads, packed), "is not empty")):
        assert main(["pack", str(arguments[0]), "--out", str(arguments[1])]) == 1
        errors = capsys.readouterr().err.strip()
        assert errors.startswith("dynamo-train: error: ") and says in errors and "\n" not in errors
    assert not (tmp_path / "new").exists()


def test_a_trained_base_leaves_the_drafters_of_the_old_one_behind(base: Path, data: list[str], tmp_path: Path) -> None:
    heads, out = tmp_path / "heads", tmp_path / "joint"
    assert main(["heads", str(base), *data, "--out", str(heads), "--freeze-base", *SMALL]) == 0
    assert main(["cp", str(heads), *data, "--out", str(out), "--lr-base", "1e-2", *SMALL]) == 0
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert not any(torch.equal(before[name], tensor) for name, tensor in CPModel.load(out).base.named_parameters())
    assert not (out / "heads.safetensors").exists()
    assert json.loads((out / "training.json").read_text())["cp"]["recipe"]["base_lr"] == 1e-2


def test_look_ahead_embeddings_need_a_base_that_sees_the_whole_text(
    base: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "mistral")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = MistralConfig(**size, **heads, sliding_window=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mistral")
    data = [*data, "--out", str(tmp_path / "out")]
    assert main(["lookahead", str(tmp_path / "mistral"), *data, *SMALL]) == 1
    assert "attends to 8 tokens at a time" in capsys.readouterr().err.strip().splitlines()[-1]
    assert main(["lookahead", str(tmp_path / "mistral"), *data, *SMALL, "--length", "8"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cp", "NOWHERE", "--data", "CORPUS", "--out", "OUT", *SMALL], "is not a folder"),
        (["cp", "BASE", "--data", "CORPUS", "--out", "OUT", *SMALL, "--rank", "33"], "rank of a joint head is 1 to 32"),
        (["cp", "BASE", "--data", "CORPUS", "--out", "OUT", *SMALL, "--tokens", "1"], "2 to 8 tokens"),
        (["cp", "BASE", "--data", "CORPUS", "--out", "OUT", *SMALL, "--length", "65"], "do not fit"),
        (["lookahead", "NOWHERE", "--data", "CORPUS", "--out", "OUT", *SMALL], "is not a folder"),
        (["lookahead", "BASE", "--data", "CORPUS", "--out", "BASE", *SMALL], "not empty"),
        (["lookahead", "BASE", "--data", "CORPUS", "--out", "OUT", *SMALL, "--tokens", "17"], "1 to 16 look-ahead"),
        (["lookahead", "BASE", "--data", "CORPUS", "--out", "OUT", *SMALL, "--length", "4"], "too short for 4"),
        (["lookahead", "BASE", "--data", "CORPUS", "--out", "OUT", *SMALL, "--length", "65"], "do not fit"),
        (["heads", "NOWHERE", "--data", "CORPUS", "--out", "OUT", *SMALL], "is not a folder"),
        (["heads", "BASE", "--data", "NOWHERE", "--out", "OUT", *SMALL], "no corpus at"),
        (["heads", "BASE", "--data", "CORPUS", "--out", "BASE", *SMALL], "not empty"),
        (["heads", "BASE", "--data", "CORPUS", "--out", "OUT", *SMALL, "--heads", "9"], "2 to 8 heads"),
        (["heads", "BASE", "--data", "CORPUS", "--out", "OUT", *SMALL, "--length", "65"], "do not fit"),
        (["counts", "BASE", "--data", "CORPUS"], "not a multi-token checkpoint"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str],
    message: str,
    base: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"BASE": base, "CORPUS": corpus, "OUT": tmp_path / "out", "NOWHERE": tmp_path / "nowhere"}
    status = main([str(names.get(argument, argument)) for argument in arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 1
    assert lines[-1].startswith("dynamo-train: error:") and message in lines[-1]
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it an error that nobody expected is one line all the same."""

    def broken(*arguments: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("dynamo_train.pipeline.find_checkpoint", broken)
    rates = ["--lr-base", "0.001", "--lr-heads", "0.001"]
    for flags, traceback in (([], False), (["--debug"], True)):
        assert main(["heads", "base", *data, "--out", str(tmp_path / "out"), *SMALL, *rates, *flags]) == 1
        errors = capsys.readouterr().err
        assert ("Traceback" in errors) == traceback
        line = errors.strip().splitlines()[-1]
        assert line.startswith("dynamo-train: error: RuntimeError: first line second line (nobody expected this")


@pytest.mark.parametrize(("command", "name"), [("heads", "mixtral"), ("cp", "falcon"), ("lookahead", "olmo3")])
def test_a_base_that_could_not_be_exported_is_refused_before_any_work(
    command: str, name: str, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, reason = REFUSED[name]
    save_plain(tmp_path / "base", config)
    capsys.readouterr()
    assert main([command, str(tmp_path / "base"), *data, "--out", str(tmp_path / "out"), *SMALL]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dynamo-train")]
    (architecture,) = json.loads((tmp_path / "base/config.json").read_text())["architectures"]
    assert line.startswith(f"dynamo-train: error: {architecture} is not supported: {reason}")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("heads", ["--steps", "0"]),
        ("heads", ["--lr-heads", "nan"]),
        ("heads", ["--lr-heads", "-1"]),
        ("cp", ["--balance", "-0.1"]),
        ("cp", ["--rank", "0"]),
        ("lookahead", ["--anchors", "0"]),
        ("lookahead", ["--lr", "inf"]),
    ],
)
def test_numbers_out_of_range_are_refused(command: str, flag: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([command, "x", "--data", "y", "--out", "z", "--steps", "2", *flag])
    assert exit.value.code == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"dynamo-train {version('dynamo-edge')}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["cp", "--help"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from dynamo_train.train import main\n"
        f"try: main({arguments})\n"
        "except SystemExit: assert not {'torch', 'transformers'} & set(sys.modules), 'heavy imports'"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.DEVNULL)


def test_a_missing_extra_is_one_line(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from dynamo_train.train import main\n"
        f"sys.exit(main(['heads', 'base', '--data', 'text', '--steps', '1', '--out', {str(tmp_path / 'out')!r}]))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "dynamo-train: error: this needs torch: pip install 'dynamo-edge[cpu,train]'\n"
    assert not list(tmp_path.iterdir())
