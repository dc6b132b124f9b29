"""``dynamo-train texts --device``: many texts at once on torch, held against one text at a time without a cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support import chats, checkpoints

from dynamo_runtime.parameters import SamplingParameters
from dynamo_train import lockstep, texts, writing
from dynamo_train.errors import TrainingError
from dynamo_train.lockstep import Lockstep, choose
from dynamo_train.train import main
from dynamo_train.writing import Recipe, Turns, Writing

LENGTH = 40
RECIPE = Recipe(LENGTH, (0.0, 0.7, 1.0), 30, 0.9)
# Ends that a random model writes often, and that the template has another one for.
TURNS = Turns([90, 91, 92], [5, 93], [5, 94, 95], frozenset(range(5, 40)), frozenset(range(5, 30)))
Begin = Callable[[int], Writing]


def turn_by_turn(number: int) -> Writing:
    opening = [*TURNS.opening, *range(100, 100 + 7 * (number % 3))]
    return Writing(number, 50 + number, opening, RECIPE, turns=TURNS, answers=number % 2 == 0)


def without_end_of_questions(number: int) -> Writing:
    turns = replace(TURNS, question_ends=frozenset())
    return Writing(number, 50 + number, [7, 8, 9], RECIPE, turns=turns)


def to_an_end(number: int) -> Writing:
    return Writing(number, 50 + number, [7] * (1 + number % 3), RECIPE, end_tokens=range(60, 90))


def one_by_one(base: Any, begin: Begin, count: int) -> list[Writing]:
    """What the texts are: all of a text through the model for every token of it."""
    found = []
    for text in map(begin, range(count)):
        more = True
        while more:
            with torch.no_grad():
                logits = base(torch.tensor([text.tokens])).logits[0, -1]
            best = logits.sort(descending=True)
            more = text.go_on(best.values.numpy(), best.indices.numpy())
        found.append(text)
    return found


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("llama-grouped", turn_by_turn),
        ("llama-grouped", without_end_of_questions),
        ("llama-grouped", to_an_end),
        ("gemma2", turn_by_turn),
        ("neox", turn_by_turn),
    ],
)
def test_texts_are_those_of_one_at_a_time(name: str, begin: Begin) -> None:
    """Token for token and role for role, with grouped keys, a window shorter than the text, and capped logits."""
    base = checkpoints.random_base(checkpoints.CONFIGS[name])
    passes: list[int] = []
    found = list(Lockstep(base, 5, LENGTH).write(map(begin, range(8)), passes.append))
    expected = one_by_one(base, begin, 8)
    assert [text.number for text in found] == list(range(8)), "two waves, in order"
    for text, other in zip(found, expected, strict=True):
        assert (text.tokens, text.roles) == (other.tokens, other.roles)
    assert sum(passes) >= sum(len(text.tokens) - 1 for text in found)
    if begin is turn_by_turn:
        turns = [sum(token == 94 for token in text.tokens) for text in found]
        assert max(turns) > 1, "several turns are what this is about"
        assert {text.temperature for text in found} == {0.0, 0.7, 1.0}
    else:
        assert min(len(text.tokens) for text in found) < LENGTH


def test_a_choice_is_that_of_one_row() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3000, 60)).astype(np.float32) * 3
    temperatures, uniforms = rng.choice([0.0, 0.3, 1.0, 2.0], 3000), rng.random(3000)
    recipe = Recipe(9, (0.0,), 20, 0.8)
    found = choose(
        torch.from_numpy(logits), torch.from_numpy(temperatures), torch.from_numpy(uniforms)[:, None], recipe
    ).tolist()
    for row, token in enumerate(found):
        order = np.argsort(-logits[row], kind="stable")
        parameters = SamplingParameters(temperature=temperatures[row], top_k=20, top_p=0.8)
        assert token == writing.choose(logits[row, order], order, parameters, uniforms[row])


def test_no_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    base = checkpoints.random_base(checkpoints.CONFIGS["neox"])
    monkeypatch.setattr(lockstep._Room, "update", full)
    with pytest.raises(TrainingError, match="no memory for 3 rows of 40 tokens: give a smaller --batch"):
        list(Lockstep(base, 5, LENGTH).write(map(turn_by_turn, range(3))))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a chat template."""
    folder = tmp_path_factory.mktemp("checkpoints") / "chat"
    tokenizer = chats.tokenizer_of("smollm2")
    config = checkpoints.CONFIGS["llama-grouped"].to_dict() | {
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 128,
    }
    checkpoints.random_base(type(checkpoints.CONFIGS["llama-grouped"])(**config)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    said = json.loads(chats.files("smollm2")["tokenizer_config.json"])
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def write(checkpoint: Path, out: Path, *options: str, tokens: int = 900) -> int:
    small = ["--length", "110", "--batch", "4", "--device", "cpu"]
    return main(["texts", str(checkpoint), "--out", str(out), "--tokens", str(tokens), *small, *options])


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    return rows


def test_the_command(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beginnings in turn behind the template's beginning of a question; a run that was cut ends as a whole one."""
    lines = ["def fib(", "<|im_end|> x"]
    (tmp_path / "lines.txt").write_text(f"{lines[0]}\n\n  {lines[1]}\n")
    options = ["--beginnings", str(tmp_path / "lines.txt"), "--temperatures", "1"]
    assert write(checkpoint, tmp_path / "whole", *options) == 0
    rows = rows_of(tmp_path / "whole")
    tokenizer = chats.tokenizer_of("smollm2")
    end = tokenizer.token_to_id("<|im_end|>")
    first = [row for row in rows if tokenizer.decode(row["tokens"]).find("def fib(") > 0]
    assert 4 <= len(first) < len(rows) and sum(len(row["tokens"]) for row in rows) >= 900
    for row in rows:
        begins = row["text"].find(lines[0] if row in first else lines[1])
        assert row["text"][:begins].endswith("<|im_start|>user\n"), "an end that is only text does not end a turn"
        given = len(tokenizer.encode(row["text"][:begins], add_special_tokens=False).ids)
        ended = row["tokens"].index(end, given) if end in row["tokens"][given:] else len(row["tokens"])
        assert not any(row["role"][: ended + 1]), "no answer before the question has ended"
    record = json.loads((tmp_path / "whole" / texts.RECORD).read_text())
    assert record["made_by"]["model"] == "chat (float32 on cpu)" and len(record["shards"]) >= 2

    put, waves = Lockstep._write, iter(range(2))

    def interrupted(*arguments: Any) -> None:
        if next(waves) == 1:
            raise KeyboardInterrupt
        put(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Lockstep, "_write", interrupted)
        assert write(checkpoint, tmp_path / "cut", *options) == 130
    assert len(list((tmp_path / "cut").glob("*.parquet"))) == 1
    assert write(checkpoint, tmp_path / "cut", *options) == 0
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_prompts_and_beginnings_take_turns(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("class Point:")
    (tmp_path / "lines.txt").write_text("for i")
    both = ["--prompts", str(tmp_path / "prompt.txt"), "--beginnings", str(tmp_path / "lines.txt")]
    assert write(checkpoint, tmp_path / "out", *both, "--temperatures", "1", tokens=300) == 0
    kinds = {row["text"].split("user\n")[1][:12] for row in rows_of(tmp_path / "out")}
    assert "class Point:" in kinds and len(kinds) > 1
    for row in rows_of(tmp_path / "out"):
        assert row["text"].split("user\n")[1].startswith(("class Point:<|im_end|>", "for i"))


def test_what_does_not_go_together_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines.txt").write_text("for i")
    for options, said in (
        (["--threads", "1"], "--threads is of onnxruntime, and --device of torch"),
        (["--device", "nowhere"], "--device nowhere is none that torch has here"),
        (["--plain", "--beginnings", str(tmp_path / "lines.txt")], "give them as --prompts"),
    ):
        capsys.readouterr()
        assert write(checkpoint, tmp_path / "out", *options) == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("dynamo-train: error: ") and said in line
    assert main(["texts", str(checkpoint), "--out", str(tmp_path / "out"), "--tokens", "9"]) == 1
    assert "is a checkpoint and no bundle: give --device cpu or cuda" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
