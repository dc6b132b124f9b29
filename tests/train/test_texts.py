"""`dynamo-train texts`: what a bundle writes itself, on a tiny one, and how such a corpus is read."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import chats, handmade
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dynamo_runtime import batch, load_bundle
from dynamo_runtime.bundle import Bundle
from dynamo_runtime.chat import ChatTemplate
from dynamo_runtime.corpus import Document, is_held_out
from dynamo_train import texts
from dynamo_train.corpus import read_corpus
from dynamo_train.errors import TrainingError
from dynamo_train.tokens import own_tokens, tokenize_corpus
from dynamo_train.train import main
from dynamo_train.writing import Recipe, Turns, Writing, loops, turns_of

SMALL = ["--length", "120", "--batch", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a chat template."""
    return chats.write_bundle(tmp_path_factory.mktemp("bundles") / "chat", "smollm2", 1, seed=1).parent


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a base model."""
    return handmade.write_bundle(tmp_path_factory.mktemp("bundles") / "plain", 1, seed=1).parent


def write(bundle: Path, out: Path, *options: str, tokens: int = 1000) -> int:
    return main(["texts", str(bundle), "--out", str(out), "--tokens", str(tokens), *SMALL, *options])


def rows_of(out: Path) -> list[dict[str, Any]]:
    """All rows of a corpus, as whoever reads a folder of parquet files gets them."""
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    return rows


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


# One text.


@pytest.mark.parametrize("name", sorted(set(chats.CONTROL) - {"mistral", "features"}))
def test_turns_of_a_template(name: str, tmp_path: Path) -> None:
    """What is put around what is said makes the very prompt that the template makes of the whole conversation."""
    bundle = load_bundle(chats.write_bundle(tmp_path / name, name, 1))
    turns = turns_of(bundle.chat_template, bundle.control_tokens, bundle.eos_token_ids)
    said = ("What is a fib(n)?", "It is x.", "Three", "Four", "5")
    found = list(turns.opening)
    for i, each in enumerate(said):
        found += bundle.tokenizer.encode(each, add_special_tokens=False).ids + (
            turns.question if i % 2 else turns.answer
        )
    assert found == bundle.chat_template.encode(chats.say(*said), bundle.control_tokens).encoded.ids
    end = bundle.tokenizer.token_to_id(chats.TURN_END[name])
    assert turns.question_ends == turns.answer_ends == {end}


def test_a_question_may_end_with_what_begins_its_answer(tmp_path: Path) -> None:
    bundle = load_bundle(chats.write_bundle(tmp_path / "mistral", "mistral", 1))
    turns = turns_of(bundle.chat_template, bundle.control_tokens, bundle.eos_token_ids)
    end, instruct = (bundle.tokenizer.token_to_id(each) for each in ("</s>", "[/INST]"))
    assert turns.answer == [instruct] and turns.question[0] == end
    assert turns.question_ends == {end, instruct} and turns.answer_ends == {end}


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[-1]['content'] }}",  # the last alone
        "{% for m in messages %}<s>{{ m['content'] }}{{ m['content'] }}{% endfor %}",  # twice
        "{% for m in messages|reverse %}<s>{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",  # nothing in between
    ],
)
def test_templates_that_have_no_turns(source: str, chat: Path) -> None:
    bundle = load_bundle(chat)
    with pytest.raises(TrainingError, match="--plain"):
        turns_of(ChatTemplate(source, {}), bundle.control_tokens, bundle.eos_token_ids)


TURNS = Turns([90, 91], [2, 92], [2, 93], frozenset({2}), frozenset({2, 3}))


def written(script: Sequence[int], *, length: int = 40, **options: Any) -> Writing:
    """A text whose likeliest tokens are those of a script, at each choice the next of them."""
    text = Writing(0, 7, TURNS.opening, Recipe(length, (0.0,), 3, 1e-6), **options)
    for token in script:
        ids = np.array([token, 60, 61, 62])
        if not text.go_on(np.array([9.0, 1.0, 0.0, -1.0]), ids):
            break
    return text


def test_questions_and_answers_take_turns() -> None:
    """The model's own end of an answer belongs to it; of what the template puts in nothing does."""
    text = written([10, 11, 2, 12, 13, 2, 14, 2, 15], turns=TURNS, answers=False)
    assert text.tokens == [90, 91, 10, 11, 2, 92, 12, 13, 2, 93, 14, 2, 92, 15]
    assert text.roles == [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1]
    given = written([12, 3, 14], turns=TURNS)  # another end than the template's, which takes its place
    assert given.tokens == [90, 91, 12, 2, 93, 14] and given.roles == [0, 0, 1, 0, 0, 0]


