"""Training of token heads with a draft vocabulary and a condition: losses, figures, and the command."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support import checkpoints
from transformers import AutoModelForCausalLM

from dynamo_model import MultiTokenModel
from dynamo_model.checkpoint import load_base
from dynamo_model.output import logits_of
from dynamo_model.sources import find_checkpoint
from dynamo_train import TrainingError, loop, objective
from dynamo_train.drafter import Start
from dynamo_train.objective import Objective, label_nll
from dynamo_train.optimizers import make_optimizers
from dynamo_train.parallel import ModifiedCLM, TokenHeads, most_frequent
from dynamo_train.pipeline import convert
from dynamo_train.recipe import Recipe
from dynamo_train.tokens import CorpusRecord, TokenStreams
from dynamo_train.train import main

VOCAB = checkpoints.VOCAB
NAMES = ["neox", "granite", "cohere", "gemma2", "phi"]
TOKENS = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1))
WORDS = torch.tensor([7, 0, 300, *range(10, 30)])
SMALL = ["--steps", "2", "--sequences", "2", "--length", "16", "--micro-batch", "2"]
WholeAndResumed = Callable[[Callable[[], Objective]], list[dict[str, torch.Tensor]]]


@pytest.fixture
def streams(record: CorpusRecord) -> TokenStreams:
    """Steps of 1 or 2, so that the token in front says much."""
    rng = np.random.default_rng(0)
    train, held_out = (np.cumsum(rng.integers(1, 3, n)) % 40 for n in (400, 100))
    return TokenStreams(train.astype(np.uint16), held_out.astype(np.uint16), record)


def make(name: str = "neox", words: torch.Tensor | None = WORDS, conditioned: bool = True) -> MultiTokenModel:
    """With conditions that say something."""
    torch.manual_seed(0)
    base = checkpoints.random_base(checkpoints.CONFIGS[name])
    model = MultiTokenModel(base, 3, draft_vocabulary=words, conditioned=conditioned)
    with torch.no_grad():
        for condition in model.conditions:
            condition.out.weight.normal_(std=0.05)
    return model


def masked_log_likelihoods(model: MultiTokenModel, tokens: torch.Tensor) -> torch.Tensor:
    """Of every label [3, batch, length], of whole logits that are masked."""
    length = tokens.shape[1] - 3
    result = []
    for i, state in enumerate(model.states(tokens[:, :length]), start=1):
        if i > 1:
            state = model.condition(i, state, tokens[:, i - 1 : i - 1 + length])
        logits = logits_of(model.base, state)
        if i > 1 and model.draft_vocabulary is not None:
            others = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, model.draft_vocabulary, False)
            logits = logits.masked_fill(others, -torch.inf)
        labels = tokens[:, i : i + length]
        result.append(-F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape))
    return torch.stack(result)


def covered_means(log_likelihoods: torch.Tensor) -> torch.Tensor:
    return torch.stack([-each[each > -torch.inf].mean() for each in log_likelihoods])


@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_those_of_masked_logits(
    name: str, conditioned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "CAPPED_LOGITS", 5 * len(WORDS))
    gradients = []
    for ours in (True, False):
        model = make(name, conditioned=conditioned)
        naive = masked_log_likelihoods(model, TOKENS)
        if ours:
            losses = ModifiedCLM(model)(TOKENS)
            torch.testing.assert_close(losses, covered_means(naive))
            torch.testing.assert_close(ModifiedCLM(model).token_log_likelihoods(TOKENS), naive.detach())
            losses.sum().backward()
        else:
            covered_means(naive).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert conditioned == any(name.startswith("conditions.1.hidden") for name in gradients[0])
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_losses_in_bf16_autocast_are_about_the_same(name: str) -> None:
    clm = ModifiedCLM(make(name))
    with torch.autocast("cpu", torch.bfloat16):
        losses, likelihoods = clm(TOKENS), clm.token_log_likelihoods(TOKENS)
    torch.testing.assert_close(losses, clm(TOKENS), rtol=0.02, atol=0.02)
    torch.testing.assert_close(likelihoods, clm.token_log_likelihoods(TOKENS), rtol=0.05, atol=0.1)
    losses.sum().backward()


@pytest.mark.parametrize("name", ["neox", "gemma2"])
def test_without_a_label_in_the_draft_vocabulary_the_loss_is_nothing(name: str) -> None:
    model = make(name, words=torch.tensor([318, 5]))
    tokens = TOKENS.clamp(min=6)
    losses = ModifiedCLM(model)(tokens)
    assert losses[0] > 0 and losses[1] == losses[2] == 0
    losses[1:].sum().backward()
    assert not any(p.grad.any() for p in [*model.heads.parameters(), *model.conditions.parameters()])
    nll = label_nll(model.base, model.states(tokens)[1], tokens, words=model.draft_vocabulary)
    assert nll.shape == tokens.shape and (nll == torch.inf).all()


def test_figures_are_over_the_labels_in_the_draft_vocabulary() -> None:
    model = make()
    batches = [TOKENS.numpy(), TOKENS[:1].flip(1).numpy()]
    figures = ModifiedCLM(model).validate(batches)
    each = [masked_log_likelihoods(model.eval(), torch.from_numpy(tokens)).detach() for tokens in batches]
    nll = covered_means(torch.cat([every.flatten(1) for every in each], 1))
    labels = torch.cat([torch.from_numpy(b)[:, i : i + 9].flatten() for b in batches for i in (2, 3)])
    assert figures["coverage"] == pytest.approx(torch.isin(labels, WORDS).float().mean().item())
    assert 0.3 < figures["coverage"] < 0.8
    for i in (1, 2, 3):
        assert figures[f"ppl_{i}"] == pytest.approx(math.exp(nll[i - 1]), rel=1e-5)
    assert figures["ppl_1:3"] == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert list(figures)[-1] == "ppl_1:3"  # which early stopping looks at
    assert "coverage" not in ModifiedCLM(make(words=None)).validate(batches)


def test_the_most_frequent_tokens_by_hand() -> None:
    tokens = np.array([3, 1, 3, 0, 1, 4, 3, 0, 5], np.uint16)  # 3 three times, 0 and 1 twice, 4 and 5 once
    assert most_frequent(tokens, 4, 8).tolist() == [3, 0, 1, 4]
    assert most_frequent(tokens, 8, 8).tolist() == [3, 0, 1, 4, 5, 2, 6, 7]
    assert most_frequent(tokens, 1, 8).dtype == torch.int64


def test_an_interrupted_run_ends_bit_equal_and_another_is_refused(
    whole_and_resumed: WholeAndResumed, recipe: Recipe, streams: TokenStreams, tmp_path: Path
) -> None:
    whole, resumed = whole_and_resumed(lambda: ModifiedCLM(make(), 0.1))
    assert "draft_vocabulary" in whole and all(torch.equal(whole[name], resumed[name]) for name in whole)
    for other, said in (
        (make(words=WORDS[:9]), r"objective\.draft_vocabulary was 23 and is 9"),
        (make(words=WORDS.flip(0)), "weights was"),
        (make(words=None), r"objective\.draft_vocabulary was 23 and is None"),
        (make(conditioned=False), r"objective\.conditioned was True and is None"),
    ):
        with pytest.raises(TrainingError, match=f"another run: .*{said}"):
            loop.train(
                ModifiedCLM(other, 0.1), streams, recipe, tmp_path / "cut", checkpoint_every=2, checkpoint_seconds=0
            )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_condition_learns_what_the_token_in_front_says(
    optimizer: str, recipe: Recipe, streams: TokenStreams, tmp_path: Path
) -> None:
    """From zero, on a frozen base that stays as it is."""
    model = make()
    for condition in model.conditions:
        torch.nn.init.zeros_(condition.out.weight)
    before = {name: p.clone() for name, p in model.base.state_dict().items()}
    clm = ModifiedCLM(model, freeze_base=True)
    optimizers = make_optimizers(clm, kind=optimizer, base_lr=1e-5, heads_lr=1e-3, weight_decay=0.1)
    rates = {id(p): group["lr"] for each in optimizers for group in each.param_groups for p in group["params"]}
    assert all(rates[id(p)] == 1e-3 for p in model.conditions.parameters())
    first = model.conditions[0].hidden.weight.clone()
    recipe = replace(recipe, freeze_base=True, optimizer=optimizer, steps=60, heads_lr=2e-2)
    told = loop.train(clm, streams, recipe, tmp_path / "told").figures
    assert all(torch.equal(before[name], p) for name, p in model.base.state_dict().items())
    assert not torch.equal(first, model.conditions[0].hidden.weight)
    clm = ModifiedCLM(make(conditioned=False), freeze_base=True)
    alone = loop.train(clm, streams, recipe, tmp_path / "alone").figures
    assert told["ppl_1"] == alone["ppl_1"] and told["ppl_3"] < 0.8 * alone["ppl_3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        body = "\n".join(f"def function_{i}_{j}(value):\n    return value + {j}\n" for j in range(6))
        (folder / f"module{i}.py").write_text(body)
    return ["--data", str(folder), "--held-out-percent", "20"]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads, and so not as many as the command makes unless it is told."""
    folder = checkpoints.save_multi(tmp_path_factory.mktemp("models") / "heads", checkpoints.CONFIGS["neox"], 2)
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def test_heads_that_are_kept_get_a_draft_vocabulary_and_a_condition(
    heads: Path, data: list[str], recipe: Recipe, record: CorpusRecord, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    keep = ["--heads", "2", "--freeze-base", "--keep-heads", *SMALL]
    assert main(["heads", str(heads), *data, "--out", str(first), *keep, "--condition", "--draft-vocab", "20"]) == 0
    model, before = MultiTokenModel.load(first), MultiTokenModel.load(heads)
    for name, tensor in before.base.state_dict().items():
        assert torch.equal(tensor, model.base.state_dict()[name])
    moved = [(a - b).abs().max() for a, b in zip(model.heads.parameters(), before.heads.parameters(), strict=True)]
    assert 0 < max(moved) < 0.01  # two steps away, where new heads would be far
    tokens = np.fromfile(tmp_path / "first-work" / "tokens" / "tokens-train.bin", np.uint16)
    by_hand = sorted(Counter(tokens.tolist()).items(), key=lambda pair: (-pair[1], pair[0]))[:20]
    assert model.draft_vocabulary is not None and model.draft_vocabulary.tolist() == [token for token, _ in by_hand]
    assert model.conditioned and model.conditions[0].out.weight.any()

    # What is kept includes what the heads have of both; another table is counted if one is asked for.
    start = Start(find_checkpoint(first), load_base(first), lambda: TokenStreams(tokens, tokens, record), tmp_path)
    kept = TokenHeads(2, keeps=True).objective(start, recipe).model.state_dict()
    assert kept.keys() == model.state_dict().keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())
    assert main(["heads", str(first), *data, "--out", str(second), *keep, "--draft-vocab", "9"]) == 0
    again = MultiTokenModel.load(second)
    assert again.conditioned and again.draft_vocabulary is not None
    assert torch.equal(again.draft_vocabulary, model.draft_vocabulary[:9])

    stage = json.loads((second / "training.json").read_text())["heads"]
    assert (stage["draft_vocabulary"], stage["conditioned"]) == (9, True)
    assert stage["before"]["draft_vocabulary"] == 20 and "before" not in stage["before"]
    assert 0 < stage["figures"]["coverage"] < 1
    assert main(["card", str(second), *data]) == 0
    card = (second / "README.md").read_text()
    run = "2 steps, of 2 × 16 tokens (0.0 epochs), adamw, no autocast"
    covered = f"{stage['figures']['coverage']:.1%}"
    assert (
        f"- Heads: of the 9 most frequent tokens alone ({covered} of held-out labels); conditioned on the token in "
        f"front; {run}, base frozen; before that {run}, base frozen.\n"
    ) in card
    assert "| labels in the draft vocabulary; a further head's PPL is over those alone | " in card

    convert(second, tmp_path / "half", torch.float16)
    stored = load_file(tmp_path / "half" / "heads.safetensors")
    assert stored.pop("draft_vocabulary").dtype == torch.int64
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    half = MultiTokenModel.load(tmp_path / "half")
    assert torch.equal(half.draft_vocabulary, again.draft_vocabulary)


