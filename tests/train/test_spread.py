"""Training in two processes, whole and sharded, against training in one."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import spread_cases
from support.spread_cases import CASES, PROCESSES, RECIPE, RESUMED, STOPPED

from dynamo_train import TrainingError, loop, spread, state
from dynamo_train.spread import PLAIN, Memory
from dynamo_train.train import main

TESTS = Path(__file__).parents[1]
LAUNCH = [
    "--multi_gpu", "--num_processes", str(PROCESSES), "--num_machines", "1", "--main_process_port", "0",
    "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip
"""As docs/scale.md has it for processors without a GPU: `--cpu` would start one process."""


def metrics(folder: Path) -> list[dict]:
    """A line a step; `loss` a list."""
    return [json.loads(line) for line in (folder / loop.METRICS).read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the same runs by one process, and by two at once."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for name, case in CASES.items():
        case.run(one / name, PLAIN)
    for name, case in RESUMED.items():
        with spread_cases.interrupted(process=0):
            case.run(two / f"up {name}", PLAIN)
        assert len(metrics(two / f"up {name}")) == 1
    path = os.pathsep.join([str(TESTS), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, "-m", "support.spread_cases", str(two)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return one, two


def assert_alike(one: Path, two: Path, tolerance: float) -> None:
    """The same losses and figures at every step, and weights that differ by roundings."""
    lines = metrics(one), metrics(two)
    assert [line["step"] for line in lines[1]] == [line["step"] for line in lines[0]] == [1, 2, 3, 4]
    for ours, theirs in zip(*lines, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=tolerance)
        assert theirs.keys() == ours.keys()
        assert all(theirs[key] == pytest.approx(ours[key], rel=tolerance) for key in ours if key.startswith("ppl"))
    for file in (state.MODEL, state.OPTIMIZER):
        a, b = (load_file(folder / "checkpoint" / file) for folder in (one, two))
        assert a.keys() == b.keys()
        for key, tensor in a.items():  # on average: AdamW's first steps go by signs, where gradients are roundings too
            assert b[key].shape == tensor.shape
            apart, size = (each.double().abs().mean() for each in (b[key].double() - tensor.double(), tensor))
            assert apart <= 10 * tolerance * size + 1e-9, key


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_does(name: str, runs: tuple[Path, Path]) -> None:
    one, two = (folder / name for folder in runs)
    assert_alike(one, two, CASES[name].tolerance)
    assert any("loss" in line and len(line) > 2 for line in metrics(two)), "no figures were measured"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.changes.get("freeze_base")])
def test_a_frozen_base_stays_bit_identical(name: str, runs: tuple[Path, Path]) -> None:
    before = {f"model.base.{key}": tensor for key, tensor in spread_cases.base().state_dict().items()}
    after = load_file(runs[1] / name / "checkpoint" / state.MODEL)
    kept = before.keys() & after.keys()
    assert len(kept) >= len(before) - 1  # tied embeddings are stored once
    assert all(torch.equal(before[key], after[key]) for key in kept)


@pytest.mark.slow
def test_a_cache_of_two_processes_is_that_of_one(runs: tuple[Path, Path]) -> None:
    one, two = (folder / "cached" / "states" for folder in runs)
    files = [file for file in one.rglob("*") if file.is_file()]
    assert len(files) == 2 * 6
    assert all((two / file.relative_to(one)).read_bytes() == file.read_bytes() for file in files)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_checkpoints_go_on_in_another_number_of_processes(
    name: str, runs: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = runs
    assert_alike(one / "heads", two / f"up {name}", 1e-4)
    assert [line["step"] for line in metrics(two / f"down {name}")] == [1, 2], "all end behind the same step"
    with caplog.at_level("INFO"):
        RESUMED[name].run(two / f"down {name}", PLAIN)
    assert "the checkpoint is of 2 process(es) and this is a run of 1" in caplog.text
    assert_alike(one / "heads", two / f"down {name}", 1e-4)


@pytest.mark.slow
def test_a_stopped_stream_of_two_processes_ends_bit_equal(runs: tuple[Path, Path]) -> None:
    whole, resumed = (runs[1] / name for name in ("streamed", STOPPED))
    assert metrics(resumed) == metrics(whole)
    for file in (state.MODEL, state.OPTIMIZER):
        assert (resumed / "checkpoint" / file).read_bytes() == (whole / "checkpoint" / file).read_bytes()


@pytest.mark.slow
def test_parameters_are_sharded(runs: tuple[Path, Path]) -> None:
    """Along the first dimension, the first process having the larger part."""
    shapes = json.loads((runs[1] / spread_cases.SHAPES).read_text())
    assert len(shapes) > 30
    for whole, part in shapes.values():
        assert part == [math.ceil(whole[0] / PROCESSES), *whole[1:]]


def test_activations_that_are_computed_twice_change_nothing(tmp_path: Path) -> None:
    """In one process; and they are: a layer runs more often."""
    counts = []
    for memory in (PLAIN, Memory(checkpoint_activations=True)):
        calls: list[int] = []
        objective = spread_cases.heads(tmp_path, spread_cases.RECIPE)
        first: Any = objective.get_submodule("model.heads.0.input_layernorm")
        first.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        folder = tmp_path / str(len(counts))
        loop.train(objective, spread_cases.streams(), spread_cases.RECIPE, folder, memory=memory)
        counts.append(len(calls))
    assert_alike(tmp_path / "0", tmp_path / "1", 1e-6)
    assert counts[1] == counts[0] + spread_cases.RECIPE.steps * 4, "once more for each of four micro-batches a step"


def test_compiled_layers_train_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is compiled, and what is trained has the names and values of what is not."""
    compiled = []

    def note(function: Any, **how: Any) -> Any:
        compiled.append(function.__self__)
        return lambda *args, **kwargs: function(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", note)
    for memory in (PLAIN, Memory(compile=True, checkpoint_activations=True)):
        objective = spread_cases.heads(tmp_path, spread_cases.RECIPE)
        folder = tmp_path / str(memory.compile)
        loop.train(objective, spread_cases.streams(), spread_cases.RECIPE, folder, memory=memory)
    assert_alike(tmp_path / "False", tmp_path / "True", 1e-6)
    model: Any = objective.model
    assert compiled == [*model.base.base_model.layers, *model.heads]


@pytest.mark.slow
def test_torch_compiles_layers(tmp_path: Path) -> None:
    """The real one, of which the first step's losses are those of layers as they are."""
    pytest.importorskip("torch._inductor")
    if not any(map(shutil.which, spread.COMPILERS)):
        pytest.skip("there is no C++ compiler")
    batch = torch.from_numpy(spread_cases.heads(tmp_path, RECIPE).batch(spread_cases.streams(), 0, RECIPE))
    found = []
    for compiled in (False, True):
        objective = spread_cases.heads(tmp_path, RECIPE)
        if compiled:
            spread.compile_layers(objective)
        losses = objective(batch)
        losses.sum().backward()
        found.append([losses.detach(), *(each.grad for each in objective.parameters())])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-6)


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    flags = ["base", "--data", "stdlib", "--out", str(tmp_path / "out"), "--steps", "2", "--compile"]
    assert main(flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--compile needs a C++ compiler, and there is none: install one (apt install g++)" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["base"], ["lookahead", "nowhere"]])
def test_one_process_has_nothing_to_shard(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", "stdlib", "--out", str(tmp_path / "out"), "--steps", "2", "--shard"]
    assert main([*command, *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--shard divides a model among processes, and there is one: start several" in line
    assert not list(tmp_path.iterdir())


def test_layers_that_cannot_run_twice_are_refused() -> None:
    with pytest.raises(TrainingError, match="leave --checkpoint-activations out"):
        spread_cases.spread.checkpoint_activations(torch.nn.Linear(2, 2))
