"""Text that is packed while it is trained on, against all of it at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import checkpoints
from support.checkpoints import train_tokenizer

from dynamo_model import MultiTokenModel
from dynamo_runtime.corpus import Document, is_held_out
from dynamo_train import TrainingError, loop
from dynamo_train.parallel import ModifiedCLM
from dynamo_train.recipe import Recipe
from dynamo_train.stream import STORED, HeldOut, Order, Share, StreamRecord, stream_text
from dynamo_train.tokens import TokenStreams
from dynamo_train.train import main

PERCENT = 20.0
TEXTS = [f"the cat number {i} sat on mat {i * 7 % 13} and " * (1 + i % 4) for i in range(60)]


def write(folder: Path, kind: str, shards: int = 4) -> str:
    """The texts, a shard's in order."""
    folder.mkdir()
    for shard, texts in enumerate(np.array_split(np.array(TEXTS, dtype=object), shards)):
        rows = [{"text": text} for text in texts]
        path = folder / f"{shard:03d}.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    (folder / "_notes.jsonl").write_text("not a text")
    return str(folder)


def open_text(
    source: str, process: int = 0, processes: int = 1, held_out: int = 50, order: Order = STORED
) -> TokenStreams:
    return stream_text(source, train_tokenizer(), 0, HeldOut(PERCENT, held_out), Share(process, processes), order)


def packed(texts: list[str]) -> list[int]:
    """Those that are trained on, end to end, as one would write it down."""
    tokenizer = train_tokenizer()
    kept = [text for text in texts if not is_held_out(Document(text, "", text), PERCENT)]
    return [token for text in kept for token in [*tokenizer.encode(text, add_special_tokens=False).ids, 0]]


