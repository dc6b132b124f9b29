"""Objective, schedule, batches and the loop, against direct computation on tiny models."""

import gzip
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from dynamo_model import MultiTokenModel
from dynamo_runtime.corpus import Document, is_held_out
from dynamo_runtime.errors import PromptError
from dynamo_train import TrainingError, loop
from dynamo_train.card import greedy_agreement
from dynamo_train.corpus import read_corpus
from dynamo_train.objective import Objective
from dynamo_train.optimizers import cosine_schedule, make_optimizers, paper_learning_rates
from dynamo_train.parallel import ModifiedCLM
from dynamo_train.recipe import Recipe
from dynamo_train.tokens import CorpusRecord, TokenStreams, batch, validation_batches

VOCAB = 31
WholeAndResumed = Callable[[Callable[[], Objective]], list[dict[str, torch.Tensor]]]


def make(n_heads: int = 3) -> MultiTokenModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCAB
    )
    return MultiTokenModel(AutoModelForCausalLM.from_config(config), n_heads)


@pytest.fixture
def streams(record: CorpusRecord) -> TokenStreams:
    rng = np.random.default_rng(0)
    train, held_out = (np.cumsum(rng.integers(1, 3, n)) % VOCAB for n in (400, 100))
    return TokenStreams(train.astype(np.uint16), held_out.astype(np.uint16), record)


def direct_losses(model: MultiTokenModel, tokens: torch.Tensor) -> torch.Tensor:
    """Eq. 1 from whole logits."""
    length = tokens.shape[1] - model.n_heads
    logits = model(tokens[:, :length])
    return torch.stack(
        [
            F.cross_entropy(logits[i].flatten(0, 1), tokens[:, i + 1 : i + 1 + length].flatten())
            for i in range(model.n_heads)
        ]
    )


