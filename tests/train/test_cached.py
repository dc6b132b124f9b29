"""Training on cached states: what is kept across interrupts, losses and figures by hand, the command."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import checkpoints
from tqdm import tqdm

from dynamo_model import MultiTokenModel
from dynamo_model.checkpoint import load_base
from dynamo_model.output import logits_of
from dynamo_train import TrainingError, states
from dynamo_train.cached import CachedHeads
from dynamo_train.objective import Objective
from dynamo_train.precision import fastest_precision
from dynamo_train.recipe import Recipe
from dynamo_train.states import TOP, StateCache, cache_states
from dynamo_train.tokens import CorpusRecord, TokenStreams
from dynamo_train.train import main

LENGTH = 8
NAMES = ["neox", "granite", "gemma2", "phi"]
WORDS = torch.tensor([7, 0, 300, *range(10, 30)])
WholeAndResumed = Callable[[Callable[[], Objective]], list[dict[str, torch.Tensor]]]


@pytest.fixture
def streams(record: CorpusRecord) -> TokenStreams:
    """Steps of 1 or 2, so that the token in front says much."""
    rng = np.random.default_rng(0)
    train, held_out = (np.cumsum(rng.integers(1, 3, n)) % 40 for n in (400, 100))
    return TokenStreams(train.astype(np.uint16), held_out.astype(np.uint16), record)


def make(name: str = "neox", words: torch.Tensor | None = WORDS) -> MultiTokenModel:
    """With conditions that say something; every call makes the same one."""
    torch.manual_seed(0)
    model = MultiTokenModel(
        checkpoints.random_base(checkpoints.CONFIGS[name]), 3, draft_vocabulary=words, conditioned=True
    )
    with torch.no_grad():
        for condition in model.conditions:
            condition.out.weight.normal_(std=0.05)
    return model


def cached(
    model: MultiTokenModel, streams: TokenStreams, recipe: Recipe, folder: Path, loss: str = "kl"
) -> CachedHeads:
    return CachedHeads(model, *cache_states(model.base, streams, recipe, folder), loss)


def window(streams: TokenStreams, number: int) -> torch.Tensor:
    """A training window and the token behind it [1, LENGTH + 1]."""
    tokens = streams.train[number * LENGTH : number * LENGTH + LENGTH + 1]
    return torch.from_numpy(tokens.astype(np.int64))[None]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_base_says_is_kept(name: str, streams: TokenStreams, recipe: Recipe, tmp_path: Path) -> None:
    model = make(name)
    train, held_out = cache_states(model.base, streams, recipe, tmp_path)
    assert (train.windows, held_out.windows) == (399 // LENGTH, 99 // LENGTH)
    said = train.read(np.array([3, 17]))
    for row, number in enumerate([3, 17]):
        tokens = window(streams, number)
        assert torch.equal(said.tokens[row], tokens[0])
        with torch.no_grad():
            log_p = model.base(tokens[:, :-1]).logits[0].float().log_softmax(-1)
            stem = model.base(tokens[:, :-1], output_hidden_states=True).hidden_states[-2][0]
        assert torch.equal(said.stem[row], stem.bfloat16())
        torch.testing.assert_close(said.log_p[row], log_p.topk(TOP).values, rtol=2e-3, atol=2e-3)  # float16
        torch.testing.assert_close(log_p.gather(-1, said.ids[row]), said.log_p[row], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(said.label_log_p[row], log_p.gather(-1, tokens[0, 1:, None])[:, 0])


def naive_loss(model: MultiTokenModel, tokens: torch.Tensor, head: int, loss: str) -> torch.Tensor:
    """Of one head over whole rows of logits, from the tokens alone; the stem rounded as the cache does."""
    first, given = model.penultimate(tokens[:, :-1])
    given = replace(given, stem=given.stem.detach().bfloat16().float())
    length = LENGTH - head + 1
    state = model.further_states(given)[head - 2][:, :length]
    state = model.condition(head, state, tokens[:, head - 1 : head - 1 + length])
    log_q = model._of_all_words(model.draft_logits(state)).log_softmax(-1).clamp(min=-1e9)
    known = torch.zeros(log_q.shape[-1]).index_fill(0, WORDS, 1.0)
    if loss == "ce":
        target = F.one_hot(tokens[:, head : head + length], log_q.shape[-1]).float()
    else:
        p = logits_of(model.base, first).detach().softmax(-1)[:, head - 1 :]
        target = p * (p >= p.topk(TOP).values[..., -1:])
    return -(target * known * log_q).sum(-1).mean()


@pytest.mark.parametrize("loss", ["kl", "ce"])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_those_of_whole_logits(
    name: str, loss: str, streams: TokenStreams, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_train.cached.rows_at_once", lambda *_: 5)  # several chunks, the last of them shorter
    model, other = make(name), make(name)
    losses = cached(model, streams, recipe, tmp_path, loss)(torch.tensor([5, 2]))
    losses.sum().backward()
    other.base.requires_grad_(False)
    pairs = [[naive_loss(other, window(streams, number), head, loss) for number in (5, 2)] for head in (2, 3)]
    naive = torch.stack([torch.stack(pair).mean() for pair in pairs])
    naive.sum().backward()
    torch.testing.assert_close(losses, naive, rtol=1e-3, atol=1e-3)
    theirs = dict(other.named_parameters())
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert any(key.startswith("conditions.1.hidden") for key in trained)
    assert not any(key.startswith("base.") for key in trained)
    for key, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, theirs[key].grad, rtol=2e-3, atol=2e-4)


def test_figures_by_hand(streams: TokenStreams, recipe: Recipe, tmp_path: Path) -> None:
    model = make()
    clm = cached(model, streams, recipe, tmp_path)
    figures = clm.validate(clm.held_out(streams, recipe))
    tokens = torch.from_numpy(streams.held_out.astype(np.int64))
    hits, chances, greedy, log_p = [0, 0], 0, [[0, 0], [0, 0]], [[], []]
    for start in range(0, 12 * LENGTH, LENGTH):
        text = tokens[start : start + LENGTH + 1]
        with torch.no_grad():
            first, given = model.penultimate(text[None, :-1])
            further = model.further_states(replace(given, stem=given.stem.bfloat16().float()))
            best = logits_of(model.base, first)[0].argmax(-1)
            for t in range(LENGTH - 2):
                right = follows = True
                chances += 1
                for i, state in enumerate(further):
                    told = model.condition(i + 2, state[0, t], text[t + i + 1])
                    row = model._of_all_words(model.draft_logits(told)).log_softmax(-1)
                    label, draft = text[t + i + 2], row.argmax()
                    log_p[i] += [row[label].item()] if row[label] > -math.inf else []
                    greedy[i][1] += follows
                    follows = follows and bool(draft == best[t + i + 1])
                    greedy[i][0] += follows
                    follows = follows and bool(draft == label)
                    right = right and bool(draft == label)
                    hits[i] += right
    assert figures["tokens_a_pass"] == pytest.approx(1 + sum(hits) / chances)
    assert [figures["accepted_1"], figures["accepted_2"]] == pytest.approx([hit / chances for hit in hits])
    rates = [good / max(1, of) for good, of in greedy]
    assert [figures["greedy_1"], figures["greedy_2"]] == pytest.approx(rates)
    assert figures["greedy_tokens_a_pass"] == pytest.approx(1 + rates[0] + rates[0] * rates[1])
    assert figures["ppl_2"] == pytest.approx(math.exp(-np.mean(log_p[0])), rel=1e-3)
    assert figures["ppl_3"] == pytest.approx(math.exp(-np.mean(log_p[1])), rel=1e-3)
    assert figures["coverage"] == pytest.approx(sum(map(len, log_p)) / 2 / chances)


def test_the_first_figures_are_of_the_base(streams: TokenStreams, recipe: Recipe, tmp_path: Path) -> None:
    model = make(words=None)
    clm = cached(model, streams, recipe, tmp_path)
    figures = clm.validate(clm.held_out(streams, recipe))
    nll = []
    for start in range(0, 12 * LENGTH, LENGTH):
        text = torch.from_numpy(streams.held_out[start : start + LENGTH + 1].astype(np.int64))[None]
        with torch.no_grad():
            nll.append(F.cross_entropy(model.base(text[:, :-1]).logits[0], text[0, 1:]).item())
    assert figures["ppl_1"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)
    assert "coverage" not in figures


def test_an_interrupted_cache_goes_on_to_the_same_bytes(
    streams: TokenStreams, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, say, calls = make(), states._say, iter(range(100))

    def interrupt(*arguments: object) -> object:
        if next(calls) == 20:
            raise KeyboardInterrupt
        return say(*arguments)

    cache_states(model.base, streams, recipe, tmp_path / "whole")
    monkeypatch.setattr(states, "_say", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache_states(model.base, streams, recipe, tmp_path / "cut")
    train, _ = cache_states(model.base, streams, recipe, tmp_path / "cut")
    assert next(calls) < 20 + 30, "it started over"
    assert train.missing() == 0
    for file in (tmp_path / "whole").rglob("*.bin"):
        assert file.read_bytes() == (tmp_path / "cut" / file.relative_to(tmp_path / "whole")).read_bytes()


def test_a_cache_is_of_one_base_and_one_text(streams: TokenStreams, tmp_path: Path) -> None:
    model = make()

    def cache(tokens: np.ndarray, made_of: str = "a", length: int = LENGTH) -> StateCache:
        return StateCache(tmp_path, tokens, length, model.config.hidden_size, made_of)

    first = cache(streams.train[:200])
    first.fill(model, 4, tqdm(disable=True))
    assert first.missing() == 0 and first.windows == 24
    assert cache(streams.train).missing() == 49 - 24, "a text that goes on is a beginning"
    assert cache(streams.train, made_of="b").missing() == 49
    assert cache(streams.train, length=5).missing() == 79
    other = streams.train.copy()
    other[3] += 1
    assert cache(other).missing() == 49
    longer = cache(streams.train)
    longer.fill(model, 4, tqdm(disable=True))
    assert longer.missing() == 0
    assert cache(streams.train[:200]).missing() == 0, "nor does a shorter text lose anything"
    (tmp_path / "ids.bin").write_bytes(b"")
    assert cache(streams.train).missing() == 49
    with pytest.raises(TrainingError, match="5 tokens are too few for sequences of 8"):
        cache(streams.train[:5])


def test_a_full_disk_is_said_before_any_work(
    streams: TokenStreams, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(states.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(TrainingError, match=r"the states take .* GB, and .* has room for 0\.0 GB"):
        cache_states(make().base, streams, recipe, tmp_path)
    assert not list(tmp_path.rglob("*.bin"))


def test_an_interrupted_run_ends_as_a_whole_one(
    whole_and_resumed: WholeAndResumed, streams: TokenStreams, recipe: Recipe, tmp_path: Path
) -> None:
    whole, resumed = whole_and_resumed(lambda: cached(make(), streams, recipe, tmp_path / "states"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    start = make().state_dict()
    assert all(torch.equal(start[name], whole[name]) for name in start if name.startswith("base."))
    assert not any(torch.equal(start[name], whole[name]) for name in start if name.startswith("heads.0.mlp"))


def test_losses_in_bf16_autocast_are_about_the_same(streams: TokenStreams, recipe: Recipe, tmp_path: Path) -> None:
    clm = cached(make(), streams, recipe, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        losses = clm(torch.tensor([1, 4]))
    torch.testing.assert_close(losses, clm(torch.tensor([1, 4])), rtol=0.02, atol=0.02)
    losses.sum().backward()


@pytest.mark.parametrize(("slow", "expected"), [(torch.float32, "bf16"), (torch.bfloat16, "no")])
def test_the_faster_precision_is_measured(slow: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01 if rows.dtype == slow else 0.001)
        return rows

    monkeypatch.setattr(F, "linear", linear)
    assert fastest_precision() == expected


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = checkpoints.save_plain(tmp_path / "base", checkpoints.CONFIGS["neox"])
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Documents enough for a held-out part."""
    rows = [json.dumps({"text": "the cat sat on the mat and " * 8 + str(i)}) for i in range(24)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows) + "\n")
    return ["--data", str(tmp_path / "text.jsonl")]