def test_ends_of_texts() -> None:
    """A length that is never exceeded, the end of a base model's text, and no turn without anything in it."""
    assert written([10, 11, 2, 12, 13], length=6, turns=TURNS, answers=False).tokens == [90, 91, 10, 11, 2, 92]
    assert written([10, 2, 12], length=5, turns=TURNS, answers=False).tokens == [90, 91, 10, 2, 92]
    base = written([10, 3, 11], end_tokens=[3])
    assert base.tokens == [90, 91, 10, 3] and base.roles == [0, 0, 1, 1]
    assert written([3, 3], end_tokens=[3]).tokens == [90, 91, 60, 3]
    one = Turns([90, 91], [50, 92], [2, 93], frozenset(), frozenset({2}))  # no question can be ended
    assert written([10, 2, 12], turns=one).tokens == [90, 91, 10, 2, 93]


def test_temperatures_are_drawn_by_text() -> None:
    """Each as often as any other; a question has 1 whatever its text's answers have."""
    recipe = Recipe(50, (0.0, 0.7, 2.0), 4, 1.0)
    logits, ids = np.log(np.array([0.4, 0.3, 0.2, 0.1])), np.arange(10, 14)
    shares: dict[bool, list[float]] = {}
    for answers in (True, False):
        firsts = []
        for seed in range(3000):
            text = Writing(0, seed, [9], recipe, turns=TURNS, answers=answers)
            text.go_on(logits, ids)
            firsts.append(text.tokens[1] - 10)
        shares[answers] = (np.bincount(firsts, minlength=4) / len(firsts)).tolist()
    p = np.array([0.4, 0.3, 0.2, 0.1])
    mix = sum((p**power / (p**power).sum() for power in (1 / 0.7, 1 / 2.0)), np.eye(4)[0]) / 3
    np.testing.assert_allclose(shares[True], mix, atol=0.035)  # four standard deviations
    np.testing.assert_allclose(shares[False], p, atol=0.035)


def test_loops() -> None:
    """Against counting by hand: of ten tokens' seven 4-grams four may have stood there before, no less."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        tokens = rng.integers(0, 2, rng.integers(0, 30)).tolist()
        grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
        again = sum(gram in grams[:i] for i, gram in enumerate(grams))
        assert loops(tokens) == (again > len(grams) / 2)
    assert loops([1, 2, 3] * 10) and not loops(range(30)) and not loops([])


# The corpus.


def test_a_corpus_of_conversations(chat: Path, tmp_path: Path) -> None:
    """As many tokens as asked for, every text of the length asked for, from the template's beginning of a question."""
    assert write(chat, tmp_path / "out") == 0
    bundle, rows = load_bundle(chat), rows_of(tmp_path / "out")
    record = json.loads((tmp_path / "out" / texts.RECORD).read_text())
    opening = turns_of(bundle.chat_template, bundle.control_tokens, bundle.eos_token_ids).opening
    assert sum(len(row["tokens"]) for row in rows) == record["counts"]["tokens"] >= 1000
    assert sum(sum(row["role"]) for row in rows) == record["counts"]["answer_tokens"]
    counts = record["counts"]
    assert counts["written"] == counts["kept"] + counts["loops"] + counts["duplicates"] and counts["kept"] == len(rows)
    for row in rows:
        assert len(row["tokens"]) == len(row["role"]) == 120 and row["tokens"][: len(opening)] == opening
        assert row["text"] == bundle.tokenizer.decode(row["tokens"], skip_special_tokens=False)
    assert len({row["seed"] for row in rows}) == len(rows)
    schema = pq.read_schema(next((tmp_path / "out").glob("*.parquet")))
    assert [schema.field(name).type for name in ("tokens", "role")] == [pa.list_(pa.uint16()), pa.list_(pa.uint8())]


