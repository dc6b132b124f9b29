"""What lies beside the graph: sampling defaults, end tokens, tokenizer and chat template."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints, damaged
from support.tiny_gguf import write_gguf
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dynamo_export import ExportError, cli, export_bundle, parity
from dynamo_export.beside import sampling_of
from dynamo_model import MultiTokenModel, sources
from dynamo_runtime import Engine, PromptError
from dynamo_runtime.bundle import Bundle, load_bundle
from dynamo_runtime.cli.run import main as run

TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_once: None) -> Callable[..., Bundle]:
    """`exported(plant)`: the plain bundle of a checkpoint after `plant(folder)`; parity is tested elsewhere."""
    monkeypatch.setattr(parity, "reference", lambda inspected, length: ([], []))

    def get(plant: Callable[[Path], Any]) -> Bundle:
        folder = checkpoints.save_plain(tmp_path / "checkpoint", checkpoints.CONFIGS["llama-grouped"])
        plant(folder)
        return load_bundle(export_bundle(tmp_path / "out" / "model.onnx", folder, heads=0), verify=True)

    return get


@pytest.mark.parametrize(
    ("said", "sampling"),
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 20}, {"temperature": 0.0, "top_k": 20}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"temperature": None, "repetition_penalty": 1.05, "max_length": 20}, {"repetition_penalty": 1.05}),
    ],
)
def test_sampling_defaults_are_the_models(said: dict[str, Any], sampling: dict[str, Any]) -> None:
    """What generation_config.json says, zeros included, and nothing else."""
    assert sampling_of(said) == sampling


def test_sampling_out_of_range() -> None:
    """Is refused, as it would be on a device."""
    with pytest.raises(ExportError, match=r"generation_config\.json: temperature must be"):
        sampling_of({"temperature": -1.0})


def test_do_sample_false_is_greedy(exported: Callable[..., Bundle]) -> None:
    """In the bundle's own defaults."""
    bundle = exported(lambda folder: damaged.configure(folder, "generation_config.json", do_sample=False, top_k=0))
    assert bundle.sampling == {"temperature": 0.0, "top_k": 0}
    assert bundle.parameters().greedy and bundle.parameters().repetition_penalty == 1.0


def _three_ends(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    damaged.configure(folder, "config.json", eos_token_id=7)
    damaged.configure(folder, "generation_config.json", eos_token_id=[5, 400])
    damaged.configure(folder, "tokenizer_config.json", eos_token={"content": "<|end|>", "__type": "AddedToken"})


def test_end_tokens_are_what_all_three_name(exported: Callable[..., Bundle]) -> None:
    """Those of generation_config.json, config.json and the tokenizer that the model has; genai gets them too."""
    bundle = exported(_three_ends)
    end = bundle.tokenizer.token_to_id("<|end|>")
    assert set(bundle.eos_token_ids) == {5, 7, end}
    genai = json.loads((bundle.folder / "genai_config.json").read_text())
    assert set(genai["model"]["eos_token_id"]) == {5, 7, end}


def test_no_end_token_is_said(exported: Callable[..., Bundle], caplog: pytest.LogCaptureFixture) -> None:
    """Texts then go on until their limit."""

    def plant(folder: Path) -> None:
        damaged.configure(folder, "config.json", eos_token_id=None)
        damaged.configure(folder, "generation_config.json", eos_token_id=None)

    with caplog.at_level(logging.WARNING, "dynamo_export"):
        assert exported(plant).eos_token_ids == ()
    assert "names no token that ends a text" in caplog.text


def test_added_tokens_without_an_embedding(exported: Callable[..., Bundle], caplog: pytest.LogCaptureFixture) -> None:
    """The tokenizer loads as in transformers; a prompt with such a token is refused when it comes."""
    with caplog.at_level(logging.WARNING, "dynamo_export"):
        bundle = exported(damaged.FAULTS["more added tokens"].plant)
    assert "2 added tokens of the tokenizer have no embedding" in caplog.text
    engine = Engine(bundle)
    assert engine.encode("def f") and engine.encode("<more 0>")
    beyond = next(t for t, i in bundle.tokenizer.get_vocab().items() if i == checkpoints.VOCAB)
    with pytest.raises(PromptError, match="token ids outside"):
        engine.encode(f"def {beyond}")


@pytest.mark.parametrize("where", ["file", "configuration"])
def test_chat_template_goes_along(where: str, exported: Callable[..., Bundle]) -> None:
    """As it lies in the checkpoint; the runtime renders it, and onnxruntime-genai finds it."""

    def plant(folder: Path) -> None:
        if where == "file":
            (folder / "chat_template.jinja").write_text(TEMPLATE)
        else:
            damaged.configure(folder, "tokenizer_config.json", chat_template=TEMPLATE)

    bundle = exported(plant)
    messages = [{"role": "user", "content": "def"}]
    assert bundle.chat_template.render(messages) == "<|user|>def<|end|>"
    import onnxruntime_genai

    tokenizer = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(bundle.folder)))
    rendered = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    assert rendered == "<|user|>def<|end|>"