def test_the_command(base: Path, data: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = ["--steps", "3", "--sequences", "2", "--length", "16", "--micro-batch", "2", "--lr-heads", "1e-2"]
    cached = ["--freeze-base", "--cache", "--loss", "kl", "--condition", "--draft-vocab", "40"]
    assert main(["heads", str(base), *data, "--out", str(out), *small, *cached]) == 0
    model, before = MultiTokenModel.load(out), load_base(base)
    assert all(torch.equal(tensor, model.base.state_dict()[name]) for name, tensor in before.state_dict().items())
    assert model.conditioned and model.conditions[0].out.weight.any()
    stage = json.loads((out / "training.json").read_text())["heads"]
    assert (stage["cached"], stage["loss"], stage["draft_vocabulary"]) == (True, "kl", 40)
    assert 1 <= stage["figures"]["tokens_a_pass"] <= 3
    assert main(["card", str(out), *data]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache"], "--cache keeps what a base says, which must not change: it goes with --freeze-base"),
        (["--freeze-base", "--loss", "kl"], "--loss kl learns from what the base says: it goes with --cache"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    flags: list[str], message: str, base: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["heads", str(base), *data, "--out", str(tmp_path / "out"), "--steps", "2", "--length", "16", *flags])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dynamo-train: error: ")]
    assert message in line
    assert not list(tmp_path.glob("out*"))