def test_a_text_does_not_depend_on_the_batch(chat: Path, tmp_path: Path) -> None:
    """Its seed and its number make it, whatever else is written beside it."""
    for name, options in {"three": [], "five": ["--batch", "5"], "other": ["--seed", "1"]}.items():
        assert write(chat, tmp_path / name, *options) == 0
    three, five, other = ({row["seed"]: row for row in rows_of(tmp_path / n)} for n in ("three", "five", "other"))
    assert len(three.keys() & five.keys()) >= 8 and all(
        three[seed] == five[seed] for seed in three.keys() & five.keys()
    )
    assert not three.keys() & other.keys()


def test_a_run_that_was_cut_goes_on_to_the_same_bytes(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C in the third shard; nobody else's folder is written into meanwhile or afterwards."""
    monkeypatch.setattr(texts, "SHARD_WAVES", 1)
    assert write(chat, tmp_path / "whole", tokens=1400) == 0
    run, passes = batch.Batch._pass, iter(range(300))

    def interrupted(*arguments: Any) -> Any:
        if next(passes, None) is None:
            raise KeyboardInterrupt
        return run(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(batch.Batch, "_pass", interrupted)
        assert write(chat, tmp_path / "cut", tokens=1400) == 130
    assert len(list((tmp_path / "cut").glob("*.parquet"))) == 2
    assert write(chat, tmp_path / "cut", tokens=1400) == 0
    assert content(tmp_path / "cut") == content(tmp_path / "whole") and len(content(tmp_path / "whole")) > 4
    caplog.clear()
    with monkeypatch.context() as patch:
        patch.setattr(texts, "Batch", None)  # there is nothing to be done
        assert write(chat, tmp_path / "cut", tokens=1400) == 0
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_other_folders_are_refused(chat: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another command's corpus, something else, and one of which a file was changed: a line each, nothing written."""
    out, full = tmp_path / "out", tmp_path / "full"
    assert write(chat, out, tokens=100) == 0
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    before, name = content(out), next(out.glob("*.parquet")).name
    for bundle, folder, options, said in (
        (chat, out, ["--seed", "3"], "another seed (0, not 3)"),
        (chat, out, ["--temperatures", "0.5"], "another temperatures"),
        (plain, out, [], "another bundle"),
        (chat, full, [], "name a new folder"),
        (chat, tmp_path / "new", ["--length", "641"], "context of 640"),
        (chat, tmp_path / "new", ["--seed", "-1"], "--seed must be"),
        (chat, tmp_path / "new", ["--top-p", "1.5"], "--top-p must be"),
        (chat, tmp_path / "new", ["--top-k", "129"], "from 1 to the 128"),
        (chat, tmp_path / "new", ["--length", "5"], "give a larger --length"),
    ):
        capsys.readouterr()
        assert write(bundle, folder, *options) == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("dynamo-train: error: ") and said in line
    assert content(out) == before and content(full) == {"mine.txt": b"mine"} and not (tmp_path / "new").exists()
    (out / name).write_bytes(b"PAR1")
    assert write(chat, out) == 1 and "is not the file" in capsys.readouterr().err


def test_prompts_are_what_texts_begin_with(chat: Path, plain: Path, tmp_path: Path) -> None:
    """Through the template as a question where there is one, else as they are; each in turn."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "def fib(n):"}\n{"text": "<|im_end|> x"}\n')
    said = ("def fib(n):", "<|im_end|> x")
    for bundle_path, name in ((chat, "chat"), (plain, "plain")):
        assert write(bundle_path, tmp_path / name, "--prompts", str(prompts), "--temperatures", "1") == 0
        bundle = load_bundle(bundle_path)
        begins = [
            bundle.chat_template.encode(chats.say(each), bundle.control_tokens).encoded.ids
            if name == "chat"
            else bundle.tokenizer.encode(each).ids
            for each in said
        ]
        rows = rows_of(tmp_path / name)
        for row in rows:
            (number,) = [i for i, begin in enumerate(begins) if row["tokens"][: len(begin)] == begin]
            length = len(begins[number])
            assert row["role"][: length + 1] == [0] * length + [1]
        assert len(rows) >= 8


def test_base_models_begin_at_the_beginning(plain: Path, chat: Path, tmp_path: Path) -> None:
    """From the token that begins a text to one that ends it, all of it the model's; `--plain` does so with any."""
    for bundle, name, options in ((plain, "base", []), (chat, "chat", ["--plain"])):
        assert write(bundle, tmp_path / name, *options, "--length", "200") == 0
        first = load_bundle(bundle).eos_token_ids[0]
        for row in rows_of(tmp_path / name):
            assert row["tokens"][0] == first and row["role"] == [0, *[1] * (len(row["tokens"]) - 1)]
            assert len(row["tokens"]) == 200 or row["tokens"][-1] == first
            assert first not in row["tokens"][1:-1]


def test_nothing_new_ends_the_run(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One greedy text is all there is of one beginning: what is there stays, and the command says what it lacks."""
    assert write(plain, tmp_path / "out", "--temperatures", "0") == 1
    assert "give more prompts, or higher temperatures" in capsys.readouterr().err
    counts = json.loads((tmp_path / "out" / texts.RECORD).read_text())["counts"]
    assert counts["kept"] + counts["duplicates"] + counts["loops"] == counts["written"] > 30
    assert counts["kept"] == len(list((tmp_path / "out").glob("*.parquet"))) <= 1


def test_torch_is_not_needed(plain: Path, tmp_path: Path) -> None:
    """Neither by the command nor by what it imports."""
    code = (
        "import sys\nsys.modules |= dict.fromkeys(('torch', 'transformers', 'datasets'))\n"
        "from dynamo_train.train import main\nsys.exit(main(sys.argv[1:]))"
    )
    arguments = ["texts", str(plain), "--out", str(tmp_path / "out"), "--tokens", "50", *SMALL]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path / "out")


# Reading it.


def corpus_of(folder: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """Two shards of texts in tokens that no tokenizer would cut them into: one for every byte."""
    folder.mkdir()
    texts_of = [f"def f{i}(x):\n    return x\n" for i in range(30)]
    cut = [[tokenizer.token_to_id(each) for each in "".join(tokenizer.encode(text).tokens)] for text in texts_of]
    for shard in range(2):
        part = slice(15 * shard, 15 * shard + 15)
        columns = {"tokens": cut[part], "role": [[1] * len(ids) for ids in cut[part]], "text": texts_of[part]}
        pq.write_table(pa.table(columns), folder / f"texts-{shard:05d}.parquet")
    (folder / "_texts.json").write_text("{}")
    return cut


def test_tokens_are_taken_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the tokenizer that they belong to, from a folder and from one shard; any other encodes the text."""
    tokenizer = handmade.train_tokenizer()
    cut = corpus_of(tmp_path / "corpus", tokenizer)
    (tmp_path / "corpus" / ".texts-00009.parquet.17").write_bytes(b"half of a shard")
    documents = list(read_corpus(str(tmp_path / "corpus")))
    assert [list(d.tokens or ()) for d in documents] == cut
    assert [d.name for d in documents][14:16] == ["texts-00000.parquet:14", "texts-00001.parquet:0"]
    shard = list(read_corpus(str(tmp_path / "corpus" / "texts-00001.parquet")))
    assert shard == documents[15:]

    def streams(tokenizer: Tokenizer, name: str) -> tuple[list[int], list[int]]:
        made = tokenize_corpus(str(tmp_path / "corpus"), tokenizer, 0, 20, tmp_path / name)
        return made.train.tolist(), made.held_out.tolist()

    wanted: dict[bool, list[int]] = {False: [], True: []}
    for ids, document in zip(cut, documents, strict=True):
        wanted[is_held_out(document, 20)] += [*ids, 0]
    assert streams(tokenizer, "own") == (wanted[False], wanted[True])
    assert "another tokenizer" not in caplog.text
    other = handmade.train_tokenizer()
    other.add_tokens(["return"])
    assert streams(other, "own")[0] == wanted[False]  # it knows these tokens just as well
    small = Tokenizer(models.BPE())
    small.pre_tokenizer, small.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    small.train_from_iterator(["def"], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    encoded: dict[bool, list[int]] = {False: [], True: []}
    for document in documents:
        encoded[is_held_out(document, 20)] += [*small.encode(document.text).ids, 0]
    with caplog.at_level(logging.WARNING):
        assert streams(small, "other") == (encoded[False], encoded[True])
    assert "30 texts came with tokens of another tokenizer" in caplog.text


@pytest.mark.parametrize("tokens", [(5, 320), (5, -1), (5, 6), None])
def test_tokens_that_are_not_the_texts(tokens: tuple[int, ...] | None) -> None:
    """Outside of the vocabulary, or of another text: they do not count, and neither does a column of something else."""
    tokenizer = handmade.train_tokenizer()
    assert own_tokens(Document("x", "x", "some text", tokens), tokenizer) is None


def test_ends_and_columns(tmp_path: Path) -> None:
    """A text that the model ended is not ended twice, and words in a column `tokens` are none of ours."""
    tokenizer = handmade.train_tokenizer()
    ids = [0, *tokenizer.encode("def fib").ids, 0]
    text = tokenizer.decode(ids, skip_special_tokens=False)
    rows = {"text": [text] * 40, "tokens": [ids] * 40}
    pq.write_table(pa.table(rows), tmp_path / "ended.parquet")
    made = tokenize_corpus(str(tmp_path / "ended.parquet"), tokenizer, 0, 20, tmp_path / "tokens")
    assert np.concatenate([made.train, made.held_out]).tolist() == ids * 40
    pq.write_table(pa.table({"text": ["a b"], "tokens": [["a", "b"]]}), tmp_path / "words.parquet")
    (document,) = read_corpus(str(tmp_path / "words.parquet"))
    assert document == Document("words.parquet:0", "words.parquet:0", "a b")


def test_tokens_alone_are_a_corpus(tmp_path: Path) -> None:
    """A table without a text column is read as it is, unless the tokenizer has no such tokens."""
    tokenizer = handmade.train_tokenizer()
    ids = tokenizer.encode("def fib").ids
    pq.write_table(pa.table({"tokens": [ids] * 40}), tmp_path / "alone.parquet")
    made = tokenize_corpus(str(tmp_path / "alone.parquet"), tokenizer, 0, 20, tmp_path / "tokens")
    assert np.concatenate([made.train, made.held_out]).tolist() == [*ids, 0] * 40
    pq.write_table(pa.table({"tokens": [[*ids, 320]]}), tmp_path / "other.parquet")
    with pytest.raises(TrainingError, match=r"'other.parquet:0' is tokens of another tokenizer, and has no text"):
        tokenize_corpus(str(tmp_path / "other.parquet"), tokenizer, 0, 20, tmp_path / "none")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "body.parquet")
    with pytest.raises(TrainingError, match="has no text in a column named 'text', and no tokens"):
        list(read_corpus(str(tmp_path / "body.parquet")))


def test_folders_hold_tables_and_texts(tmp_path: Path) -> None:
    """Text files as ever, then rows of tables by the file they are in; hidden files and records are none."""
    for name, text in {
        "notes.txt": "note",
        "a/rows.jsonl": '{"text": "one"}\n{"text": "two"}\n',
        "rows.jsonl": '{"text": "three"}\n',
        "_record/rows.jsonl": "no",
        ".hidden.jsonl": "no",
        "config.json": "{}",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = [(d.group, d.name, d.text) for d in read_corpus(str(tmp_path))]
    rows = {"a/rows.jsonl:0": "one", "a/rows.jsonl:1": "two", "rows.jsonl:0": "three"}
    assert found == [("notes", "notes.txt", "note"), *((name, name, text) for name, text in rows.items())]


def test_a_corpus_can_be_mixed(plain: Path, tmp_path: Path) -> None:
    """With other text, by `+`; the bundle's own tokens stay."""
    assert write(plain, tmp_path / "own", tokens=100) == 0
    (tmp_path / "notes.txt").write_text("note")
    documents = list(read_corpus(f"{tmp_path / 'own'}+{tmp_path / 'notes.txt'}"))
    bundle: Bundle = load_bundle(plain)
    assert all(own_tokens(d, bundle.tokenizer) for d in documents[:-1]) and documents[-1].tokens is None
