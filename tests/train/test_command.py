"""``dynamo-train`` from text to a multi-token checkpoint, on a tiny corpus."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynamo_model import MultiTokenModel
from dynamo_train.train import main

SMALL = ["--steps", "2", "--sequences", "2", "--length", "16", "--micro-batch", "2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        body = "\n".join(f"def function_{i}_{j}(value):\n    return value + {j}\n" for j in range(6))
        (folder / f"module{i}.py").write_text(body)
    return folder


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "base"
    shape = ["--hidden-size", "32", "--layers", "2", "--attention-heads", "2", "--vocab-size", "300"]
    arguments = ["base", "--data", str(corpus), "--out", str(out), "--context-length", "64", *shape, *SMALL]
    assert main([*arguments, "--held-out-percent", "20"]) == 0
    return out


def test_base_is_an_ordinary_hf_model(base: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    text = "def é(x): return '☃'"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    assert model(ids).logits.shape[-1] == 300
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0


def test_heads_and_counts_on_a_base(base: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "t3"
    data = ["--data", str(corpus), "--held-out-percent", "20"]
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["heads", "NOWHERE", "--data", "CORPUS", "--out", "OUT", *SMALL], "cannot load a base model"),
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


@pytest.mark.parametrize("flag", [["--steps", "0"], ["--lr-heads", "nan"], ["--lr-heads", "-1"]])
def test_numbers_out_of_range_are_refused(flag: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["heads", "x", "--data", "y", "--out", "z", "--steps", "2", *flag])
    assert exit.value.code == 2