def test_other_tokenizers_are_converted(exported: Callable[..., Bundle]) -> None:
    """One that is kept in another form becomes a tokenizer.json, with the template that it has."""

    def plant(folder: Path) -> None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
        words = {word: i for i, word in enumerate(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get))}
        merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
        (folder / "vocab.json").write_text(json.dumps(words))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges))
        (folder / "tokenizer.json").unlink()
        damaged.configure(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", chat_template=TEMPLATE)

    bundle = exported(plant)
    text = "def fib(n):\n    return n"
    assert bundle.tokenizer.encode(text).ids == checkpoints.train_tokenizer().encode(text).ids
    assert bundle.chat_template.source == TEMPLATE
    assert AutoTokenizer.from_pretrained(bundle.folder).chat_template == TEMPLATE


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And without it an error nobody expected is one line all the same."""
    folder = checkpoints.save_plain(tmp_path / "checkpoint", checkpoints.CONFIGS["llama-grouped"])

    def broken(*arguments: object) -> None:
        raise RuntimeError("first line\nsecond line")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynamo_export.export.build_graphs", broken)
        patch.setattr(parity, "reference", lambda inspected, length: ([], []))
        for flags, traceback in (([], False), (["--debug"], True)):
            assert cli.main(["-o", str(tmp_path / "out"), "-m", str(folder), "--heads", "0", *flags]) == 1
            errors = capsys.readouterr().err
            assert ("Traceback" in errors) == traceback
            line = errors.strip().splitlines()[-1]
            assert line.startswith("dynamo-export: error: RuntimeError: first line second line (nobody expected this")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_known_model_has_a_place_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exported by its name, plain and without an output; again, it is replaced; it runs by its name."""
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv("DYNAMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sources.KNOWN, "tiny", replace(sources.KNOWN["smollm2"], drafters=None))
    monkeypatch.setattr(sources, "_known_file", lambda name, model: tmp_path / "tiny.gguf")
    monkeypatch.chdir(tmp_path)
    for arguments in ([], [], ["--quantize", "int8", "--allow-degraded"]):
        assert cli.main(["-m", "tiny", *arguments]) == 0
        assert "`dynamo-run -m tiny --chat` talks to it" in capsys.readouterr().err
    folder = tmp_path / "cache" / "bundles" / "tiny"
    assert {path.name for path in folder.iterdir()} == {"fp32", "int8"}
    assert load_bundle("tiny").folder == folder / "int8"
    assert load_bundle(folder / "fp32").source.model == "tiny"
    assert run(["-m", "tiny", "--chat", "def", "--max-new-tokens", "4", "--threads", "1"]) == 0


def test_a_known_model_brings_the_heads_that_ship_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their n-gram counts, by its name alone; without heads where that is asked for. Either says what shipped."""
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    model = MultiTokenModel(write_gguf(tmp_path / "tiny.gguf"), 3)
    MultiTokenModel.write(shipped, model.drafter_state_dict(), model.shape, eight_bits=True)
    checkpoints.save_counts(shipped)
    monkeypatch.setenv("DYNAMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sources.KNOWN, "tiny", replace(sources.KNOWN["smollm2"], drafters=shipped))
    monkeypatch.setattr(sources, "_known_file", lambda name, model: tmp_path / "tiny.gguf")
    assert cli.main(["-m", "tiny"]) == 0
    bundle = load_bundle("tiny")
    assert bundle.topology.n_tokens == 3 and bundle.has_cooccurrence
    assert cli.main(["-m", "tiny", "--heads", "0", "-o", str(tmp_path / "plain")]) == 0
    plain = load_bundle(tmp_path / "plain")
    assert plain.topology.n_tokens == 1
    written = hashlib.sha256((shipped / MultiTokenModel.file).read_bytes()).hexdigest()
    assert bundle.source.drafters == plain.source.drafters == {MultiTokenModel.file: written}