def test_objective_is_equation_1_with_scaled_shared_gradients(streams: TokenStreams) -> None:
    model = make()
    tokens = torch.from_numpy(batch(streams.train, 0, sequences=2, length=8, extra=3, seed=0))
    losses = ModifiedCLM(model, shared_gradient_scale=0.1)(tokens)
    expected = direct_losses(model, tokens)
    torch.testing.assert_close(losses, expected)

    model.zero_grad()
    losses.sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    by_head = []
    for i in range(3):
        model.zero_grad()
        direct_losses(model, tokens)[i].backward()
        by_head.append(
            {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        )
    for name, gradient in ours.items():
        scale = 1.0 if name.startswith("heads.") else 0.1
        direct = by_head[0][name] + scale * (by_head[1][name] + by_head[2][name])
        torch.testing.assert_close(gradient, direct, rtol=1e-4, atol=1e-6)


def test_perplexities_are_the_papers(streams: TokenStreams) -> None:
    model = make().eval()
    batches = validation_batches(streams.held_out, sequences=3, length=8, extra=3)
    nll = torch.zeros(3)
    for tokens in batches:
        nll += direct_losses(model, torch.from_numpy(tokens)).detach() * tokens.shape[0]
    nll /= sum(len(tokens) for tokens in batches)
    figures = ModifiedCLM(model).validate(batches)
    assert figures["ppl_3"] == pytest.approx(math.exp(nll[2]), rel=1e-5)
    assert figures["ppl_1:2"] == pytest.approx(math.exp((nll[0] + nll[1]) / 2), rel=1e-5)
    assert figures["ppl_1:3"] == pytest.approx(math.exp(nll.sum() / 3), rel=1e-5)


def test_an_interrupted_run_ends_bit_equal(whole_and_resumed: WholeAndResumed, tmp_path: Path) -> None:
    whole, resumed = whole_and_resumed(lambda: ModifiedCLM(make(), 0.1))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_early_stop_ends_at_the_first_validation_that_is_no_better(
    recipe: Recipe, streams: TokenStreams, tmp_path: Path
) -> None:
    """Labels that are noise: held-out loss cannot keep falling; the run remembers that it has ended."""
    noise = np.random.default_rng(5).integers(0, VOCAB, 500).astype(np.uint16)
    random = replace(streams, train=noise[:60], held_out=noise[60:])
    recipe = replace(recipe, steps=400, heads_lr=3e-2, base_lr=3e-2, validate_every=5, early_stop=True)
    for _ in range(2):
        outcome = loop.train(ModifiedCLM(make()), random, recipe, tmp_path)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        seen = [line["ppl_1:3"] for line in lines if "ppl_1:3" in line]
        assert outcome.steps == len(lines) == 5 * len(seen) < 400
        assert seen[-1] >= seen[-2]
        assert all(later < earlier for earlier, later in itertools.pairwise(seen[:-1]))


def test_a_checkpoint_of_another_recipe_is_refused(recipe: Recipe, streams: TokenStreams, tmp_path: Path) -> None:
    loop.train(ModifiedCLM(make()), streams, recipe, tmp_path)
    with pytest.raises(TrainingError, match=r"another run: recipe\.seed was 3 and is 4: remove it, "):
        loop.train(ModifiedCLM(make()), streams, replace(recipe, seed=4), tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_base_stays_bit_identical_and_heads_learn(
    optimizer: str, recipe: Recipe, streams: TokenStreams, tmp_path: Path
) -> None:
    model = make()
    with torch.no_grad():  # a stem with something to say about its input
        model.decoder.embed_tokens.weight *= 50
        model.output_embedding.weight *= 20
    before = {name: p.clone() for name, p in model.base.state_dict().items()}
    recipe = replace(recipe, freeze_base=True, optimizer=optimizer, steps=60, heads_lr=2e-2)
    objective = ModifiedCLM(model, freeze_base=True)
    held_out = validation_batches(streams.held_out, sequences=4, length=8, extra=3)
    start = objective.validate(held_out)
    end = loop.train(objective, streams, recipe, tmp_path).figures
    assert all(torch.equal(before[name], p) for name, p in model.base.state_dict().items())
    assert end["ppl_1"] == start["ppl_1"]
    assert end["ppl_2"] < 0.8 * start["ppl_2"]


def test_accumulated_micro_batches_equal_one_batch(recipe: Recipe, streams: TokenStreams, tmp_path: Path) -> None:
    results = []
    for micro_batch in (1, 4):
        model = make()
        recipe = replace(recipe, micro_batch=micro_batch, steps=2)
        loop.train(ModifiedCLM(model, 0.1), streams, recipe, tmp_path / str(micro_batch))
        results.append(model.state_dict())
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-3, atol=1e-5)


def test_schedule_warms_up_and_falls_to_zero() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = cosine_schedule(optimizer, steps=200, warmup=0.01)
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[101] == pytest.approx(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_learning_rates_reach_their_parameters(kind: str) -> None:
    model = make()
    optimizers = make_optimizers(ModifiedCLM(model), kind=kind, base_lr=1e-5, heads_lr=1e-3, weight_decay=0.1)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rate.keys() == {id(p) for p in model.parameters()}
    assert all(rate[id(p)] == (1e-3 if name.startswith("heads.") else 1e-5) for name, p in model.named_parameters())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert id(model.decoder.embed_tokens.weight) not in decayed
    assert id(model.heads[0].mlp.up_proj.weight) in decayed


def test_paper_learning_rates() -> None:
    assert paper_learning_rates(70_426_624) == (1e-5, 1e-3)
    assert paper_learning_rates(6_857_302_016) == (1.2e-6, 1.2e-4)


def test_every_epoch_sees_every_block_once_and_batches_depend_on_the_step_alone() -> None:
    stream = np.arange(103, dtype=np.uint16)
    kwargs = {"sequences": 2, "length": 10, "extra": 2, "seed": 0}
    blocks = (103 - 2) // 10 - 1
    assert blocks == 9
    rows = np.concatenate([batch(stream, step, **kwargs) for step in range(9)])  # two epochs
    assert rows.shape == (18, 12)
    assert (np.diff(rows, axis=1) == 1).all()
    for epoch in (rows[:9], rows[9:]):
        starts = np.sort(epoch[:, 0])
        assert (np.diff(starts) == 10).all()
    assert not np.array_equal(rows[:9, 0], rows[9:, 0])
    np.testing.assert_array_equal(batch(stream, 3, **kwargs), rows[6:8])
    with pytest.raises(TrainingError, match="too few"):
        batch(stream[:15], 0, **kwargs)


def test_agreement_counts_what_the_base_writes() -> None:
    model = make().eval()
    torch.manual_seed(1)
    prompts = torch.randint(0, VOCAB, (3, 5))
    figures = greedy_agreement(model, prompts, new_tokens=10)
    # Naive: extend greedily without a cache, ask the heads at every prefix.
    hits, both, second_hits, total = 0, 0, 0, 0
    for prompt in prompts:
        text = prompt.tolist()
        for _ in range(10):
            text.append(int(model.base(torch.tensor([text])).logits[0, -1].argmax()))
        for t in range(5, 5 + 15 - 4 - 3):
            logits = model(torch.tensor([text[:t]]))
            second = int(logits[1][0, -1].argmax()) == text[t + 1]
            third = int(logits[2][0, -1].argmax()) == text[t + 2]
            hits, total = hits + second, total + 1
            both, second_hits = both + (second and third), second_hits + second
    assert figures["agreement_2"] == pytest.approx(hits / total)
    if second_hits:
        assert figures["accepted_3"] == pytest.approx(both / second_hits)


def test_hold_out_goes_by_group() -> None:
    groups = [f"module{i}" for i in range(2000)]
    held = {g for g in groups if is_held_out(Document(g, g, "x"), 10)}
    assert 150 < len(held) < 250
    assert held == {g for g in groups if is_held_out(Document(g, "other name", "y"), 10)}


def test_standard_library_corpus() -> None:
    names = {document.name for document in islice(read_corpus("stdlib"), 150)}
    assert {"argparse", "asyncio.events"} <= names
    assert not any(".tests." in name for name in names)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"text": "a"}\n{"te', "line 2 of .* is not a JSON object"),
        ("rows.jsonl", b"", "holds no text"),
        ("rows.parquet", b"PAR1, not", "cannot be read as parquet, behind 0 rows: "),
        ("rows.parquet", b"", "holds no text"),
        ("rows.json", b"{", "cannot be read as json, behind 0 rows: "),
        ("rows.json", b'{"body": "a"}', "row 0 of .* has no text in a column named 'text'"),
        ("rows.txt.gz", gzip.compress(b"text", mtime=0), "is not text: unpack it first"),
        ("image.txt", b"\x89PNG\0", "is not text: unpack it first"),
    ],
)
def test_broken_corpora_are_named_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((TrainingError, PromptError), match=message) as raised:
        list(read_corpus(str(tmp_path / name)))
    assert name in str(raised.value) and "\n" not in str(raised.value)
    assert not capfd.readouterr().err


