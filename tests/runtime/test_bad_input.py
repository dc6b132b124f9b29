"""Bad input: each ends in one clear line on stderr, nothing on stdout, and a non-zero exit."""

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import handmade

from dynamo_runtime import Backend, Engine, load_bundle
from dynamo_runtime.cli.run import main


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def replace_graph(copy, **arguments) -> None:
    handmade.save_graphs(copy.folder, arguments.pop("vocab", 320), **arguments)
    copy.relist()


def replace_drafter(copy, **arguments) -> None:
    """Another drafter's graph behind the same base, with its manifest as it was."""
    graphs = handmade.build_graphs(320, **{"n_heads": 3, **arguments})
    onnx.save(graphs["drafter.onnx"], str(copy.folder / "drafter.onnx"))
    copy.relist()


def drafter(copy, **changes) -> None:
    """Change fields of the manifest's record of the drafter; a value of None removes the field."""
    record = json.loads((copy.folder / "dynamo_config.json").read_text())["drafter"] | changes
    copy.edit(drafter={name: value for name, value in record.items() if value is not None})


def edit_drafter(copy, change: Callable[[onnx.GraphProto], None]) -> None:
    path = str(copy.folder / "drafter.onnx")
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    copy.relist()


def ends(graph: onnx.GraphProto, name: str) -> onnx.ValueInfoProto:
    (found,) = [each for each in (*graph.input, *graph.output) if each.name == name]
    return found


def of_width(name: str, axis: int, size: int) -> Callable:
    def change(graph: onnx.GraphProto) -> None:
        ends(graph, name).type.tensor_type.shape.dim[axis].dim_value = size

    return lambda c: edit_drafter(c, change)


def of_type(name: str, kind: int) -> Callable:
    def change(graph: onnx.GraphProto) -> None:
        ends(graph, name).type.tensor_type.elem_type = kind

    return lambda c: edit_drafter(c, change)


def renamed(name: str) -> Callable:
    def change(graph: onnx.GraphProto) -> None:
        ends(graph, name).name = "other"
        for node in graph.node:
            node.input[:] = ["other" if each == name else each for each in node.input]
            node.output[:] = ["other" if each == name else each for each in node.output]

    return lambda c: edit_drafter(c, change)


def told(change: Callable) -> Callable:
    """The same to a drafter whose heads are conditioned."""

    def both(copy) -> None:
        replace_drafter(copy, conditioned=True)
        drafter(copy, conditioned=True)
        change(copy)

    return both


def one_state_a_row(graph: onnx.GraphProto) -> None:
    """Puts out the states of the first head alone."""
    (join,) = [node for node in graph.node if node.op_type == "Concat" and node.output[0] == "side_by_side"]
    del join.input[1:]


def elsewhere(copy, location: str, write: bool = True) -> None:
    """Has the drafter's graph read weights from a file that is not listed."""
    handmade.refer(copy.folder / "drafter.onnx", copy.folder / "model.onnx", location)
    copy.relist()
    if write:
        (copy.folder / location).write_bytes((copy.folder / "model.onnx").read_bytes())