def test_new_heads_with_both(heads: Path, data: list[str], tmp_path: Path) -> None:
    """And a base that is trained along."""
    out = tmp_path / "out"
    arguments = ["heads", str(heads), *data, "--out", str(out), *SMALL, "--lr-base", "1e-2"]
    assert main([*arguments, "--draft-vocab", "320", "--condition"]) == 0
    model = MultiTokenModel.load(out)
    assert model.n_heads == 3 and model.conditioned
    assert model.draft_vocabulary is not None and sorted(model.draft_vocabulary.tolist()) == [*range(320)]
    before = AutoModelForCausalLM.from_pretrained(heads).state_dict()
    assert not any(torch.equal(before[name], tensor) for name, tensor in model.base.named_parameters())
    stage = json.loads((out / "training.json").read_text())["heads"]
    assert stage["figures"]["coverage"] == 1.0 and "before" not in stage


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draft-vocab", "321"], "a draft vocabulary has 1 to 320 words, not 321"),
        (["--keep-heads"], "has 2 heads: only as many can be kept, not 3"),
        (["--keep-heads", "--draft-vocab", "321", "--heads", "2"], "1 to 320 words"),
        (["--keep-heads", "PLAIN"], "has no heads.safetensors: train it first"),
    ],
)
def test_bad_input_is_one_clear_line_before_any_work(
    flags: list[str],
    message: str,
    heads: Path,
    data: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = str(heads)
    if "PLAIN" in flags:
        base, flags = str(checkpoints.save_plain(tmp_path / "plain", checkpoints.CONFIGS["neox"])), flags[:1]
    assert main(["heads", base, *data, "--out", str(tmp_path / "out"), *SMALL, *flags]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dynamo-train: error: ")]
    assert message in line
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("number", ["0", "-3", "many"])
def test_a_draft_vocabulary_of_no_words_is_refused(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["heads", "x", "--data", "y", "--out", "z", "--steps", "2", "--draft-vocab", number])
    assert exit.value.code == 2
    assert "argument --draft-vocab" in capsys.readouterr().err
