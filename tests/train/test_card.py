"""What the model card says about texts and stages, from a record written by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from dynamo_train.card import card_text
from dynamo_train.pipeline import RECORD_FILE

FIGURES = {"ppl_1": 5.0, "ppl_2": 20.0, "ppl_1:2": 10.0, "agreement_2": 0.5, "accepted_2": 0.25}
NARROW = "500 modules of the standard library of Python 3.11.7, without tests and generated tables (5.0 M characters"
WIDE = "500 modules of the standard library of Python 3.11.7 and the packages `numpy`, `rich`, without tests"


def stage(source: str, **more: Any) -> dict[str, Any]:
    corpus = {
        "source": source,
        "documents": 500,
        "held_out_documents": 18,
        "characters": 5_000_000,
        "train_tokens": 8_000,
        "held_out_tokens": 2_000,
        "held_out_percent": 6.0,
        "sha256": f"{len(source):064d}",
    }
    recipe = {"steps": 20, "sequences": 4, "length": 100, "optimizer": "muon", "precision": "bf16", "freeze_base": True}
    return {"python": "3.11.7", "corpus": corpus, "recipe": recipe, "steps": 20, "figures": FIGURES} | more


def card(folder: Path, record: dict[str, Any]) -> str:
    config = {
        "model_type": "gpt_neox",
        "num_hidden_layers": 6,
        "hidden_size": 256,
        "vocab_size": 4096,
        "max_position_embeddings": 1024,
    }
    (folder / "heads.safetensors").touch()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / RECORD_FILE).write_text(json.dumps(record))
    return card_text(folder, FIGURES)


def test_one_text_is_named_once(tmp_path: Path) -> None:
    text = card(tmp_path, {"base": stage("stdlib"), "heads": stage("stdlib")})
    assert text.count("- Text") == 1 and f"- Text: {NARROW}" in text
    assert "18 of them (2,000 of 10,000 tokens) are held out" in text
    assert "- Base: 20 steps, of 4 × 100 tokens (1.0 epochs), muon, bf16 autocast, from scratch.\n" in text
    assert "- Heads: 20 steps, of 4 × 100 tokens (1.0 epochs), muon, bf16 autocast, base frozen.\n" in text
    assert "| PPL 1:2 | 10.00 |" in text and "| … where all heads before it agreed | 25.0% |" in text


def test_every_text_is_named_with_the_stages_that_read_it(tmp_path: Path) -> None:
    wide = "stdlib+package:numpy+package:rich"
    text = card(tmp_path, {"base": stage("stdlib"), "heads": stage(wide)})
    assert f"- Text of Base: {NARROW}" in text
    assert f"- Text of Heads: {WIDE}" in text
    text = card(tmp_path, {"heads": stage("texts+package:rich")})
    assert "- Text: 500 modules of the package `rich` and `texts`, without" in text and "- Base" not in text


@pytest.mark.parametrize("present", [True, False])
def test_drafters_have_a_line_if_they_are_there(present: bool, tmp_path: Path) -> None:
    wide = "stdlib+package:numpy+package:rich"
    joint = {"n_tokens": 4, "rank": 8, "balance": 0.01, "figures": {"ppl_1": 5.0, "gate_min": 0.0625, "ppl_1:2": 8.5}}
    look_ahead = {"n_look_ahead": 3, "anchors": 64, "figures": {"ppl_2": 30.0, "ppl_2:4": 41.25}}
    if present:
        for kind in ("cp", "lookahead"):
            (tmp_path / f"{kind}.safetensors").touch()
    record = {"base": stage("stdlib"), "heads": stage(wide)}
    text = card(tmp_path, record | {"cp": stage(wide, **joint), "lookahead": stage("stdlib", **look_ahead)})
    run = "20 steps, of 4 × 100 tokens (1.0 epochs), muon, bf16 autocast, base frozen"
    lines = [
        f"- Text of Base, Look-ahead embeddings (PaSS): {NARROW}",
        f"- Text of Heads, Joint head (CP): {WIDE}",
        f"- Joint head (CP): rank 8 over 4 tokens, load balance 0.01; {run}; held out: PPL 1 5.00, PPL 1:2 8.50, "
        "smallest mean gate weight 0.062.\n",
        f"- Look-ahead embeddings (PaSS): 3, at 64 positions a sequence; {run}; "
        "held out: PPL 2 30.00, PPL 2:4 41.25.\n",
    ]
    assert [line in text for line in lines] == [present] * 4
    assert present == ("CP" in text) == ("PaSS" in text)


def test_heads_say_what_they_choose_among_and_from_what_they_went_on(tmp_path: Path) -> None:
    before = stage("stdlib", steps=10)
    before["recipe"]["freeze_base"] = False
    options = {"draft_vocabulary": 1024, "conditioned": True, "before": before}
    later = stage("stdlib", **options, figures=FIGURES | {"coverage": 0.8219})
    text = card(tmp_path, {"heads": later})
    assert (
        "- Heads: of the 1,024 most frequent tokens alone (82.2% of held-out labels); conditioned on the token in "
        "front; 20 steps, of 4 × 100 tokens (1.0 epochs), muon, bf16 autocast, base frozen; before that 10 steps, "
        "stopped early of 20, of 4 × 100 tokens (0.5 epochs), muon, bf16 autocast, base trained along.\n"
    ) in text
    assert "in the draft vocabulary" not in text  # of which the figures of this card say nothing
    table = card_text(tmp_path, {"coverage": 0.8219} | FIGURES)
    assert (
        "| labels in the draft vocabulary; a further head's PPL is over those alone | 82.2% |\n| PPL 1 | 5.00 |"
        in table
    )
