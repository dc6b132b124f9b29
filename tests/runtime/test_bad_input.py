"""Bad input: each ends in one clear line on stderr, nothing on stdout, and a non-zero exit."""

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import handmade

from dynamo_runtime.cli.run import main


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def replace_graph(copy, **arguments) -> None:
    onnx.save(handmade.build_graph(arguments.pop("vocab", 320), **arguments), str(copy.folder / "model.onnx"))
    copy.relist()


def replace_counts(copy, **arrays) -> None:
    np.savez(copy.folder / "cooccurrence.npz", **arrays)
    copy.relist()


def larger_tokenizer(copy) -> None:
    path = copy.folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["newcomer"] = 320
    path.write_text(json.dumps(content))
    copy.relist()


def drop_output(copy, name: str) -> None:
    path = str(copy.folder / "model.onnx")
    model = onnx.load(path)
    kept = [output for output in model.graph.output if output.name != name]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.save(model, path)
    copy.relist()


DAMAGES: dict[str, tuple[Callable, str]] = {
    "no manifest": (lambda c: (c.folder / "dynamo_config.json").unlink(), "no dynamo_config.json"),
    "broken manifest": (lambda c: shorten(c.folder / "dynamo_config.json"), "not readable"),
    "manifest of a list": (
        lambda c: (c.folder / "dynamo_config.json").write_text("[1]"),
        "not a JSON object",
    ),
    "later format": (lambda c: c.edit(format_version=4), "has format version 4; this program reads 2 and 3"),
    "unknown kind": (lambda c: c.edit(topology={"kind": "psychic"}), "kind 'psychic'"),
    "no topology": (lambda c: c.edit(topology=None), "field 'topology' is missing"),
    "topology without its size": (lambda c: c.edit(topology={"kind": "parallel"}), "field 'n_heads' is missing"),
    "topology too small": (lambda c: c.edit(topology={"kind": "parallel", "n_heads": 1}), "field 'n_heads' is 1"),
    "more heads than layers": (lambda c: c.edit(kv_layers=2), "field 'kv_layers' is 2, less than 3"),
    "quantization of wrong type": (
        lambda c: c.edit(quantization={"lossless": "no"}),
        "field 'lossless' is not true or false",
    ),
    "kind against heads, in version 2": (
        lambda c: c.edit(format_version=2, kind="plain", n_heads=3),
        "a plain bundle cannot have 3 heads",
    ),
    "field missing": (lambda c: c.edit(kv_heads=None), "field 'kv_heads' is missing"),
    "field of wrong type": (lambda c: c.edit(vocab_size="320"), "field 'vocab_size'"),
    "field too small": (lambda c: c.edit(head_size=0), "'head_size' is 0"),
    "eos outside": (lambda c: c.edit(eos_token_ids=[320]), "outside the vocabulary"),
    "file outside the folder": (lambda c: c.edit(files={"../x": {"bytes": 1}}), "outside its folder"),
    "sampling default out of range": (lambda c: c.edit(sampling={"temperature": -1}), "temperature"),
    "graph missing": (lambda c: (c.folder / "model.onnx").unlink(), "model.onnx is missing"),
    "counts missing": (lambda c: (c.folder / "cooccurrence.npz").unlink(), "cooccurrence.npz is missing"),
    "graph truncated": (lambda c: shorten(c.folder / "model.onnx"), "truncated or changed"),
    "tokenizer truncated": (lambda c: shorten(c.folder / "tokenizer.json"), "truncated or changed"),
    "no graph in it": (lambda c: (shorten(c.folder / "model.onnx"), c.relist()), "does not load"),
    "no tokenizer in it": (
        lambda c: (shorten(c.folder / "tokenizer.json"), c.relist()),
        "not a readable tokenizer",
    ),
    "no counts in it": (
        lambda c: (shorten(c.folder / "cooccurrence.npz"), c.relist()),
        "not a readable table",
    ),
    "tokenizer not there": (
        lambda c: ((c.folder / "tokenizer.json").unlink(), c.relist()),
        "tokenizer.json is missing",
    ),
    "heads missing": (lambda c: replace_graph(c, n_heads=2), "no input past_key_values.3.key"),
    "heads left over": (lambda c: replace_graph(c, n_heads=4), "past_key_values.4.key"),
    "top-k missing": (lambda c: drop_output(c, "topk_ids"), "no output topk_ids"),
    "other vocabulary in the graph": (lambda c: replace_graph(c, n_heads=3, vocab=300), "vocabulary of 300"),
    "other top-k in the graph": (lambda c: replace_graph(c, n_heads=3, top_k=64), "top_k_outputs of 64"),
    "other head size": (lambda c: c.edit(head_size=8), "head_size of 16 where the manifest says 8"),
    "tokenizer larger than the graph": (larger_tokenizer, "does not belong to this graph: it has token 320"),
    "other tokenizer": (lambda c: c.edit(tokenizer_size=321), "exported with 321"),
    "counts of another vocabulary": (
        lambda c: replace_counts(
            c, totals=[9, 9], counts_1=np.ones(9, int), offsets_2=np.zeros(10, int), ids_2=[], counts_2=[]
        ),
        "vocabulary of 9",
    ),
    "counts that do not fit together": (
        lambda c: replace_counts(
            c, totals=[9, 9], counts_1=np.ones(320, int), offsets_2=np.zeros(9, int), ids_2=[1], counts_2=[1]
        ),
        "do not fit together",
    ),
    "tokenizer not listed": (
        lambda c: c.edit(files={"model.onnx": handmade.listed(c.folder)["model.onnx"]}),
        "would be read, and dynamo_config.json does not list it",
    ),
    "graph not listed": (
        lambda c: c.edit(files={"tokenizer.json": handmade.listed(c.folder)["tokenizer.json"]}),
        "does not list its own graph",
    ),
    "counts of single tokens only": (
        lambda c: replace_counts(c, totals=[9], counts_1=np.ones(320, int)),
        "at least pairs",
    ),
}