def test_corpora_from_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.py").write_text("x = 1\n")
    (tmp_path / "a" / "image.png").write_bytes(b"\x89")
    (tmp_path / "rows.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    (tmp_path / "bad.jsonl").write_text('{"body": "first"}\n')
    assert [d.name for d in read_corpus(str(tmp_path / "a"))] == ["one.py"]
    assert [d.text for d in read_corpus(str(tmp_path / "rows.jsonl"))] == ["first", "second"]
    with pytest.raises(PromptError, match=r"line 1 of .*bad\.jsonl' has no text in a field named 'text'"):
        list(read_corpus(str(tmp_path / "bad.jsonl")))
    with pytest.raises(TrainingError, match="no corpus"):
        list(read_corpus(str(tmp_path / "nowhere")))
    (tmp_path / "a" / "one.py").unlink()
    with pytest.raises(TrainingError, match="no text"):
        list(read_corpus(str(tmp_path / "a")))


def test_corpora_are_joined_and_packages_are_read() -> None:
    joined = list(read_corpus("package:typer+package:tqdm"))
    packages = [document for document in joined if document.group == "tqdm"]
    assert {d.name for d in read_corpus("package:tqdm")} == {d.name for d in packages}
    assert "tqdm.std" in {d.name for d in packages}
    assert {d.group for d in packages} == {"tqdm"}  # a package is held out as a whole, or not at all
    assert [d.name for d in joined if d.group != "tqdm"] == [d.name for d in read_corpus("package:typer")]
    for bad in ("package:no_such_package", "package:tqdm+package:no_such_package", "package:struct", "no+such"):
        with pytest.raises(TrainingError):
            list(read_corpus(bad))
