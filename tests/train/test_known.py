"""What ships for models known by name: the card, the command's refusals, and the way from text to packed drafters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support import checkpoints

from dynamo_model import MultiTokenModel
from dynamo_model.sources import KNOWN
from dynamo_train import known
from dynamo_train.known import KNOWN_DRAFTERS, card_text, train_known
from dynamo_train.train import main


def test_every_recipe_is_of_a_known_model() -> None:
    assert KNOWN_DRAFTERS.keys() <= KNOWN.keys()
    assert all(drafters.recipe.freeze_base for drafters in KNOWN_DRAFTERS.values())


def test_the_card_says_what_the_record_says() -> None:
    figures = {"accepted_1": 0.5, "accepted_2": 0.25, "tokens_a_pass": 1.75, "greedy_1": 0.6, "greedy_2": 0.55}
    figures |= {"greedy_tokens_a_pass": 1.93, "coverage": 0.965, "ppl_1": 4.5, "ppl_2": 20.0, "ppl_3": 40.0}
    corpus = {"documents": 1234, "train_tokens": 2_000_000, "held_out_tokens": 56_789, "sha256": "ab" * 32}
    recipe = {"sequences": 8, "length": 500, "optimizer": "adamw", "heads_lr": 1e-3}
    stage = {"corpus": corpus, "recipe": recipe, "steps": 1000, "figures": figures, "draft_vocabulary": 8192}
    card = card_text("smollm2", stage)
    assert card.startswith("# 2 further token heads for SmolLM2-135M-Instruct")
    for part in ("1,234 texts", "2,000,000", "56,789", "`abababababababab…`", "8,192 most frequent", "96.5% of"):
        assert part in card
    assert "4.0 M tokens or 2.0 epochs" in " ".join(card.split())
    assert (
        "| draft 1 | 0.600 | 0.500 | 20.0 |\n| draft 2 | 0.550 | 0.250 | 40.0 |\n| tokens a pass | 1.93 | 1.75 |"
        in card
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smollm2"], "give --data CORPUS: text of smollm2's own"),
        (["--data", "stdlib"], "the embedded model has a text and steps of its own: leave --data"),
        (["--steps", "9"], "the embedded model has a text and steps of its own: leave --data"),
    ],
)
def test_what_is_missing_or_too_much_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["default", *arguments, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_from_text_to_packed_drafters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small base in the place of the known one."""
    base = checkpoints.save_plain(tmp_path / "base", checkpoints.CONFIGS["neox"])
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(said))
    rows = [json.dumps({"text": "the cat sat on the mat and " * 8 + str(i)}) for i in range(24)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows) + "\n")
    ours = KNOWN_DRAFTERS["smollm2"]
    recipe = replace(ours.recipe, steps=200, sequences=2, micro_batch=2, length=16, precision="no")
    small = replace(ours, heads=replace(ours.heads, n_heads=3, draft_vocab=40), recipe=recipe)
    monkeypatch.setitem(KNOWN_DRAFTERS, str(base), small)
    monkeypatch.setitem(known.KNOWN, str(base), KNOWN["smollm2"])
    out = tmp_path / "out"
    train_known(str(base), str(tmp_path / "text.jsonl"), out, tmp_path / "work", steps=2)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "cooccurrence.npz",
        "heads.safetensors",
        "training.json",
    ]
    tensors, shape = MultiTokenModel.read(out)
    trained, _ = MultiTokenModel.read(tmp_path / "work" / "heads")
    assert shape == {"n_heads": 3} and tensors.keys() == trained.keys()
    for name, tensor in tensors.items():
        assert (tensor - trained[name]).abs().max() <= trained[name].abs().max() / 127