def assert_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str, code: int = 1) -> None:
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dynamo-run: error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    assert message in err


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_bundles(copied, capsys, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(copied)
    assert_refused(capsys, [str(copied.folder), "x", "--max-new-tokens", "3"], message)


@pytest.mark.parametrize("flags", [[], ["--verify"]])
@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "cooccurrence.npz"])
def test_a_changed_byte_is_found(copied, capsys, name: str, flags: list[str]) -> None:
    """At the next load, whether asked to verify or not."""
    assert main([str(copied.folder), "x", *flags, "--max-new-tokens", "1"]) == 0
    capsys.readouterr()
    flip_a_byte(copied.folder / name)
    assert_refused(capsys, [str(copied.folder), "x", *flags], f"{name} does not have the sha256")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "nan"], "temperature must be a finite number"),
        (["--temperature", "-1"], "temperature"),
        (["--top-k", "-1"], "top_k"),
        (["--strategy", "dynamo", "--top-k", "0"], "top_k of at least 1"),
        (["--top-p", "0"], "top_p"),
        (["--repetition-penalty", "inf"], "repetition_penalty"),
        (["--strategy", "dynamo", "--backoff-threshold", "1.5"], "backoff_threshold must be"),
        (["--strategy", "dynamo", "--cooccurrence-weight", "2"], "cooccurrence_weight must be"),
        (["--backoff-threshold", "0.5"], "strategy auto does not read backoff_threshold: it is for dynamo"),
        (["--target-speedup", "2"], "strategy auto does not read target_speedup: it is for dynamo"),
        (["--strategy", "dynamo", "--draft-tokens", "2"], "does not read draft_tokens: it is for auto and speculative"),
        (["--strategy", "dynamo", "--target-speedup", "2", "--backoff-threshold", "1"], "give one of them"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--seed", "-3"], "seed"),
        (["--stop", ""], "stop string"),
        (["--strategy", "psychic"], "unknown strategy 'psychic'"),
        (["--provider", "tpu"], "unknown execution provider 'tpu'"),
        (["--provider", "cuda"], "execution provider cuda is not in the installed onnxruntime, which has"),
        (["--threads", "0"], "threads"),
        (["--threads", "10000"], "threads must be at most "),
        (["--max-length", "100000"], "max_length"),
        (["--compare", "--compare-with", "/nowhere.onnx"], "/nowhere.onnx does not exist"),
        (["--compare", "--repeats", "0"], "repeats"),
        (["--repeats", "2"], "are for --compare"),
        (["--compare-with", "x"], "are for --compare"),
    ],
)
def test_bad_flags(multi: Path, capsys, arguments: list[str], message: str) -> None:
    assert_refused(capsys, [str(multi), "x", *arguments], message)


def test_bad_prompts_and_paths(multi: Path, copied, capsys) -> None:
    assert_refused(capsys, [str(multi), ""], "the prompt is empty")
    assert_refused(capsys, [str(multi), "x " * 2000], "more than the context of 640")
    assert_refused(capsys, [str(multi), "x" * 640_001], "640001 characters, more than any 640 tokens say")
    assert_refused(capsys, [str(multi), "x\udcff"], "not valid UTF-8")
    assert_refused(capsys, ["/nowhere/model.onnx", "x"], "/nowhere/model.onnx does not exist")
    assert_refused(capsys, [str(copied.folder / "tokenizer.json"), "x"], "is not the graph of the bundle")
    assert_refused(capsys, [str(multi), "x", "--compare", "--compare-with", str(copied.folder)], "not a plain bundle")


def test_mask_without_counts(copied, capsys) -> None:
    (copied.folder / "cooccurrence.npz").unlink()
    copied.relist()
    for flags in (["dynamo", "--cooccurrence-weight", "1"], ["speculative", "--draft-cooccurrence-weight", "1"]):
        assert_refused(capsys, [str(copied.folder), "x", "--strategy", *flags], "no n-gram counts")
    assert main([str(copied.folder), "x", "--max-new-tokens", "3"]) == 0


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (["onnxruntime", "onnxruntime-gpu"], "onnxruntime and onnxruntime-gpu are both installed"),
        ([], "onnxruntime is not installed: install dynamo-edge[cpu]"),
        (["onnxruntime-gpu"], "onnxruntime-gpu is installed but does not load"),
    ],
)
def test_no_or_two_onnxruntimes(multi: Path, capsys, monkeypatch, installed: list[str], message: str) -> None:
    def distribution(name: str) -> None:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    if len(installed) < 2:
        monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)  # importing it fails
    assert_refused(capsys, [str(multi), "x"], message)


@pytest.mark.parametrize(
    "arguments", [["--temperature", "warm"], ["--adaptive-threshold", "median"], ["--no-such-flag"]]
)
def test_what_argparse_refuses_is_one_line_too(multi: Path, capsys, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([str(multi), "x", *arguments])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("dynamo-run: error: ")
    assert err.count("\n") == 1