def rows_of(tokens: list[int], count: int, length: int, extra: int) -> list[list[int]]:
    """From an endless repetition."""
    endless = tokens * (2 + count * length // len(tokens))
    return [endless[i * length : (i + 1) * length + extra] for i in range(count)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_sequences_are_cut_from_documents_end_to_end_without_end(kind: str, tmp_path: Path) -> None:
    streams = open_text(write(tmp_path / "text", kind))
    assert streams.text is not None
    tokens = packed(TEXTS)
    got = np.concatenate([streams.text.take(5, 16, 3) for _ in range(60)])
    assert got.size > 1.2 * len(tokens), "not a whole epoch"
    np.testing.assert_array_equal(got, rows_of(tokens, 300, 16, 3))


@pytest.mark.parametrize(("processes", "shards"), [(2, 4), (3, 4)])
def test_processes_share_the_documents(processes: int, shards: int, tmp_path: Path) -> None:
    """Whole shards if they divide, else documents in turn."""
    source = write(tmp_path / "text", "parquet", shards)
    parts = np.array_split(np.array(TEXTS, dtype=object), shards)
    for process in range(processes):
        text = open_text(source, process, processes).text
        assert text is not None
        if shards % processes:
            mine = TEXTS[process::processes]
        else:
            mine = [each for part in parts[process::processes] for each in part]
        np.testing.assert_array_equal(text.take(4, 16, 1), rows_of(packed(mine), 4, 16, 1))


def test_held_out_text_is_the_same_for_all_and_never_trained_on(tmp_path: Path) -> None:
    source = write(tmp_path / "text", "jsonl")
    whole = open_text(source, held_out=0).held_out
    tokenizer = train_tokenizer()
    held = [text for text in TEXTS if is_held_out(Document(text, "", text), PERCENT)]
    expected = [token for text in held for token in [*tokenizer.encode(text, add_special_tokens=False).ids, 0]]
    assert 3 < len(held) < 25 and whole.tolist() == expected
    for process in range(2):
        streams = open_text(source, process, 2)
        np.testing.assert_array_equal(streams.held_out, whole[:50])
        assert streams.record == StreamRecord(source, 4, 2, 50, PERCENT, streams.record.sha256, 1)
    moved = write(tmp_path / "other", "jsonl")
    assert open_text(moved).record.sha256 == streams.record.sha256, "where it lies does not matter"


def documents_of(tokens: np.ndarray) -> list[tuple[int, ...]]:
    """What stands between ends of text in sequences that overlap by one token; the last is broken off."""
    flat = tokens[:, :-1].reshape(-1).tolist()
    ends = [i for i, token in enumerate(flat) if token == 0]
    return [tuple(flat[a + 1 : b]) for a, b in zip([-1, *ends], ends, strict=False)]


def test_every_epoch_has_the_same_documents_in_an_order_of_its_own(tmp_path: Path) -> None:
    source = write(tmp_path / "text", "parquet")
    tokenizer = train_tokenizer()
    kept = [text for text in TEXTS if not is_held_out(Document(text, "", text), PERCENT)]
    stored = [tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in kept]
    orders = []
    for order in (Order(5, 1), Order(5, 1), Order(5, 2), Order(1000, 1)):
        text = open_text(source, order=order).text
        assert text is not None
        found = documents_of(text.take(len(packed(TEXTS)), 2, 1))
        first, second = found[: len(stored)], found[len(stored) : 2 * len(stored)]
        assert sorted(first) == sorted(second) == sorted(stored)
        orders += [first, second]
    assert orders[:2] == orders[2:4], "the same seed, another order"
    assert len({tuple(each) for each in [stored, *orders]}) == 7, "two orders are alike"
    moved = [abs(found - place) for place, found in enumerate(map(stored.index, orders[-1]))]
    assert np.mean(moved) > len(stored) / 5, "nothing is mixed"  # a random order's mean is a third


def test_a_block_holds_documents_that_stand_together(tmp_path: Path) -> None:
    source = write(tmp_path / "text", "jsonl", 1)
    text = open_text(source, order=Order(8, 0)).text
    assert text is not None
    tokens = packed(TEXTS)
    stored = documents_of(np.array([*tokens, 0])[None])
    found = documents_of(text.take(len(tokens), 1, 1))
    for start in range(0, len(stored), 8):
        assert sorted(found[start : start + 8]) == sorted(stored[start : start + 8])


@pytest.mark.parametrize(("kind", "order"), [("jsonl", STORED), ("parquet", Order(7, 1)), ("jsonl", Order(99, 1))])
def test_a_stream_goes_on_in_the_middle(kind: str, order: Order, tmp_path: Path) -> None:
    """From every place, in the first epoch and in the second, and from the very beginning."""
    source = write(tmp_path / "text", kind)
    stream = open_text(source, 1, 2, order=order).text
    assert stream is not None
    positions, taken = [], []
    for _ in range(52):
        positions.append(stream.position())
        taken.append(stream.take(3, 16, 2))
    assert sum(each.size for each in taken) > 1.2 * len(packed(TEXTS)) / 2, "not a whole epoch"
    for at in (0, 1, 19, 30, 50):
        other = open_text(source, 1, 2, order=order).text
        assert other is not None
        other.go_on(positions[at])
        for expected in taken[at:]:
            np.testing.assert_array_equal(other.take(3, 16, 2), expected)


def test_an_interrupted_run_ends_bit_equal(recipe: Recipe, tmp_path: Path) -> None:
    source = write(tmp_path / "text", "parquet")

    def train(folder: str, stop: int | None = None) -> dict[str, Any]:
        model = MultiTokenModel(checkpoints.random_base(checkpoints.CONFIGS["neox"], seed=1), 2)
        torch.manual_seed(0)
        for parameter in model.heads.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        objective, calls = ModifiedCLM(model), iter(range(100))

        def interrupt(*_: object) -> None:
            if next(calls) == stop:
                raise KeyboardInterrupt

        objective.register_forward_pre_hook(interrupt)
        loop.train(
            objective,
            open_text(source, order=Order(10, recipe.seed)),
            recipe,
            tmp_path / folder,
            checkpoint_every=2,
            checkpoint_seconds=0,
        )
        return model.state_dict()

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("cut", stop=7)  # in the middle of a step
    resumed = train("cut")
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())
    assert (tmp_path / "cut" / loop.METRICS).read_text() == (tmp_path / "whole" / loop.METRICS).read_text()


def test_bad_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.jsonl").write_text('{"body": "x"}\n')
    write(tmp_path / "b", "jsonl", 1)
    pq.write_table(pa.Table.from_pylist([{"text": "x"}]), tmp_path / "b" / "0.parquet")
    (tmp_path / "c").mkdir()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "0.jsonl").write_text('{"text": "y"}\n')
    for name, message in {
        "a": "a row of the text has no string in a column named 'text'",
        "b": "holds 2 kinds of shards: --stream reads .jsonl or .parquet files",
        "c": "holds 0 kinds of shards",
        "d": "nothing of .* is held out",
        "e": "no text at .*: --stream reads a folder, a file, or OWNER/NAME on the Hub",
    }.items():
        with pytest.raises(TrainingError, match=message):
            open_text(str(tmp_path / name))


def test_a_position_of_something_else_is_refused(tmp_path: Path) -> None:
    text = open_text(write(tmp_path / "text", "jsonl")).text
    assert text is not None
    with pytest.raises(TrainingError, match="does not say where its text goes on"):
        text.go_on("{}")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = checkpoints.save_plain(tmp_path / "base", checkpoints.CONFIGS["neox"])
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(said))
    source, out = write(tmp_path / "text", "parquet"), tmp_path / "out"
    command = ["heads", str(base), "--data", source, "--stream", "--out", str(out), "--held-out-percent", "20"]
    command += ["--steps", "2", "--sequences", "2", "--length", "16", "--micro-batch", "2"]
    assert main([*command, "--draft-vocab", "9"]) == 1
    assert (
        "--stream reads a text once, as it is trained on: not with --cache or --draft-vocab" in capsys.readouterr().err
    )
    assert main(command) == 0
    record = json.loads((out / "training.json").read_text())["heads"]
    assert record["corpus"]["shards"] == 4 and record["figures"]["ppl_1"] > 1
    assert (tmp_path / "out-work" / "run" / loop.METRICS).is_file()
    assert not (tmp_path / "out-work" / "tokens").exists()