def words(copy, ids: list[int], **changes) -> None:
    """A drafter with a table of words, of which its record says something else."""
    replace_drafter(copy, vocabulary=ids)
    drafter(copy, **{"vocabulary": ids, "top_k_outputs": min(64, len(ids)), **changes})


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
    "later format": (lambda c: c.edit(format_version=5), "has format version 5; this program reads 2, 3, 4:"),
    "unknown kind": (lambda c: c.edit(topology={"kind": "psychic"}), "kind 'psychic'"),
    "no topology": (lambda c: c.edit(topology=None), "field 'topology' is missing"),
    "topology without its size": (lambda c: c.edit(topology={"kind": "parallel"}), "field 'n_heads' is missing"),
    "topology too small": (lambda c: c.edit(topology={"kind": "parallel", "n_heads": 1}), "field 'n_heads' is 1"),
    "more heads than layers": (
        lambda c: c.edit(format_version=3, kv_layers=2),
        "field 'kv_layers' is 2, less than 3",
    ),
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
    "heads missing": (lambda c: replace_graph(c, n_heads=2), "drafter.onnx has no past_key_values.1.key"),
    "heads left over": (lambda c: replace_graph(c, n_heads=4), "drafter.onnx has past_key_values.2.key, which"),
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
        lambda c: c.edit(files={n: r for n, r in handmade.listed(c.folder).items() if n != "tokenizer.json"}),
        "would be read, and dynamo_config.json does not list it",
    ),
    "graph not listed": (
        lambda c: c.edit(files={"tokenizer.json": handmade.listed(c.folder)["tokenizer.json"]}),
        "does not list its own graph",
    ),
    "drafter's graph missing": (lambda c: (c.folder / "drafter.onnx").unlink(), "drafter.onnx is missing"),
    "drafter's graph truncated": (lambda c: shorten(c.folder / "drafter.onnx"), "truncated or changed"),
    "drafter's graph none": (lambda c: (shorten(c.folder / "drafter.onnx"), c.relist()), "does not load"),
    "drafter's graph not listed": (
        lambda c: c.edit(files={n: r for n, r in handmade.listed(c.folder).items() if n != "drafter.onnx"}),
        "does not list its own graph drafter.onnx",
    ),
    "no record of the drafter": (lambda c: c.edit(drafter=None), "field 'kv_layers' is 2, less than 3"),
    "record of the drafter, a text": (lambda c: c.edit(drafter="drafter.onnx"), "field 'drafter' is missing or not a"),
    "record without its size": (lambda c: drafter(c, top_k_outputs=None), "field 'top_k_outputs' is missing"),
    "drafter elsewhere": (lambda c: drafter(c, graph="../drafter.onnx"), "names a file outside its folder"),
    "drafter in a folder": (lambda c: drafter(c, graph="a/drafter.onnx"), "in a folder of its own"),
    "drafter the base itself": (lambda c: drafter(c, graph="model.onnx"), "cannot be the same graph"),
    "drafter of a plain bundle": (lambda c: c.edit(topology={"kind": "plain"}), "a plain bundle has no drafter's"),
    "drafter of truths": (lambda c: drafter(c, conditioned=1), "field 'conditioned' is not true or false"),
    "other top-k of drafts": (lambda c: drafter(c, top_k_outputs=63), "topk_logits has the shape"),
    "top-k beyond the words": (lambda c: words(c, [5, 6, 7], top_k_outputs=4), "of the drafter exceeds its vocabulary"),
    "words outside the vocabulary": (lambda c: drafter(c, vocabulary=[5, 320]), "not a set of tokens"),
    "words twice": (lambda c: drafter(c, vocabulary=[5, 5]), "not a set of tokens"),
    "no words": (lambda c: drafter(c, vocabulary=[]), "not a set of tokens"),
    "words below 0": (lambda c: drafter(c, vocabulary=[-1]), "field 'vocabulary' is -1, less than 0"),
    "words of texts": (lambda c: drafter(c, vocabulary=["a"]), "field 'vocabulary' is not a short list"),
    "words, a text": (lambda c: drafter(c, vocabulary="all"), "field 'vocabulary' is missing or not a list"),
    "other words than the graph's": (
        lambda c: words(c, [5, 6, 7], vocabulary=[5, 6, 8]),
        "makes drafts of other words",
    ),
    "words in another order": (lambda c: words(c, [5, 6, 7], vocabulary=[5, 7, 6]), "makes drafts of other words"),
    "graph's words outside the vocabulary": (
        lambda c: words(c, [5, 6, -9], vocabulary=[5, 6, 7]),
        "makes drafts of other words",
    ),
    "fewer words than said": (lambda c: words(c, [5, 6, 7], vocabulary=[5, 6, 7, 8]), "logits has the shape"),
    "conditioned, not said": (
        lambda c: replace_drafter(c, conditioned=True),
        "which its manifest does not account for",
    ),
    "said to be conditioned": (lambda c: drafter(c, conditioned=True), "drafter.onnx has no head_states"),
    "drafter of another topology": (lambda c: replace_drafter(c, kind="cp", rank=2), "drafter.onnx has no past_key"),
    "drafter's states renamed": (told(renamed("head_states")), "drafter.onnx has no head_states"),
    "base's states renamed": (renamed("penultimate_states"), "drafter.onnx has no penultimate_states"),
    "drafts renamed": (told(renamed("draft_states")), "draft"),
    "drafter's words renamed": (renamed("topk_ids"), "drafter.onnx has no topk_ids"),
    "drafter's states too wide": (of_width("penultimate_states", 2, 64), "drafter.onnx"),
    "drafts too wide": (told(of_width("draft_states", 2, 64)), "drafter.onnx"),
    "drafter's caches of more heads": (of_width("past_key_values.0.key", 1, 3), "drafter.onnx"),
    "drafter's caches of doubles": (of_type("past_key_values.0.key", onnx.TensorProto.DOUBLE), "drafter.onnx"),
    "drafts of halves": (told(of_type("draft_states", onnx.TensorProto.FLOAT16)), "drafter.onnx"),
    "one state a row": (lambda c: edit_drafter(c, one_state_a_row), "not the graph its manifest describes"),
    "weights in an unlisted file": (lambda c: elsewhere(c, "more"), "drafter.onnx has weights in 'more', which"),
    "weights outside": (lambda c: elsewhere(c, "../secret", False), "drafter.onnx has weights in '../secret', which"),
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
@pytest.mark.parametrize("name", ["model.onnx", "drafter.onnx", "tokenizer.json", "cooccurrence.npz"])
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


def test_an_unlisted_file_is_not_opened(copied, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by onnxruntime, which reads whatever a graph names."""
    elsewhere(copied, "more")
    monkeypatch.setattr(Backend, "start", lambda *arguments, **more: pytest.fail("onnxruntime was given the graph"))
    assert_refused(capsys, [str(copied.folder), "x"], "drafter.onnx has weights in 'more'")


@pytest.mark.parametrize("conditioned", [False, True])
def test_weights_of_the_base_are_read_from_its_file(tmp_path: Path, conditioned: bool) -> None:
    """As export writes them: listed, and the same text as with weights of its own."""
    found, options = [], {"conditioned": conditioned, "draft_top_k": 50}
    for shared in (False, True):
        graph = handmade.write_bundle(tmp_path / str(shared), 3, graph={**options, "shared": shared})
        engine = Engine(load_bundle(graph, verify=True), threads=1)
        found.append(engine.generate("def f", strategy="dynamo", max_new_tokens=9, seed=1).tokens)
    sizes = [(tmp_path / str(shared) / "drafter.onnx").stat().st_size for shared in (False, True)]
    assert found[0] == found[1] and sizes[1] < sizes[0] - 320 * 32 * 4


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


@pytest.mark.parametrize("arguments", [["--temperature", "warm"], ["--first-token", "last"], ["--no-such-flag"]])
def test_what_argparse_refuses_is_one_line_too(multi: Path, capsys, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([str(multi), "x", *arguments])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("dynamo-run: error: ")
    assert err.count("\n") == 1
