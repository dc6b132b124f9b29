"""A run goes on exactly where it was, only if it is the same run, and whatever ended it."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import train_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from dynamo_model import MultiTokenModel
from dynamo_runtime import files
from dynamo_runtime.errors import OutputError
from dynamo_train import TrainingError, loop, pipeline, state
from dynamo_train.parallel import ModifiedCLM
from dynamo_train.recipe import Recipe
from dynamo_train.tokens import CorpusRecord, TokenStreams, tokenize_corpus

VOCAB = 31


def make(seed: int = 0, **changes: Any) -> ModifiedCLM:
    """With dropout, so that random numbers matter."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **shape | {"vocab_size": VOCAB, "attention_dropout": 0.2, "tie_word_embeddings": True} | changes
    )
    return ModifiedCLM(MultiTokenModel(AutoModelForCausalLM.from_config(config), 3), 0.1)


@pytest.fixture
def streams(record: CorpusRecord) -> TokenStreams:
    rng = np.random.default_rng(0)
    train, held_out = (np.cumsum(rng.integers(1, 3, n)) % VOCAB for n in (400, 100))
    return TokenStreams(train.astype(np.uint16), held_out.astype(np.uint16), record)


def weights(objective: ModifiedCLM) -> dict[str, torch.Tensor]:
    return objective.model.state_dict()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_ctrl_c_at_any_moment_ends_bit_equal(
    optimizer: str, recipe: Recipe, streams: TokenStreams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an optimizer's step, or behind forward passes that drew random numbers."""
    recipe = replace(recipe, optimizer=optimizer, validate_every=2)
    whole = make()
    loop.train(whole, streams, recipe, tmp_path / "whole")
    step, backward = torch.optim.AdamW.step, torch.autograd.backward

    def after(call: Callable[..., Any], at: int) -> Callable[..., Any]:
        calls = iter(range(1000))

        def interrupting(*arguments: Any, **settings: Any) -> Any:
            result = call(*arguments, **settings)
            if next(calls) == at:
                signal.raise_signal(signal.SIGINT)
            return result

        return interrupting

    for owner, name, call, at in ((torch.optim.AdamW, "step", step, 2), (torch.autograd, "backward", backward, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, after(call, at))
            with pytest.raises(KeyboardInterrupt):
                loop.train(make(), streams, recipe, tmp_path / "cut")
    cut = make()
    loop.train(cut, streams, recipe, tmp_path / "cut")
    assert all(torch.equal(weights(whole)[name], tensor) for name, tensor in weights(cut).items())
    for name in ("metrics.jsonl", "checkpoint/progress.json"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_checkpoints_are_apart(
    recipe: Recipe, streams: TokenStreams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By steps and by time: of a small model one takes longer than a step."""
    saved, save = list[int](), loop._Run.save

    def noting(run: loop._Run) -> None:
        saved.append(run.step)
        save(run)

    monkeypatch.setattr(loop._Run, "save", noting)
    for seconds, steps in ((0, [2, 4, 6]), (60.0, [6])):
        saved.clear()
        loop.train(make(), streams, recipe, tmp_path / str(seconds), checkpoint_every=2, checkpoint_seconds=seconds)
        assert saved == steps


SCRIPT = """
import hashlib, json, os, signal, sys
from pathlib import Path
from dynamo_runtime import files
from dynamo_train import loop
sys.path.insert(0, sys.argv[1])
from test_resuming import make
from dynamo_train.tokens import CorpusRecord, TokenStreams
import numpy as np
tokens = (np.arange(400) * 7 % 31).astype(np.uint16)
streams = TokenStreams(tokens, tokens[:100], CorpusRecord("test", 2, 1, 500, 400, 100, 6.0, "0" * 64))
calls = []
def killing(call):
    def wrapper(*arguments):
        result = call(*arguments)
        calls.append(1)
        if len(calls) == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapper
if sys.argv[3] == "renamed":
    files._exchange = lambda new, folder: False
    os.rename = killing(os.rename)
elif sys.argv[3] == "exchanged":
    files._exchange = killing(files._exchange)
objective = make()
recipe = loop.Recipe(**json.loads(sys.argv[5]))
loop.train(objective, streams, recipe, Path(sys.argv[2]), checkpoint_every=2, checkpoint_seconds=0)
print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in objective.model.state_dict().values())).hexdigest())
"""


@pytest.mark.skipif(os.name == "nt", reason="kills with a signal")
@pytest.mark.slow
def test_killed_while_a_checkpoint_is_replaced_nothing_is_lost(recipe: Recipe, tmp_path: Path) -> None:
    """Between the two renames, and right behind an exchange: the run goes on, and ends as if nothing had been."""

    def run(folder: str, how: str = "", at: int = 0) -> subprocess.CompletedProcess[str]:
        settings = json.dumps(recipe.__dict__)
        arguments = [str(Path(__file__).parent), str(tmp_path / folder), how, str(at), settings]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", SCRIPT, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    whole = run("whole")
    assert whole.returncode == 0, whole.stderr
    # The first checkpoint of the three takes one rename; the second is killed behind the first of its own.
    for how, at in (("renamed", 2), ("exchanged", 1)):
        assert run(how, how, at).returncode == -signal.SIGKILL
        again = run(how)
        assert again.returncode == 0, again.stderr
        assert again.stdout == whole.stdout
        lines = (tmp_path / how / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert sorted(path.name for path in (tmp_path / how).iterdir()) == ["checkpoint", "metrics.jsonl"]


class Poison:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (os.environ["POISONED"],)


def test_nothing_is_unpickled(
    recipe: Recipe, streams: TokenStreams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POISONED", str(tmp_path / "poisoned"))
    loop.train(make(), streams, recipe, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    for name in (
        "random_states_0.pkl",
        "optimizer.bin",
        "scheduler.bin",
        "custom_checkpoint_0.pkl",
        "pytorch_model.bin",
    ):
        (folder / name).write_bytes(pickle.dumps(Poison()))
    loop.train(make(), streams, recipe, tmp_path / "run")
    for path in list(folder.glob("*.safetensors")):
        whole = path.read_bytes()
        path.write_bytes(pickle.dumps(Poison()))
        with pytest.raises(TrainingError, match="is damaged"):
            loop.train(make(), streams, recipe, tmp_path / "run")
        path.write_bytes(whole)
    assert not (tmp_path / "poisoned").exists()


def _other_type(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].double()


def _other_shape(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.zeros(*tensors[name].shape, 2, dtype=tensors[name].dtype)


def _no_state(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.full_like(tensors[name], 255)


def _missing(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _too_much(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors["9.9.more"] = torch.zeros(1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_damaged_checkpoint_is_refused(optimizer: str, recipe: Recipe, streams: TokenStreams, tmp_path: Path) -> None:
    """Every file in every way is one line, and the checkpoint stays as it is."""
    recipe = replace(recipe, optimizer=optimizer)
    loop.train(make(), streams, recipe, tmp_path)
    folder = tmp_path / "checkpoint"
    for file in (state.MODEL, state.OPTIMIZER, state.RANDOM):
        whole = (folder / file).read_bytes()
        last = _no_state if file == state.RANDOM else _too_much
        for damage in (_other_type, _other_shape, _missing, last):
            tensors = load_file(folder / file)
            damage(tensors, next(reversed(tensors)))
            save_file(tensors, folder / file)
            with pytest.raises(TrainingError, match=r"is damaged \(.*\): remove it to start over"):
                loop.train(make(), streams, recipe, tmp_path)
            (folder / file).write_bytes(whole)
    progress = json.loads((folder / state.PROGRESS).read_text())
    for change in ({"step": "4"}, {"validations": [None]}, {"schedules": [{}]}, {"fingerprint": None}):
        (folder / state.PROGRESS).write_text(json.dumps(progress | change))
        with pytest.raises(TrainingError, match="is damaged"):
            loop.train(make(), streams, recipe, tmp_path)
    (folder / state.PROGRESS).write_text(json.dumps(progress)[:-20])
    with pytest.raises(TrainingError, match="is damaged, or of another version"):
        loop.train(make(), streams, recipe, tmp_path)


def test_only_the_same_run_goes_on(
    recipe: Recipe, streams: TokenStreams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever decides the result is compared, and what differs is said."""

    def refused(difference: str, objective: ModifiedCLM | None = None, **changes: Any) -> None:
        with pytest.raises(TrainingError, match=f"holds another run: .*{difference}.*: remove it, name another --work"):
            loop.train(objective or make(), replace(streams, **changes), recipe, tmp_path)

    loop.train(make(), streams, recipe, tmp_path)
    refused("weights was [0-9a-f]{12}… and is", make(seed=1))
    refused(r"model\.rms_norm_eps was 1e-06 and is 0\.01", make(rms_norm_eps=0.01))
    refused(r"corpus\.sha256 was 0", record=replace(streams.record, sha256="1" * 64))
    refused(r"corpus\.held_out_percent was 6", record=replace(streams.record, held_out_percent=7.0))
    refused("tokenizer was", tokenizer="another")
    other = make()
    other.settings = {"more": 1}
    refused(r"objective\.more was None and is 1", other)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        refused(r"versions\.torch was .* and is 9\.9")
    loop.train(make(), replace(streams, record=replace(streams.record, source="elsewhere")), recipe, tmp_path)


def test_a_second_run_in_the_same_folder_is_refused(recipe: Recipe, streams: TokenStreams, tmp_path: Path) -> None:
    with files.WholeFolder(tmp_path / "checkpoint"), pytest.raises(OutputError, match="another process is writing"):
        loop.train(make(), streams, recipe, tmp_path)


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    """Two corpora."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(30):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} of {i} " * 9)
    return {name: str(tmp_path / name) for name in "ab"}


class Failing:
    """A tokenizer that fails at a document."""

    def __init__(self, at: int) -> None:
        self.tokenizer, self.left = train_tokenizer(), at

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode(self, *arguments: Any, **settings: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.tokenizer.encode(*arguments, **settings)


def test_tokens_are_those_of_the_text_that_is_there(texts: dict[str, str], tmp_path: Path) -> None:
    """Half of another corpus never counts, and neither does text that was changed."""

    def tokens(name: str) -> TokenStreams:
        return tokenize_corpus(texts[name], train_tokenizer(), 0, 20, tmp_path / "tokens")

    first = tokens("a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "tokens").iterdir()}
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(texts["b"], Failing(9), 0, 20, tmp_path / "tokens")  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in (tmp_path / "tokens").iterdir()} == before
    other = tokens("b")
    assert other.record.sha256 != first.record.sha256 and other.record.train_tokens == len(other.train)
    assert "b of " in train_tokenizer().decode(other.train.tolist())
    (tmp_path / "b" / "3.txt").write_text("b of 3 " * 8 + "changed")
    changed = tokens("b")
    assert changed.record.sha256 != other.record.sha256
    assert "changed" in train_tokenizer().decode([*changed.train.tolist(), *changed.held_out.tolist()])
    kept = (tmp_path / "tokens" / "tokens.json").stat().st_mtime_ns
    tokens("b")
    assert (tmp_path / "tokens" / "tokens.json").stat().st_mtime_ns == kept
    whole = changed.train.tolist()
    with (tmp_path / "tokens" / "tokens-train.bin").open("r+b") as file:
        file.truncate(10)
    assert tokens("b").train.tolist() == whole


def test_a_result_is_there_once_it_is_whole(tmp_path: Path) -> None:
    """What fails while it is written leaves nothing, and what appeared meanwhile stays."""
    with pytest.raises(ZeroDivisionError), pipeline._new_folder(tmp_path / "models" / "out") as folder:
        (folder / "config.json").write_text("{}")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TrainingError, match="is not empty"), pipeline._new_folder(tmp_path / "out") as folder:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_tokenizer_is_that_of_its_text(texts: dict[str, str], tmp_path: Path) -> None:
    """Of another text or size it is another; of the same it is trained once."""

    def made(name: str, size: int) -> str:
        return pipeline._own_tokenizer(pipeline.Job(tmp_path, texts[name], 20, tmp_path / "work"), size).to_str()

    first = made("a", 300)
    assert len({first, made("b", 300), made("a", 260)}) == 3
    (path,) = (path for path in (tmp_path / "work").iterdir() if path.read_text() == first)
    changed = path.stat().st_mtime_ns
    assert made("a", 300) == first and path.stat().st_mtime_ns == changed
