"""The whole way on a tiny corpus: text → base → heads and counts → bundle → text on the device."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynamo_export.cli import main as export
from dynamo_runtime import Engine
from dynamo_runtime.cli.run import main as run
from dynamo_runtime.cooccurrence import load_cooccurrence
from dynamo_train.train import main as train

SMALL = ["--sequences", "4", "--length", "32", "--micro-batch", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything the pipeline makes: corpus, base, t3, cp, all drafters in one, and their bundles."""
    root = tmp_path_factory.mktemp("pipeline")
    (root / "corpus").mkdir()
    for i in range(60):
        body = "".join(f"def add_{j}(value):\n    return value + {j}\n\n\n" for j in range(5))
        (root / "corpus" / f"module{i}.py").write_text(f"# {i}\n{body}")
    data = ["--data", str(root / "corpus"), "--held-out-percent", "15"]
    shape = ["--hidden-size", "64", "--layers", "2", "--attention-heads", "2", "--vocab-size", "300"]
    assert train(["base", *data, "--out", str(root / "base"), "--steps", "40", *shape, *SMALL]) == 0
    heads = ["heads", str(root / "base"), *data, "--out", str(root / "t3"), "--steps", "40", *SMALL]
    assert train([*heads, "--freeze-base", "--lr-heads", "0.01"]) == 0
    assert train(["counts", str(root / "t3"), *data]) == 0
    joint = ["cp", str(root / "t3"), *data, "--out", str(root / "cp"), "--steps", "20", "--rank", "2", *SMALL]
    assert train([*joint, "--tokens", "3", "--freeze-base", "--lr-heads", "0.01"]) == 0
    ahead = ["lookahead", str(root / "cp"), *data, "--out", str(root / "all"), "--steps", "20", "--tokens", "2", *SMALL]
    assert train([*ahead, "--anchors", "8"]) == 0
    for drafter in ("cp", "lookahead"):
        bundle = root / f"bundle-{drafter}" / "model.onnx"
        assert export(["-m", str(root / "all"), str(bundle), "--drafter", drafter]) == 0
    assert export(["-m", str(root / "t3"), str(root / "bundle" / "model.onnx")]) == 0
    assert export(["-m", str(root / "t3"), str(root / "bundle-plain" / "model.onnx"), "--heads", "0"]) == 0
    return root


def test_greedy_text_is_the_torch_models(folder: Path) -> None:
    prompt = "def add_1(value):\n    return"
    tokenizer = AutoTokenizer.from_pretrained(folder / "t3")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = AutoModelForCausalLM.from_pretrained(folder / "t3").generate(ids, do_sample=False, max_new_tokens=40)
    for bundle in ("bundle", "bundle-plain"):
        engine = Engine(folder / bundle, provider="cpu", threads=1)
        result = engine.generate(
            prompt, strategy="autoregressive", temperature=0, repetition_penalty=1, max_new_tokens=40
        )
        assert result.tokens == expected[0, ids.shape[1] :].tolist()


def test_counts_reach_the_mask(folder: Path) -> None:
    counts = load_cooccurrence(folder / "bundle" / "cooccurrence.npz", 300)
    tokens = np.fromfile(folder / "t3-work" / "tokens" / "tokens-train.bin", np.uint16).tolist()
    grams = [gram for gram in itertools.pairwise(tokens) if gram[0] != 0]
    first = sorted(set(tokens))
    parent, rank, nodes = counts.extend(2, np.asarray(first), np.asarray(first))
    frequency = counts.mask(2, nodes, np.ones(len(nodes)), 1.0)
    found = {(first[p], first[r]): f for p, r, f in zip(parent, rank, frequency, strict=True)}
    assert found.keys() == set(grams)
    some = grams[7]
    assert found[some] == pytest.approx(grams.count(some) / len(grams))


def test_dynamo_writes_several_tokens_a_pass(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(folder / "bundle" / "model.onnx")
    arguments = [bundle, "def add_1(value):\n", "--seed", "1", "--max-new-tokens", "48", "--threads", "1"]
    assert run([*arguments, "--strategy", "dynamo", "--backoff-threshold", "0.3", "--compare", "--repeats", "1"]) == 0
    captured = capsys.readouterr()
    statistics, comparison = captured.err.strip().splitlines()[-2:]
    assert "return" in captured.out
    assert statistics.startswith("dynamo:") and "48 new" in statistics
    assert "bundle-plain" in comparison and "ratio" in comparison
    options = {"strategy": "dynamo", "seed": 1, "max_new_tokens": 48, "backoff_threshold": 0.3}
    result = Engine(bundle, threads=1).generate("def add_1(value):\n", **options)
    assert result.text == captured.out
    assert result.statistics.tokens_per_pass > 1.2


@pytest.mark.parametrize("bundle", ["bundle", "bundle-cp", "bundle-lookahead"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_verified_text_is_plain_text(folder: Path, bundle: str, temperature: float) -> None:
    """Trained drafters, real tokenizer, real counts: the plain bundle's text from the same seed, in fewer rounds."""
    # With as many threads as there are cores, sums could be split up in another way on every machine.
    plain, drafting = (Engine(folder / name, provider="cpu", threads=1) for name in ("bundle-plain", bundle))
    options = {"temperature": temperature, "max_new_tokens": 60, "ignore_eos": True, "seed": 5}
    rounds = 0
    for prompt in ("def add_1(value):\n    return", "# 7\ndef add", "value"):
        expected = plain.generate(prompt, strategy="autoregressive", **options)
        found = drafting.generate(prompt, strategy="speculative", **options)
        assert found.tokens == expected.tokens
        rounds += found.statistics.rounds
    assert rounds < 3 * 60
